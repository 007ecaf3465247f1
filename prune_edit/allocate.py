"""One budget over heads and neurons: units trade by score per cost.

Scores are in one currency, nats of the answer's log probability, costs in another, so the units
that bring most per cost are taken first, as long as they fit: the greedy of the knapsack problem.
What comes together is offered together: the first heads of a KV group with what the group shares,
one more head for all groups of a layer at once (short ones are padded anyway), the FFN by whole
steps where its width is aligned, the first units of a block with what the block costs as such.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from prune_edit.aligned import widths_allowed
from prune_edit.costs import Cost, Costs
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept

KV_RULES = ("pad", "keep-groups", "equal", "duplicate")
Block = tuple[int, int]
"""A layer, and 0 for its attention or 1 for its FFN."""


@dataclass(frozen=True)
class _Offer:
    """More units of one block: what they are worth, what they cost, and the sizes after them."""

    value: float
    cost: Cost
    sizes: tuple[int, ...]

    @property
    def rate(self) -> float:
        if self.cost > 0:
            return self.value / self.cost
        return math.inf if self.value > 0 else self.value


@dataclass
class _Heads:
    """A layer's attention: its heads by group, best first, and how many of each are taken."""

    costs: Costs
    layer: int
    ranked: list[list[tuple[float, int]]]
    rule: str  # of KV_RULES
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = (0,) * len(self.ranked)

    @property
    def units(self) -> tuple[int, ...]:
        taken = zip(self.ranked, self.sizes, strict=True)
        return tuple(sorted(head for group, size in taken for _, head in group[:size]))

    @property
    def cost(self) -> Cost:
        return self.costs.of_heads(self.layer, self.sizes)

    def best(self, room: Cost) -> _Offer | None:
        """The offer of the highest rate that fits; of equals, the first."""
        fitting = [offer for offer in self.offers() if offer.cost <= room]
        return max(fitting, key=lambda offer: offer.rate, default=None)

    def offers(self) -> Iterator[_Offer]:
        """What may be taken next."""
        if self.rule == "equal":
            yield from map(self._offer, self._equal())
            return
        alone: list[_Offer] = []
        for group in range(len(self.ranked)):
            offers = [self._offer(sizes) for sizes in self._of_group(group)]
            if offers:
                alone.append(max(offers, key=lambda offer: offer.rate))
            yield from offers
        most = max(self.sizes, default=0)
        if self.rule == "pad" and most:
            # As far as a group that is there grows: an offer of nothing would be taken for ever.
            there = zip(self.ranked, self.sizes, strict=True)
            for size in range(most + 1, max(len(heads) for heads, have in there if have) + 1):
                yield self._offer(
                    tuple(
                        min(len(heads), size) if have else 0
                        for heads, have in zip(self.ranked, self.sizes, strict=True)
                    )
                )
        if not most and self.costs.attention[self.layer] > 0:
            together = list(self.sizes)
            for offer in sorted(alone, key=lambda offer: -offer.rate):
                together = [max(pair) for pair in zip(together, offer.sizes, strict=True)]
                yield self._offer(tuple(together))

    def _equal(self) -> Iterator[tuple[int, ...]]:
        """Sizes after one more group as large as the others, or one more head for all of them."""
        most, widest = max(self.sizes, default=0), max(map(len, self.ranked), default=0)
        for group, heads in enumerate(self.ranked):
            if self.sizes[group]:
                continue
            for size in (most,) if most else range(1, len(heads) + 1):
                if size <= len(heads):
                    yield (*self.sizes[:group], size, *self.sizes[group + 1 :])
        there = [len(heads) for heads, have in zip(self.ranked, self.sizes, strict=True) if have]
        for size in range(most + 1, min(there, default=widest) + 1 if there else 0):
            yield tuple(size if have else 0 for have in self.sizes)

    def _of_group(self, group: int) -> Iterator[tuple[int, ...]]:
        have, there = self.sizes[group], len(self.ranked[group])
        for size in range(there if self.rule == "keep-groups" else have + 1, there + 1):
            if size > have:
                yield (*self.sizes[:group], size, *self.sizes[group + 1 :])

    def _offer(self, sizes: tuple[int, ...]) -> _Offer:
        value = math.fsum(
            score
            for heads, have, want in zip(self.ranked, self.sizes, sizes, strict=True)
            for score, _ in heads[have:want]
        )
        return _Offer(value, self.costs.of_heads(self.layer, sizes) - self.cost, sizes)


@dataclass
class _Neurons:
    """A layer's FFN: its neurons, best first, and the widths it may have."""

    costs: Costs
    layer: int
    ranked: list[int]
    sums: list[float]  # of the scores of the first so many
    widths: list[int]  # ascending, from 0
    at: int = 0  # of the widths

    @property
    def units(self) -> tuple[int, ...]:
        return tuple(sorted(self.ranked[: self.widths[self.at]]))

    @property
    def cost(self) -> Cost:
        return self.costs.of_neurons(self.layer, self.widths[self.at])

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.at,)

    @sizes.setter
    def sizes(self, sizes: tuple[int, ...]) -> None:
        (self.at,) = sizes

    def best(self, room: Cost) -> _Offer | None:
        """The offer of the highest rate that fits; of equals, the first.

        Later neurons bring no more than earlier ones, so the next step is the best, unless the
        block itself has its price.
        """
        priced = self.at == 0 and self.costs.ffn[self.layer] > 0
        last = len(self.widths) if priced else min(self.at + 2, len(self.widths))
        best = None
        for at in range(self.at + 1, last):
            cost = self.costs.of_neurons(self.layer, self.widths[at]) - self.cost
            if cost > room:
                break
            value = self.sums[self.widths[at]] - self.sums[self.widths[self.at]]
            offer = _Offer(value, cost, (at,))
            if best is None or offer.rate > best.rate:
                best = offer
        return best


def allocate(
    head_scores: torch.Tensor,
    neuron_scores: torch.Tensor,
    costs: Costs,
    budget: Cost,
    *,
    kv: str = "pad",
    align: int = 1,
    widths: Sequence[int] | None = None,
    closed: Collection[Block] = (),
    every_layer: bool = False,
) -> tuple[Kept, Kept]:
    """The heads and neurons that bring most within a budget of `costs`, never above it.

    `head_scores` (L, H) count as they are, `neuron_scores` (L, N) by size; NaN marks absent units.
    No unit that is left out would still fit, nor a KV group with `kv` "keep-groups", nor a step of
    `align` neurons. Ties go to heads, then to the first layer, and there to the first unit.

    FFN widths are multiples of `align`, or 0, or the layer's of `widths` (default: all it has).
    `closed` blocks keep nothing. Some head always stays, or one in each layer with `every_layer`.
    Raises BudgetError where none fits.
    """
    blocks = _blocks(head_scores, neuron_scores, costs, kv, align, widths)
    open_ones = [block for key, block in blocks.items() if key not in closed]
    spent: Cost = 0
    if every_layer:
        for layer in range(head_scores.shape[0]):
            spent += _first_head([blocks[layer, 0]], budget - spent, costs, cheapest=True)
    else:
        spent = _first_head(open_ones, budget, costs)
    _fill(open_ones, budget - spent)
    layers = range(head_scores.shape[0])
    return (
        tuple(blocks[layer, 0].units for layer in layers),
        tuple(blocks[layer, 1].units for layer in layers),
    )


def _first_head(
    blocks: Sequence[_Heads | _Neurons], budget: Cost, costs: Costs, cheapest: bool = False
) -> Cost:
    """Take the best offer of heads, which a model cannot do without; its cost.

    The best of the cheapest where every layer takes one.
    """
    offers: list[tuple[_Heads, _Offer]] = []
    for block in blocks:
        if not isinstance(block, _Heads):
            continue
        fitting = [offer for offer in block.offers() if offer.cost <= budget]
        if cheapest and fitting:
            least = min(offer.cost for offer in fitting)
            fitting = [offer for offer in fitting if offer.cost == least]
        best = max(fitting, key=lambda offer: offer.rate, default=None)
        offers += [] if best is None else [(block, best)]
    found = max(offers, key=lambda pair: pair[1].rate, default=None)
    if found is None:
        where = (
            "an attention head in every layer, as --serve vllm needs"
            if cheapest
            else ("attention head, and a model needs one")
        )
        raise BudgetError(
            f"a budget of {budget:g} {costs.kind} holds no {where}; give more"
            if not cheapest
            else f"the budget does not hold {where}; give more, or leave --serve out"
        )
    block, offer = found
    block.sizes = offer.sizes
    return offer.cost


def _blocks(
    head_scores: torch.Tensor,
    neuron_scores: torch.Tensor,
    costs: Costs,
    kv: str,
    align: int,
    widths: Sequence[int] | None,
) -> dict[Block, _Heads | _Neurons]:
    """Every layer's attention (layer, 0) and FFN (layer, 1), nothing taken yet."""
    blocks: dict[Block, _Heads | _Neurons] = {}
    for layer, scores in enumerate(head_scores.double().tolist()):
        groups: dict[int, list[tuple[float, int]]] = {}
        for head, score in enumerate(scores):
            if not math.isnan(score):
                groups.setdefault(head // costs.group_size, []).append((score, head))
        ranked = [sorted(group, key=lambda pair: (-pair[0], pair[1])) for group in groups.values()]
        blocks[layer, 0] = _Heads(costs, layer, ranked, kv)
    for layer, sizes in enumerate(neuron_scores.double().abs()):
        order = sizes.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        present = int((~sizes.isnan()).sum())
        chosen: list[int] = order[:present].tolist()
        sums = [0.0, *accumulate(sizes[order[:present]].tolist())]
        whole = present if widths is None else widths[layer]
        blocks[layer, 1] = _Neurons(
            costs, layer, chosen, sums, widths_allowed(present, align, whole)
        )
    return blocks


def _fill(blocks: Sequence[_Heads | _Neurons], budget: Cost) -> None:
    """Take offers, best first, as long as some fits."""
    room = budget
    heap: list[tuple[float, int, _Offer]] = []
    for number, block in enumerate(blocks):
        if (offer := block.best(room)) is not None:
            heapq.heappush(heap, (-offer.rate, number, offer))
    while heap:
        _, number, offer = heapq.heappop(heap)
        block = blocks[number]
        if offer.cost <= room:
            block.sizes = offer.sizes
            room -= offer.cost
        if (offer_left := block.best(room)) is not None:
            heapq.heappush(heap, (-offer_left.rate, number, offer_left))
