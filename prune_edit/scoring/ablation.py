"""Exact ablation of any unit of any model, by zero or mean, by log probability or accuracy.

arXiv 2409.14144, section 3.2. The plain way: the model's own modules run from a unit's layer on
without that unit, many units in one batch, so a score of all neurons costs about as many runs as
there are neurons. `intervention.py` has a faster way for the heads of many models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import blend
from prune_edit.replay import Replay, record
from prune_edit.running import answer_log_probs, best_tokens
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import Moments
from prune_edit.tasks.prompts import Batch

ROOM = 4  # rows in flight, in units of `batch_tokens`

Measure = Callable[[Decoder, torch.Tensor, Batch, int], torch.Tensor]
"""What the answers are worth, (B, copies), from the states (A * copies, D) that predict them."""


def unit_drops(
    decoder: Decoder, batch: Batch, options: Options, part: str, means: Moments | None = None
) -> torch.Tensor:
    """Each example's drop per unit of a `part`, "heads" or "neurons", ablated: (B, L, U).

    NaN for absent units. Zero ablation without `means`.
    """
    measure = MEASURES[options.measure]
    final, replay = record(decoder, batch.inputs)
    whole = measure(decoder, final[batch.rows, batch.columns], batch, 1)
    shape = decoder.head_shape if part == "heads" else decoder.neuron_shape
    drops = torch.zeros(len(batch.input_ids), *shape)
    absent = torch.ones(shape, dtype=torch.bool)
    rank, count = options.share
    room = max(1, options.batch_tokens * ROOM // batch.input_ids.numel())
    slots = decoder.head_slots if part == "heads" else decoder.neuron_slots
    for layer, numbers in enumerate(slots):
        places = (numbers >= 0).nonzero()[:, 0]  # no score for pads
        absent[layer, numbers[places]] = False
        places = places[rank::count]
        for some in places.split(room) if len(places) else ():
            left = without_each(replay, batch, part, layer, some, means, measure)
            drops[:, layer, numbers[some]] = (whole - left).cpu()
    return options.gather(drops).masked_fill(absent, torch.nan)


def without_each(
    replay: Replay,
    batch: Batch,
    part: str,
    layer: int,
    some: torch.Tensor,
    means: Moments | None,
    measure: Measure,
) -> torch.Tensor:
    """What the answers are worth without each of a layer's physical units `some`, (B, copies)."""
    decoder, copies = replay.decoder, len(some)
    heads = part == "heads"
    projection = decoder.attention_output(layer) if heads else decoder.ffn_output(layer)
    assert projection is not None
    slots = (decoder.head_slots if heads else decoder.neuron_slots)[layer]
    factors = torch.ones(copies, len(slots))
    factors[torch.arange(copies), some] = 0.0
    constant: torch.Tensor | float = 0.0
    if means is not None:
        constant = means.mean(part, layer).float().to(decoder.device)
    if heads:
        factors = factors.repeat_interleave(decoder.head_dim, -1)
    factors = factors.repeat(len(batch.input_ids), 1)[:, None]  # (B * copies, 1, channels)
    with blend(projection, factors.to(decoder.device), constant):
        states = replay.run(layer, copies)  # (B * copies, T, D)
    copy = torch.arange(copies, device=batch.rows.device)
    rows = (batch.rows[:, None] * copies + copy).flatten()
    columns = batch.columns.repeat_interleave(copies)
    return measure(decoder, states[rows, columns], batch, copies)


def log_prob(decoder: Decoder, states: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """Summed log probability of the answer's tokens, (B, copies)."""
    targets = batch.targets.repeat_interleave(copies)
    return _per_example(answer_log_probs(decoder, states, targets), batch, copies)


def is_right(decoder: Decoder, states: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """1 where every token of the answer is the arg-max, 0 elsewhere, (B, copies)."""
    targets = batch.targets.repeat_interleave(copies)
    misses = (best_tokens(decoder, states) != targets).float()
    return (_per_example(misses, batch, copies) == 0).float()


MEASURES: dict[str, Measure] = {"logprob": log_prob, "accuracy": is_right}


def _per_example(found: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """Sums over each example's answer tokens of (A * copies,): (B, copies).

    On the CPU: a GPU adds in an order of its own, which would not give the same bits twice.
    """
    sums = torch.zeros(len(batch.input_ids), copies)
    return sums.index_add_(0, batch.rows.cpu(), found.view(-1, copies).float().cpu())
