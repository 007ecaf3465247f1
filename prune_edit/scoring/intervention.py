"""Head score by intervention: what the answer loses when one head is zeroed.

arXiv 2409.14144, section 3.2. Exact: the model runs for every head, but only from that head's
layer on, since the layers below do not change, and with many heads in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder, Replay, record
from prune_edit.hooks import scale
from prune_edit.scoring.streaming import Options, answer_log_probs, stream
from prune_edit.tasks.prompts import Batch, Encoded
from prune_edit.units import Units


def head_drops(decoder: Decoder, batch: Batch, options: Options) -> torch.Tensor:
    """Drop in every answer's summed log probability per head zeroed: (B, L, H), NaN if absent."""
    final, replay = record(decoder, batch.inputs)
    examples = batch.input_ids.shape[0]
    dense = _answer_sums(decoder, final, batch)
    drops = torch.full((examples, *decoder.head_shape), float("nan"))
    room = max(1, options.batch_tokens * 4 // batch.input_ids.numel())
    for layer, heads in enumerate(decoder.layout.heads):
        for start in range(0, len(heads), room):
            some = heads[start : start + room]
            without = _without_each(decoder, replay, batch, layer, some)
            drops[:, layer, list(some)] = (dense[:, None] - without).cpu()
    return drops


def _without_each(
    decoder: Decoder, replay: Replay, batch: Batch, layer: int, heads: Sequence[int]
) -> torch.Tensor:
    """The answers' log probability with each of a layer's heads zeroed, (B, len(heads))."""
    examples, copies = batch.input_ids.shape[0], len(heads)
    factors = torch.ones(copies, *decoder.head_shape)
    factors[torch.arange(copies), layer, list(heads)] = 0.0
    with scale(decoder, Units(heads=factors.repeat(examples, 1, 1))):
        states = replay.run(layer, copies)
    copy = torch.arange(copies, device=batch.rows.device)
    rows = (batch.rows[:, None] * copies + copy).flatten()
    columns, targets = (part.repeat_interleave(copies) for part in (batch.columns, batch.targets))
    found = answer_log_probs(decoder, states[rows, columns], targets)
    sums = torch.zeros(examples * copies, device=found.device).index_add_(0, rows, found)
    return sums.view(examples, copies)


def _answer_sums(decoder: Decoder, final: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Summed log probability of every example's answer, (B,)."""
    found = answer_log_probs(decoder, final[batch.rows, batch.columns], batch.targets)
    sums = torch.zeros(batch.input_ids.shape[0], device=found.device)
    return sums.index_add_(0, batch.rows, found)


@torch.no_grad()
def score_heads(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> torch.Tensor:
    """Mean drop over the examples, (L, H) in nats."""
    total = torch.zeros(decoder.head_shape, dtype=torch.float64)
    for batch in stream(decoder, prompts, options, "heads"):
        total += head_drops(decoder, batch, options).double().sum(0)
    return (total / len(prompts)).float()
