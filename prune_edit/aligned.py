"""Widths that hardware likes: every FFN a multiple of some number, the best within a count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from prune_edit.errors import BudgetError
from prune_edit.layout import Kept


def check_align(align: int, widths: Sequence[int], flag: str = "--align") -> None:
    """Raise BudgetError for a number that no layer's width, of `widths`, can be a multiple of."""
    most = max(widths, default=0)
    if align < 1 or (align > most and align != 1):
        raise BudgetError(
            f"{flag} {align}: no FFN could keep some of its neurons, the widest has {most}; give "
            f"1 to {most}"
        )


def widths_allowed(present: int, align: int, whole: int) -> list[int]:
    """The widths, ascending, that a layer with `present` neurons may be cut to.

    Multiples of `align` from 0, and `whole` where as many are there.
    """
    steps = list(range(0, present + 1, align))
    return sorted({*steps, whole}) if whole <= present else steps


def keep_aligned(
    scores: torch.Tensor, count: int, align: int, widths: Sequence[int] | None = None
) -> Kept:
    """The neurons of largest (L, N) `scores` in size, in allowed widths, `count` or just below.

    As many as the widths can make of `count`, and of those choices the one with the greatest sum
    of sizes: exact, by dynamic programming over the layers. `widths` are those beside multiples of
    `align` (default: all a layer has). Of equal sums the earlier layers stay wider. NaN marks
    absent units. Raises BudgetError where no width fits.
    """
    sizes = scores.double().abs()
    order = sizes.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)
    present = (~sizes.isnan()).sum(1).tolist()
    sums = sizes.nan_to_num(nan=0.0).gather(1, order).cumsum(1)
    allowed = [
        widths_allowed(there, align, there if widths is None else widths[layer])
        for layer, there in enumerate(present)
    ]
    chosen = _widths([row.tolist() for row in sums], allowed, count)
    if not any(chosen):
        raise BudgetError(
            f"{count} neurons are fewer than the {align} of one --align step; keep more, or align "
            "to less"
        )
    return tuple(
        tuple(sorted(row[:width].tolist())) for row, width in zip(order, chosen, strict=True)
    )


def keep_equal(scores: torch.Tensor, count: int, group_size: int, least: int = 0) -> Kept:
    """The heads of greatest (L, H) `scores` whose KV groups, in a layer, are equal in size.

    As many as that makes of `count`, and of those choices the one with the greatest sum: exact, by
    dynamic programming over the layers. Every layer keeps at least `least` groups. NaN marks absent
    heads. Raises BudgetError where nothing fits.
    """
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = []
    for row in scores.double().tolist():
        groups: dict[int, list[tuple[float, int]]] = {}
        for head, score in enumerate(row):
            if not math.isnan(score):
                groups.setdefault(head // group_size, []).append((-score, head))
        ranked = [sorted(heads) for heads in groups.values()]
        totals: dict[int, tuple[float, tuple[int, ...]]] = {} if least else {0: (0.0, ())}
        for size in range(1, group_size + 1):
            tops = sorted(
                (math.fsum(score for score, _ in heads[:size]), heads[:size])
                for heads in ranked
                if len(heads) >= size
            )
            for number in range(1, len(tops) + 1):
                value = -math.fsum(each for each, _ in tops[:number])
                units = tuple(sorted(head for _, top in tops[:number] for _, head in top))
                if len(units) not in totals or value > totals[len(units)][0]:
                    totals[len(units)] = (value, units)
        best.append(totals)
    sums = [
        [totals.get(width, (-math.inf, ()))[0] for width in range(1, max(totals, default=0) + 1)]
        for totals in best
    ]
    chosen = _widths(sums, [sorted(totals) for totals in best], count)
    if not any(chosen):
        raise BudgetError(f"{count} heads make no equal KV groups; keep more, or give --kv pad")
    return tuple(totals[width][1] for totals, width in zip(best, chosen, strict=True))


def _widths(sums: list[list[float]], allowed: list[list[int]], count: int) -> list[int]:
    """Each layer's width: the fullest total within `count`, and of these the best sum."""
    step = math.gcd(*(width for widths in allowed for width in widths)) or 1
    room = count // step
    best = torch.full((room + 1,), -math.inf, dtype=torch.float64)  # by how many are kept
    best[0] = 0.0
    choices = []
    for values, widths in zip(reversed(sums), reversed(allowed), strict=True):
        fitting = [width for width in widths if width <= count]
        here = torch.full_like(best, -math.inf)
        choice = torch.zeros(room + 1, dtype=torch.int32)
        for width in reversed(fitting):  # the widest first, which ties are left to
            taken = width // step
            value = values[width - 1] if width else 0.0
            found = best[: room + 1 - taken] + value
            better = found > here[taken:]
            here[taken:][better] = found[better]
            choice[taken:][better] = width
        best = here
        choices.append(choice)
    fitting_totals = (best > -math.inf).nonzero()
    if not len(fitting_totals):
        return [0] * len(allowed)
    left = int(fitting_totals[-1])
    chosen = []
    for choice in reversed(choices):
        chosen.append(int(choice[left]))
        left -= chosen[-1] // step
    return chosen
