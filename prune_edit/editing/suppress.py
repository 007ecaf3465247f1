"""The plain ways to suppress a concept's neurons: one act for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit, edit_of, named
from prune_edit.editing.probe import sides
from prune_edit.hooks import capture
from prune_edit.planning import keep_top
from prune_edit.running import Running, stream
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Example

WAYS = ("search", "zero", "scale", "mean", "clamp", "amplify")
_AMPLIFIED = 2.0
_RANGE = (0.25, 0.75)  # quantiles


def ranked(
    scores: torch.Tensor,
    count: int,
    way: str,
    guard: torch.Tensor,
    weight: float,
    protected: torch.Tensor,
) -> list[tuple[int, int]]:
    """The `count` neurons to change, (layer, unit): those that carry the bias most.

    For `amplify` those that work against it most. What a neuron carries of what must stay, `guard`
    (L, N) from 0 to 1, takes `weight` times the largest score off; the protected ones never count.
    """
    signed = -scores if way == "amplify" else scores
    largest = float(signed.nan_to_num(0.0).abs().max())
    net = (signed - weight * largest * guard).masked_fill(protected, torch.nan)
    kept = keep_top(net, count)
    return [(layer, unit) for layer, units in enumerate(kept) for unit in units]


def plain_edit(
    decoder: Decoder,
    neurons: Sequence[tuple[int, int]],
    way: str,
    factor: float | None,
    pairs: Sequence[Example],
    options: Running,
) -> Edit:
    """All these neurons changed alike.

    `zero` takes them out; `scale` and `amplify` multiply them by `factor`; `mean` replaces them by
    their mean where the pairs' answers are predicted; `clamp` does what is nearest to holding them
    between the quartiles they have there, in least squares, among all that is linear: weights
    cannot hold a real clamp.
    """
    if way in ("mean", "clamp"):
        seen = _coefficients(decoder, neurons, pairs, options)
        changes = [
            _fitted(layer, unit, values, way)
            for (layer, unit), values in zip(neurons, seen.T, strict=True)
        ]
        return edit_of(decoder, changes)
    if way == "zero":
        factor = 0.0
    elif factor is None:
        factor = _AMPLIFIED if way == "amplify" else 0.0
    how = named(factor)
    return edit_of(
        decoder, [Change("neuron", layer, unit, factor, how=how) for layer, unit in neurons]
    )


def _fitted(layer: int, unit: int, values: torch.Tensor, way: str) -> Change:
    mean = float(values.mean())
    if way == "mean":
        return Change("neuron", layer, unit, 0.0, mean, "mean")
    low, high = torch.quantile(values, torch.tensor(_RANGE, dtype=values.dtype))
    held = values.clamp(low, high)
    spread = float((values - mean).pow(2).sum())
    slope = float(((values - mean) * (held - held.mean())).sum()) / spread if spread else 1.0
    return Change("neuron", layer, unit, slope, float(held.mean()) - slope * mean, "clamp")


@torch.no_grad()
def _coefficients(
    decoder: Decoder,
    neurons: Sequence[tuple[int, int]],
    pairs: Sequence[Example],
    options: Running,
) -> torch.Tensor:
    """What the neurons are where either side's answers are predicted, (A, K) float64."""
    rows = [row for side in sides(pairs) for row in side]
    encoded = encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
    slots = {
        (layer, unit): decoder.neuron_slots[layer].tolist().index(unit) for layer, unit in neurons
    }
    found = []
    for batch in stream(decoder, encoded, options, "coefficients"):
        with capture(decoder, at=(batch.rows, batch.columns), heads=False) as seen:
            decoder.final_states(**batch.inputs)
        columns = [seen.coefficients[layer][:, slot] for (layer, _), slot in slots.items()]
        found.append(torch.stack(columns, 1).double().cpu())
    return torch.cat(found)
