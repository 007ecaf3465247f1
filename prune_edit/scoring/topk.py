"""The k best neurons, certified, at a fraction of the work.

By Jensen's inequality the first order of an importance, two dot products of D numbers, bounds it
from above (`importance.py`). Neurons are evaluated in the order of their bound until the k-th best
exact score beats every bound that is left: the k best are then those of a full computation.

The change between two runs o and a (CNA) is first orders less C_o - C_a, the curvatures. With
phi(x) = (e^x - 1 - x) / x^2, |Y| <= M, and Var the variance of b:

    C_a <= phi(M_a) m_a^2 Var_a   (Bennett)
    C_a <= min(M_a^2 / 2, M_a)    (Hoeffding)
    C_o >= m_o^2 Var_o log(1 + phi(-M_o) M_o^2) / M_o^2
    Var_a <= max_v(p_a / p_o) Var_o

so C_a - C_o is at most a known multiple of Var_o. The variances of a neuron share one budget: under
the mean P of all p_o, Var_o <= max_v(p_o / P) q and sum_o Var_o <= A q, q the second moment of b
under P, v^T S v with one (D, D) matrix a layer. The largest multiples are given the budget first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, PlanError
from prune_edit.running import stream
from prune_edit.scoring.importance import (
    Readout,
    Traces,
    changed,
    join,
    less_second,
    read_out,
    room,
    trace_both,
    vocabulary_rows,
)
from prune_edit.scoring.intervention import head_drops, without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Batch, Encoded

SLACK = 1e-6
"""Bounds this close under the k-th score are evaluated too: what float32 may cost, in nats..."""
_ROUNDING = 2e-7
"""... or this much of the largest first order, where that is more."""
_FAR = 300.0


class Top(NamedTuple):
    """`indices` (k, 2) are layers and neurons, best first, `scores` (k,) their scores in nats.

    `evaluated` is the fraction of the neurons whose exact score was computed. Neurons of equal
    score stand in the order of their numbers.
    """

    indices: torch.Tensor
    scores: torch.Tensor
    evaluated: float


@torch.no_grad()
def top_neurons(
    decoder: Decoder, prompts: Sequence[Encoded], k: int, options: Options, contrast: bool = False
) -> Top:
    """The k neurons of highest mean importance over all answer tokens; with `contrast`, CNA score.

    Keeps the coefficients and states of all answer tokens, A L (N + D) numbers, twice with
    `contrast`. Raises BudgetError where there are not k neurons.
    """
    runs = []
    for batch in stream(decoder, prompts, options, "top neurons"):
        drops = head_drops(decoder, batch, options) if contrast else None
        runs.append(_traced(decoder, batch, drops, options))
    return _best(decoder, runs, k)


@torch.no_grad()
def score_top(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, contrast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention (L, H); neurons (L, N), all NaN but the `options.top_neurons` best.

    Raises BudgetError where there are not so many, PlanError for another contrast than the heads'
    or another norm than the frozen one, for which nothing is certified.
    """
    others = {
        "contrast prompts": bool(options.contrast),
        "an adapter": options.adapted is not None,
        "the true norm": options.norm == "true",
        "no neurons": not options.neurons,
    }
    if wrong := [name for name, given in others.items() if given]:
        raise PlanError(
            f"--top-neurons {options.top_neurons} cannot go with {wrong[0]}: the bound that finds "
            "the best is for importance and for cna against ablated heads, the norm frozen"
        )
    _check(decoder, options.top_neurons)
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    runs = []
    for batch in stream(decoder, prompts, options, "heads and top neurons"):
        drops = head_drops(decoder, batch, options)
        heads += drops.double().sum(0)
        runs.append(_traced(decoder, batch, drops if contrast else None, options))
    top = _best(decoder, runs, options.top_neurons)
    neurons = torch.full(decoder.neuron_shape, torch.nan)
    neurons[top.indices[:, 0], top.indices[:, 1]] = top.scores
    return (heads / len(prompts)).float(), neurons


def _traced(
    decoder: Decoder, batch: Batch, drops: torch.Tensor | None, options: Options
) -> list[Traces]:
    units = None if drops is None else without_top_heads(decoder, drops, options)
    return trace_both(decoder, batch, units)


def _best(decoder: Decoder, runs: Sequence[Sequence[Traces]], k: int) -> Top:
    return top_of([join(parts) for parts in zip(*runs, strict=True)], decoder, k)


def _check(decoder: Decoder, k: int) -> None:
    """Raise BudgetError unless the model has k neurons."""
    present = sum(map(len, decoder.layout.neurons))
    if not 0 < k <= present:
        raise BudgetError(
            f"top {k} neurons asked of a model that has {present}; give 1 to {present}"
        )


def top_of(pair: Sequence[Traces], decoder: Decoder, k: int) -> Top:
    """The k best neurons of one run, or by their change from the first to the second of two."""
    _check(decoder, k)
    search = _Search(decoder, pair)
    layers, width = decoder.neuron_shape
    upper = torch.full((layers, width), -torch.inf, dtype=torch.float64)
    for layer in pair[0].coefficients:
        upper[layer, decoder.neuron_slots[layer]] = search.upper(layer)
    bounds, order = upper.flatten().sort(descending=True, stable=True)
    count = sum(map(len, decoder.layout.neurons))
    slack = max(SLACK, _ROUNDING * search.largest)
    scores = torch.full((count,), -torch.inf, dtype=torch.float64)
    # A few more than k, as the last of the best seldom stand in the bounds' order.
    start, stop = 0, min(count, k + max(8, k // 32))
    while start < stop:
        scores[start:stop] = search.exact(order[start:stop])
        worst = scores[:stop].topk(k).values[-1]
        start, left = stop, int((bounds[stop:count] >= worst - slack).sum())
        stop += min(left, max(stop // 2, 64))
    found, units = scores[:stop], order[:stop]
    by_number = units.argsort()
    best = by_number[found[by_number].sort(descending=True, stable=True).indices[:k]]
    indices = torch.stack([units[best] // width, units[best] % width], 1)
    summed = int(search.touched[units // width].sum())
    return Top(indices, found[best].float(), summed / count)


@dataclass
class _Search:
    """Bounds and exact scores of neurons, by layer; readouts are kept as long as they fit."""

    decoder: Decoder
    pair: Sequence[Traces]
    kept: dict[tuple[int, int], Readout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = len(self.pair[0])
        # Positions that do not differ between two runs change nothing.
        self.places = {
            layer: torch.arange(self.tokens) if len(self.pair) == 1 else changed(self.pair, layer)
            for layer in self.pair[0].coefficients
        }
        self.largest = 0.0  # first order of a neuron at a position that was bounded, in nats
        self.touched = torch.zeros(self.decoder.neuron_shape[0], dtype=torch.bool)
        self.touched[[layer for layer, places in self.places.items() if len(places)]] = True
        size = len(self.pair) * sum(map(len, self.places.values()))
        self.keep = size * len(self.decoder.unembedding) <= self.decoder.work // 4

    def _readouts(self, layer: int) -> Iterator[Readout]:
        """Of some positions at a time, those of the first run before those of the second."""
        most = max(1, room(self.decoder) // len(self.pair))
        for i, places in enumerate(self.places[layer].split(most)):
            if (found := self.kept.get((layer, i))) is None and len(places):
                some = join([part.take(places.to(part.targets.device)) for part in self.pair])
                found = read_out(self.decoder, some, layer)
                if self.keep:
                    self.kept[layer, i] = found
            if found is not None:
                yield found

    def upper(self, layer: int) -> torch.Tensor:
        """An upper bound of every neuron's mean score, (n,)."""
        total = torch.zeros(len(self.decoder.neuron_slots[layer]), dtype=torch.float64)
        for seen in self._readouts(layer):
            if not seen.linear:
                return torch.full_like(total, torch.inf)
            first = seen.first_order()
            self.largest = max(self.largest, float(first.abs().amax()) if first.numel() else 0.0)
            total += less_second(first.double(), len(self.pair)).cpu()
            if len(self.pair) == 2:
                total += curvature_excess(seen).cpu()
        return total / self.tokens

    def exact(self, units: torch.Tensor) -> torch.Tensor:
        """The mean scores of flat unit numbers, (U,)."""
        scores = torch.zeros(len(units), dtype=torch.float64)
        layers, numbers = (
            units // self.decoder.neuron_shape[1],
            units % self.decoder.neuron_shape[1],
        )
        for layer in layers.unique().tolist():
            mine = (layers == layer).nonzero()[:, 0]
            rows = torch.searchsorted(self.decoder.neuron_slots[layer], numbers[mine])
            for seen in self._readouts(layer):
                found = seen.importances(rows.to(seen.values.device))
                scores[mine] += less_second(found.double(), len(self.pair)).cpu()
        return scores / self.tokens


def curvature_excess(seen: Readout) -> torch.Tensor:
    """An upper bound of C_a - C_o summed over the positions, (n,); o the first half, a the rest."""
    log_o, log_a = seen.log_p.chunk(2)
    size_o, size_a = (part.double().abs().T for part in seen.moved.chunk(2))  # (n, A)
    before, after = seen.expected.chunk(2)
    centre = before.mean(0)
    mixture = torch.zeros(log_o.shape[1], device=log_o.device)
    for row in log_o:
        mixture += row.exp() / len(log_o)
    second, length = _second_moment(seen, centre, mixture)
    # M by Cauchy and Schwarz: |b - E b| <= |v| (max |w - c| + |E w - c|).
    norms = seen.values.double().norm(dim=1)[:, None]
    most_o, most_a = (
        size * norms * (length + (mean - centre).double().norm(dim=1))
        for size, mean in ((size_o, before), (size_a, after))
    )
    ratio = (log_a - log_o).amax(1).double()
    multiple = _phi(most_a) * size_a.square() * ratio.exp()
    square = most_o.square().clamp(min=1e-30)
    multiple -= size_o.square() * torch.log1p(_phi(-most_o) * square) / square
    hoeffding = torch.minimum(most_a.square() / 2, most_a)
    # Where Bennett's exponentials would overflow Hoeffding's bound stands alone.
    far = (most_a > _FAR) | (ratio > _FAR)
    multiple = torch.where(far, 0.0, multiple.clamp(min=0.0))
    share = (log_o - mixture.log()).amax(1).double().exp().clamp(max=len(log_o))  # of q, at most
    share = torch.minimum(share, hoeffding / (multiple * second).clamp(min=1e-30))
    multiple, order = multiple.sort(1, descending=True)
    share = share.gather(1, order)
    budget = len(log_o) - (share.cumsum(1) - share)
    spent = multiple * torch.minimum(share, budget.clamp(min=0.0)) * second
    return spent.sum(1) + torch.where(far, hoeffding, 0.0).sum(1)


def _second_moment(
    seen: Readout, centre: torch.Tensor, mixture: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """q of every neuron (n, 1), and the greatest distance of an unembedding row from the centre."""
    matrix = torch.zeros(len(centre), len(centre), device=centre.device)
    length = torch.zeros((), device=centre.device)
    for part, weight in vocabulary_rows(seen.unembedding):
        weight = weight - centre
        length = torch.maximum(length, weight.norm(dim=1).amax())
        weight *= mixture[part].sqrt()[:, None]
        matrix.addmm_(weight.T, weight)
    second = ((seen.values @ matrix) * seen.values).sum(1, keepdim=True).double()
    return second * (1 + 1e-4) + 1e-30, float(length) * (1 + 1e-6)


def _phi(x: torch.Tensor) -> torch.Tensor:
    """(e^x - 1 - x) / x^2, one half at zero."""
    series = 0.5 + x / 6 + x.square() / 24
    return torch.where(x.abs() < 1e-3, series, (torch.expm1(x) - x) / x.square().clamp(min=1e-12))
