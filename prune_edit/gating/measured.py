"""Measured: one figure of a model, and of its base on the same examples, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prune_edit.evaluation.accuracy import wilson
from prune_edit.evaluation.resampling import (
    Interval,
    Rows,
    hull,
    paired_share_interval,
    quantiles,
    resampled,
)


@dataclass(frozen=True)
class Quantity:
    """A value with its 95 % interval; of what is counted, the interval is the value."""

    value: float
    interval: Interval

    @classmethod
    def exact(cls, value: float) -> Quantity:
        """What is counted and not estimated."""
        return cls(value, (value, value))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "interval": list(self.interval)}


@dataclass(frozen=True)
class Outcome:
    """What one example brings to a figure, in the model and, beside it, in the base."""

    text: str
    group: str
    model: float
    base: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"text": self.text, "group": self.group, "model": self.model, "base": self.base}


@dataclass(frozen=True)
class Measured:
    """A figure: `change` is model - base, `ratio` model / base, `reduction` of the distance to
    the ideal; all three are None without a base, the last also without an ideal.

    `outcomes` say what each example brings, `unable` why what is relative says nothing.
    """

    model: Quantity
    base: Quantity | None = None
    change: Quantity | None = None
    ratio: Quantity | None = None
    reduction: Quantity | None = None
    examples: int = 0
    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()
    unable: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def from_rows(
    rows: Sequence[Rows], seed: int, ideal: float | None, outcomes: Sequence[Outcome] = ()
) -> Measured:
    """The figure of one model, or of a model and its base, resampled together."""
    drawn = resampled(rows, seed)
    sides = [
        Quantity(each.value, quantiles(values)) for each, values in zip(rows, drawn, strict=True)
    ]
    if rows[0].share and outcomes:
        # Resamples of examples that are all right are all right: Wilson's never is of no width.
        columns = [_column(outcomes, 0), *([_column(outcomes, 1)] if len(rows) > 1 else [])]
        sides = [
            replace(side, interval=hull(side.interval, wilson(sum(column), len(column))))
            for side, column in zip(sides, columns, strict=True)
        ]
    found = Measured(sides[0], examples=len(outcomes), outcomes=tuple(outcomes))
    if len(rows) == 1:
        return found
    model, base = sides
    change = Quantity(model.value - base.value, quantiles(drawn[0] - drawn[1]))
    if rows[0].share and outcomes:
        own = paired_share_interval(_column(outcomes, 0), _column(outcomes, 1))
        change = replace(change, interval=hull(change.interval, own))
    return replace(
        found,
        base=base,
        change=change,
        ratio=_ratio(model, base, drawn),
        reduction=None if ideal is None else _reduction(model, base, drawn, ideal),
    )


def _column(outcomes: Sequence[Outcome], side: int) -> list[float]:
    return [each.model if side == 0 else float(each.base or 0.0) for each in outcomes]


def _ratio(model: Quantity, base: Quantity, drawn: Sequence[torch.Tensor]) -> Quantity | None:
    if base.value == 0 or bool((drawn[1] == 0).all()):
        return None
    return Quantity(model.value / base.value, quantiles(_without_zero(drawn[0], drawn[1])))


def _without_zero(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    found = above / below
    return torch.where(below == 0, torch.full_like(found, float("nan")), found)


def _reduction(
    model: Quantity, base: Quantity, drawn: Sequence[torch.Tensor], ideal: float
) -> Quantity | None:
    """1 - distance of the model to the ideal / distance of the base."""
    if base.value == ideal:
        return None
    near, far = ((values - ideal).abs() for values in drawn)
    value = 1 - abs(model.value - ideal) / abs(base.value - ideal)
    return Quantity(value, quantiles(1 - _without_zero(near, far)))


def exact(model: float, base: float | None) -> Measured:
    """A figure that is counted."""
    if base is None:
        return Measured(Quantity.exact(model))
    ratio = Quantity.exact(model / base) if base else None
    return Measured(
        Quantity.exact(model), Quantity.exact(base), Quantity.exact(model - base), ratio
    )


def of_times(times: Sequence[Sequence[float]], work: float, seed: int) -> Measured:
    """Speed from the times of repeats, one list a model, taken in turns: work per median time.

    The repeats of both models are resampled together.
    """
    table = torch.tensor([list(row) for row in times], dtype=torch.float64)  # (models, repeats)
    generator = torch.Generator().manual_seed(seed)
    count = table.shape[1]
    places = torch.randint(count, (2000, count), generator=generator)
    drawn = [work / _median(row[places]) for row in table]
    values = [float(work / _median(row[None])) for row in table]
    sides = [Quantity(value, quantiles(some)) for value, some in zip(values, drawn, strict=True)]
    if len(sides) == 1:
        return Measured(sides[0], examples=count)
    change = Quantity(values[0] - values[1], quantiles(drawn[0] - drawn[1]))
    ratio = Quantity(values[0] / values[1], quantiles(drawn[0] / drawn[1]))
    return Measured(sides[0], sides[1], change, ratio, examples=count)


def _median(times: torch.Tensor) -> torch.Tensor:
    return times.quantile(0.5, dim=1)
