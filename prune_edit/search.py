"""Budgets found by measuring: the smallest model that keeps the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.layout import Kept
from prune_edit.rules import Rules
from prune_edit.running import Running
from prune_edit.tasks.prompts import Encoded

_FREE = Rules()
_STEPS = 64  # the answer is exact to one 64th of the neurons


def smallest_neurons(
    decoder: Decoder,
    neuron_scores: torch.Tensor,
    validation: Sequence[Encoded],
    build: Callable[[Kept], Decoder],
    floor: float,
    options: Running,
    rules: Rules = _FREE,
) -> Kept:
    """The fewest of the best neurons with which `decoder` has an accuracy of at least `floor`.

    All of them where even that is too few. `build` makes the model with some of them; `rules` may
    align widths. Bisection: more neurons are taken to be no worse, and the answer is checked by
    measuring it.
    """
    total = sum(map(len, decoder.layout.neurons))
    floor -= 1e-9  # a drop of exactly the allowed points is allowed, also in floats

    def good(kept: Kept) -> bool:
        return measure_accuracy(build(kept), validation, options, "neuron search").value >= floor

    low, high = 0, _STEPS  # `high` is good, `low` is not
    best = decoder.layout.neurons
    while high - low > 1:
        middle = (low + high) // 2
        kept = rules.neurons(neuron_scores, max(1, round(total * middle / _STEPS)))
        if good(kept):
            high, best = middle, kept
        else:
            low = middle
    return best
