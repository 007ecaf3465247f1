"""Rules: what a choice of units has to respect, whether by count or by cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_edit.aligned import check_align, keep_aligned, keep_equal
from prune_edit.allocate import KV_RULES, Block, allocate
from prune_edit.costs import Cost, Costs
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept
from prune_edit.planning import keep_neurons, keep_top

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rules:
    """How units may be chosen; those of the start leave every choice free.

    kv            `pad`: heads go singly, short KV groups are padded; `keep-groups`: whole groups
                  go; `equal`: groups of a layer stay equal in size; `duplicate`: heads go singly,
                  keys and values are repeated
    align         FFN widths are multiples of it, 0, or the layer's of `widths`
    widths        the FFN widths of the model before pruning, a layer each
    group_size    query heads of a KV group
    costs         with a `budget`: what units cost
    budget        what stays costs no more than that; None for budgets by count
    whole_blocks  whether a budget may drop whole blocks, by measuring the model without
    every_layer   every layer keeps a KV group, of so many layers; 0 where none has to
    """

    kv: str = "pad"
    align: int = 1
    widths: tuple[int, ...] | None = None
    group_size: int = 1
    costs: Costs | None = None
    budget: Cost | None = None
    whole_blocks: bool = False
    every_layer: int = 0

    @property
    def fewest_heads(self) -> int:
        """The least number of heads that the rules can keep."""
        return (self.group_size if self.kv == "keep-groups" else 1) * max(1, self.every_layer)

    def check_counts(self, heads: int, neurons: int | None) -> None:
        """Raise BudgetError where no choice of so many units keeps the rules."""
        if heads < self.fewest_heads and self.every_layer:
            raise BudgetError(
                f"--keep-heads leaves {heads} heads, and --serve vllm with --kv {self.kv} needs "
                f"{self.fewest_heads}, a KV group in each of {self.every_layer} layers; keep more "
                "heads, or leave --serve out"
            )
        if heads < self.fewest_heads:
            raise BudgetError(
                f"--keep-heads leaves {heads} heads, and --kv keep-groups keeps whole KV groups of "
                f"{self.group_size}; keep more heads, or give --kv pad"
            )
        if neurons is not None and self.align > neurons:
            raise BudgetError(
                f"--keep-neurons leaves {neurons} neurons, fewer than one step of --align "
                f"{self.align}; keep more neurons, or align to less"
            )

    def heads(self, scores: torch.Tensor, count: int) -> Kept:
        """The `count` best heads of (L, H) scores; of whole KV groups, the best that fit in it.

        Of equal groups, the greatest sum among the fullest choices: exact.
        """
        if self.kv == "equal" and self.group_size > 1:
            return keep_equal(scores, count, self.group_size, least=int(self.every_layer > 0))
        if self.kv != "keep-groups" or self.group_size == 1:
            first = best_of_layers(scores) if self.every_layer else scores
            return keep_top(first, count)
        kept: list[list[int]] = [[] for _ in scores]
        groups = _groups(scores, self.group_size)
        if self.every_layer:  # the best of every layer before all others
            firsts = [next(g for g in groups if g[1] == layer) for layer in range(len(scores))]
            groups = firsts + [group for group in groups if group not in firsts]
        for _, layer, heads in groups:
            if len(heads) <= count:
                kept[layer] += heads
                count -= len(heads)
        return tuple(tuple(sorted(heads)) for heads in kept)

    def neurons(self, scores: torch.Tensor, count: int, last: bool = True) -> Kept:
        """The `count` neurons of (L, N) scores largest in size; the `last` choice is aligned."""
        if self.align == 1 or not last:
            return keep_neurons(scores, count)
        # Layers that stay whole (`within_layers`) are no choice: their sums would drown all others.
        fixed = [bool(row.isinf().any()) for row in scores]
        whole = [tuple((~row.isnan()).nonzero()[:, 0].tolist()) for row in scores]
        free = scores.clone()
        free[fixed] = math.nan
        count -= sum(len(row) for row, stays in zip(whole, fixed, strict=True) if stays)
        widths = self.widths and tuple(
            0 if stays else width for width, stays in zip(self.widths, fixed, strict=True)
        )
        kept = keep_aligned(free, max(count, self.align), self.align, widths)
        return tuple(
            row if stays else own for row, stays, own in zip(whole, fixed, kept, strict=True)
        )

    def units(
        self,
        heads: torch.Tensor,
        neurons: torch.Tensor,
        budget: Cost | None = None,
        closed: Collection[Block] = (),
    ) -> tuple[Kept, Kept]:
        """The heads and neurons within the budget, or a larger one on the way to it (unaligned).

        Scores as for `allocate`. Raises BudgetError where no head fits.
        """
        assert self.costs is not None and self.budget is not None
        last = budget is None
        return allocate(
            heads,
            neurons,
            self.costs,
            self.budget if budget is None else budget,
            kv=self.kv,
            align=self.align if last else 1,
            widths=self.widths if last else None,
            closed=closed,
            every_layer=self.every_layer > 0,
        )

    def check(self, flag: str = "--align") -> None:
        """Raise BudgetError for rules that no choice could keep."""
        if self.kv not in KV_RULES:
            raise BudgetError(f"kv {self.kv!r} is unknown; give {' or '.join(KV_RULES)}")
        check_align(self.align, self.widths or (self.align,), flag)


def best_of_layers(scores: torch.Tensor) -> torch.Tensor:
    """The (L, H) scores with each layer's best head above all else."""
    found = scores.clone()
    best = scores.nan_to_num(nan=-math.inf).argmax(1, keepdim=True)
    return found.scatter(1, best, math.inf)


def _groups(scores: torch.Tensor, size: int) -> list[tuple[float, int, list[int]]]:
    """Less than nothing of each KV group's summed score a head, its layer and heads: best first."""
    found = []
    for layer, row in enumerate(scores.double().tolist()):
        for start in range(0, len(row), size):
            heads = [h for h in range(start, min(start + size, len(row))) if not math.isnan(row[h])]
            if heads:
                value = math.fsum(row[head] for head in heads) / len(heads)
                found.append((-value, layer, heads))
    return sorted(found)


def budget_of(share: float, costs: Costs, heads: Kept, neurons: Kept) -> Cost:
    """What a share of these units' cost comes to, in whole numbers where costs are."""
    total = costs.of_units(heads, neurons)
    if costs.kind == "latency":
        # A sum of floats in another order must not lack room for its last unit.
        return share * total * (1 + 1e-12)
    return math.floor(round(share * total, 6))


def widths_of(neurons: Kept) -> tuple[int, ...]:
    """How many neurons each layer has."""
    return tuple(map(len, neurons))


def parse_budget(text: str | float, flag: str = "--budget") -> float:
    """Read `20%` of the prunable cost. Raises BudgetError."""
    value = str(text).strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise BudgetError(
            f"{flag} {text!r} is not a share of what attention and FFN cost; give one above 0% and "
            "at most 100%, such as 20%"
        )
    return share


def check_alone(budget: object, others: Sequence[tuple[str, bool]]) -> None:
    """Raise BudgetError where another budget is given beside `--budget`."""
    given = [flag for flag, there in others if there]
    if budget is not None and given:
        raise BudgetError(
            f"--budget {budget} covers heads and neurons together; leave out {' and '.join(given)}"
        )
