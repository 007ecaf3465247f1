"""Exact ablation of every head and every neuron, by zero or mean, by log probability or accuracy.

arXiv 2409.14144, section 3.2. The plain way: the model runs from a unit's layer on without that
unit, many units in one batch, so a score of all neurons costs about as many runs as there are
neurons. Zeroed heads measured by log probability take `intervention`'s faster way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import blend
from prune_edit.replay import Replay, record
from prune_edit.scoring.intervention import score_heads
from prune_edit.scoring.statistics import Moments, moments
from prune_edit.scoring.streaming import Options, answer_log_probs, stream
from prune_edit.tasks.prompts import Batch, Encoded


@torch.no_grad()
def score_intervention(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean drop per unit ablated, (L, H) and (L, N): nats, or share of right answers.

    The mean of mean ablation is over all tokens of the prompts, padding left out. Without
    `options.neurons`, which are by far the most work, theirs are NaN.
    """
    means = None
    if options.ablation == "mean":
        means = moments(decoder, prompts, options, "means")
    if (options.ablation, options.measure) == ("zero", "logprob"):
        heads = score_heads(decoder, prompts, options)
    else:
        heads = _scores(decoder, prompts, options, "heads", means)
    if options.neurons:
        return heads, _scores(decoder, prompts, options, "neurons", means)
    return heads, torch.full(decoder.neuron_shape, torch.nan)


def _scores(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    part: str,
    means: Moments | None,
) -> torch.Tensor:
    shape = decoder.head_shape if part == "heads" else decoder.neuron_shape
    total = torch.zeros(shape, dtype=torch.float64)
    for batch in stream(decoder, prompts, options, part):
        total += unit_drops(decoder, batch, options, part, means).double().sum(0)
    return (total / len(prompts)).float()


def unit_drops(
    decoder: Decoder, batch: Batch, options: Options, part: str, means: Moments | None = None
) -> torch.Tensor:
    """Each example's drop per unit of a `part`, "heads" or "neurons", ablated: (B, L, U).

    NaN for absent units. Zero ablation without `means`.
    """
    measure = _log_prob if options.measure == "logprob" else _is_right
    final, replay = record(decoder, batch.inputs)
    examples = len(batch.input_ids)
    whole = measure(decoder, final[batch.rows, batch.columns], batch, 1)
    shape = decoder.head_shape if part == "heads" else decoder.neuron_shape
    drops = torch.full((examples, *shape), torch.nan)
    room = max(1, options.batch_tokens * 4 // batch.input_ids.numel())
    slots = decoder.head_slots if part == "heads" else decoder.neuron_slots
    for layer, numbers in enumerate(slots):
        places = (numbers >= 0).nonzero()[:, 0]  # no score for pads
        for some in places.split(room) if len(places) else ():
            states = _without_each(decoder, replay, part, layer, some, examples, means)
            copy = torch.arange(len(some), device=batch.rows.device)
            rows = (batch.rows[:, None] * len(some) + copy).flatten()
            columns = batch.columns.repeat_interleave(len(some))
            left = measure(decoder, states[rows, columns], batch, len(some))
            drops[:, layer, numbers[some]] = (whole - left).cpu()
    return drops


def _without_each(
    decoder: Decoder,
    replay: Replay,
    part: str,
    layer: int,
    some: torch.Tensor,
    examples: int,
    means: Moments | None,
) -> torch.Tensor:
    """Final states (B * copies, T, D), one copy for each of the physical units `some`."""
    heads = part == "heads"
    projection = decoder.attention_output(layer) if heads else decoder.ffn_output(layer)
    assert projection is not None
    slots = (decoder.head_slots if heads else decoder.neuron_slots)[layer]
    factors = torch.ones(len(some), len(slots))
    factors[torch.arange(len(some)), some] = 0.0
    constant: torch.Tensor | float = 0.0 if means is None else means.mean(part, layer).float()
    if heads:
        factors = factors.repeat_interleave(decoder.head_dim, -1)
    factors = factors.repeat(examples, 1)[:, None].to(decoder.device)  # (B * copies, 1, channels)
    with blend(projection, factors, constant):
        return replay.run(layer, len(some))


# What an answer is worth, per example and copy: (A * copies, D) states to (B, copies).


def _log_prob(decoder: Decoder, states: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """Summed log probability of the answer's tokens."""
    targets = batch.targets.repeat_interleave(copies)
    return _per_example(answer_log_probs(decoder, states, targets), batch, copies)


def _is_right(decoder: Decoder, states: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """1 where every token of the answer is the arg-max, 0 elsewhere."""
    targets = batch.targets.repeat_interleave(copies)
    misses = (decoder.unembed(states).argmax(-1) != targets).float()
    return (_per_example(misses, batch, copies) == 0).float()


def _per_example(found: torch.Tensor, batch: Batch, copies: int) -> torch.Tensor:
    """Sums over each example's answer tokens of (A * copies,): (B, copies)."""
    sums = found.new_zeros(len(batch.input_ids), copies)
    return sums.index_add_(0, batch.rows, found.view(-1, copies))
