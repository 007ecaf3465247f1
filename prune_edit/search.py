"""Budgets found by measuring: the smallest model that keeps the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.layout import Kept
from prune_edit.rules import Rules
from prune_edit.running import Running
from prune_edit.tasks.prompts import Encoded

_FREE = Rules()
_STEPS = 64  # the answer is exact to one 64th of the neurons


def fewest(size: int, exact: Callable[[int], bool], rough: Callable[[int], bool] | None) -> int:
    """The least index, of `size` models that grow, that is good; the last where no other is.

    Bisection: larger models are taken to be no worse. Where there is a `rough` judge, which costs
    less and says no somewhat too often, it is asked first, and the exact one from there in strides
    that double, then between the last two.
    """
    low, high = -1, size - 1  # the last is taken to be good; `low` is not
    if rough is not None:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if rough(middle) else (middle, high)
        low, stride = -1, 1
        while high < size - 1 and not exact(high):  # what is good roughly may fail exactly
            low, high, stride = high, min(size - 1, high + stride), 2 * stride
        stride = 1
        while high - stride > low:
            if not exact(high - stride):
                low = high - stride
                break
            high, stride = high - stride, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exact(middle) else (middle, high)
    return high


def smallest_neurons(
    decoder: Decoder,
    neuron_scores: torch.Tensor,
    validation: Sequence[Encoded],
    build: Callable[[Kept], Decoder],
    floor: float,
    options: Running,
    rules: Rules = _FREE,
    rough: Callable[[Kept], Decoder] | None = None,
) -> tuple[Kept, Decoder | None]:
    """The fewest of the best neurons with which `decoder` has an accuracy of at least `floor`.

    And the model with them, as built; all of them, and None, where even that is too few. `build`
    makes the model with some of them; `rules` may align widths. The answer is checked by measuring
    it. `rough` makes a model that is a little worse for less work, which shows where to look.
    """
    total = sum(map(len, decoder.layout.neurons))
    floor -= 1e-9  # a drop of exactly the allowed points is allowed, also in floats

    def kept(step: int) -> Kept:
        if step == _STEPS:
            return decoder.layout.neurons
        return rules.neurons(neuron_scores, max(1, round(total * step / _STEPS)))

    def accuracy(small: Decoder) -> float:
        return measure_accuracy(small, validation, options, "neuron search").value

    best: dict[int, Decoder] = {}  # the smallest model that was good, by its index

    @cache
    def exactly(index: int) -> float:
        small = build(kept(index + 1))
        found = accuracy(small)
        if found >= floor and index < min(best, default=_STEPS):
            best.clear()
            best[index] = small
        return found

    def exact(index: int) -> bool:
        return exactly(index) >= floor

    @cache
    def roughly(index: int) -> float:
        assert rough is not None
        return accuracy(rough(kept(index + 1)))

    short = 0.0
    if rough is not None:
        # One exact model tells by how much the rough ones fall short.
        found = fewest(_STEPS, lambda index: roughly(index) >= floor, None)
        short = exactly(found) - roughly(found) if found < _STEPS - 1 else 0.0
    judge = None if rough is None else lambda index: roughly(index) >= floor - short
    step = 1 + fewest(_STEPS, exact, judge)
    return kept(step), best.get(step - 1)
