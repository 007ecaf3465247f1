"""The verdict: every bound against the worst side of its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_edit.errors import PruneEditError
from prune_edit.evaluation.resampling import Interval
from prune_edit.gating.bench import Bench
from prune_edit.gating.measure import measure
from prune_edit.gating.measured import Measured, Outcome, Quantity
from prune_edit.gating.rules import RELATIVE, Rule

SCHEMA = 1
SHOWN = 10  # examples of a rule that failed
PASSED, BLOCKED, UNMEASURED = "passed", "blocked", "unmeasured"
EXIT_CODES = {PASSED: 0, BLOCKED: 1, UNMEASURED: 2}
_DOWN = ("min", "max_drop", "min_ratio")


@dataclass(frozen=True)
class Check:
    """One bound: what it is of, the interval's worst side, and how far that is inside.

    `margin` is above or at 0 where the bound is met. `inside` says that the value itself meets it.
    """

    bound: str
    limit: float
    quantity: Quantity
    worst: float
    margin: float
    inside: bool

    @property
    def met(self) -> bool:
        """Whether the worst side meets the bound."""
        return self.margin >= 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bound": self.bound,
            "limit": self.limit,
            **self.quantity.to_dict(),
            "worst": self.worst,
            "margin": self.margin,
            "met": self.met,
            "value_meets": self.inside,
        }


@dataclass(frozen=True)
class Judged:
    """A rule with what was measured for it; `error` says why nothing was."""

    rule: Rule
    measured: Measured | None = None
    checks: tuple[Check, ...] = ()
    error: str = ""

    @property
    def status(self) -> str:
        """`passed`, `failed` or `unmeasured`."""
        if self.error:
            return UNMEASURED
        return PASSED if all(check.met for check in self.checks) else "failed"

    @property
    def examples(self) -> list[Outcome]:
        """The examples that speak most against a rule that failed, at most ten."""
        failed = [check for check in self.checks if not check.met]
        if not failed or self.measured is None:
            return []
        return worst_examples(self.measured, failed[0], self.rule.kind.ideal)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rule, found = self.rule, self.measured
        sides = ("model", "base", "change", "ratio", "reduction")
        return {
            "name": rule.name,
            "figure": rule.figure,
            "of": rule.of,
            "group": rule.group,
            "level": rule.level,
            "why": rule.why,
            "unit": rule.kind.unit,
            "ideal": rule.kind.ideal,
            "status": self.status,
            "error": self.error,
            "checks": [check.to_dict() for check in self.checks],
            **{side: _quantity(found, side) for side in sides},
            "examples": 0 if found is None else found.examples,
            "notes": [] if found is None else list(found.notes),
            "worst": [outcome.to_dict() for outcome in self.examples],
        }


def _quantity(found: Measured | None, side: str) -> dict[str, Any] | None:
    quantity: Quantity | None = None if found is None else getattr(found, side)
    return None if quantity is None else quantity.to_dict()


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a model; `environment` is what it was measured with."""

    model: dict[str, Any]
    base: dict[str, Any] | None
    rules: tuple[Judged, ...]
    source: str
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`blocked` where a rule of level block failed; `unmeasured` where one that matters was
        not measured; else `passed`. What is only info decides nothing.
        """
        if any(each.status == "failed" and each.rule.level == "block" for each in self.rules):
            return BLOCKED
        if any(each.status == UNMEASURED and each.rule.level != "info" for each in self.rules):
            return UNMEASURED
        return PASSED

    @property
    def exit_code(self) -> int:
        """0 passed, 1 blocked, 2 could not be measured."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """As gate.json holds it."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "model": self.model,
            "base": self.base,
            "rules_file": self.source,
            "rules": [each.to_dict() for each in self.rules],
            "notes": list(self.notes),
            "environment": self.environment,
        }


def judge(rules: Iterable[Rule], bench: Bench) -> tuple[Judged, ...]:
    """Measure and check every rule; one that cannot be measured does not keep others from it."""
    found = []
    for rule in rules:
        try:
            measured = measure(bench, rule)
            found.append(Judged(rule, measured, _checks(rule, measured)))
        except _UnableError as error:
            found.append(Judged(rule, error.measured, error=str(error)))
        except PruneEditError as error:
            found.append(Judged(rule, error=str(error)))
    return tuple(found)


class _UnableError(Exception):
    """A bound has nothing to be checked against; what was measured is kept."""

    def __init__(self, text: str, measured: Measured) -> None:
        super().__init__(text)
        self.measured = measured


def _checks(rule: Rule, measured: Measured) -> tuple[Check, ...]:
    checks = []
    for bound, limit in rule.bounds.items():
        if bound in RELATIVE and measured.unable:
            raise _UnableError(measured.unable, measured)
        quantity = _quantity_of(bound, measured)
        if quantity is None:
            said = "it is ideal already" if bound == "min_reduction" else "the base's figure is 0"
            raise _UnableError(f"{bound} of {rule.subject} says nothing: {said}", measured)
        if any(map(math.isnan, (quantity.value, *quantity.interval))):
            raise _UnableError(f"{rule.subject} has no value on these examples", measured)
        checks.append(check_bound(bound, limit, quantity, rule.kind.ideal))
    return tuple(checks)


def _quantity_of(bound: str, measured: Measured) -> Quantity | None:
    if bound in ("max_drop", "max_rise"):
        return measured.change
    if bound in ("min_ratio", "max_ratio"):
        return measured.ratio
    return measured.reduction if bound == "min_reduction" else measured.model


def check_bound(bound: str, limit: float, quantity: Quantity, ideal: float | None) -> Check:
    """One bound against a quantity: the margin is from the interval's worst side."""
    low, high = quantity.interval

    def margins(interval: Interval) -> tuple[float, float]:
        low, high = interval
        if bound in ("min", "min_ratio", "min_reduction"):
            return low - limit, low
        if bound == "max_drop":
            return low + limit, low
        if bound in ("max", "max_rise", "max_ratio"):
            return limit - high, high
        middle = ideal or 0.0  # max_distance
        worst = max(low, high, key=lambda end: abs(end - middle))
        return limit - abs(worst - middle), worst

    margin, worst = margins((low, high))
    inside = margins((quantity.value, quantity.value))[0] >= 0
    return Check(bound, limit, quantity, worst, margin, inside)


def worst_examples(found: Measured, check: Check, ideal: float | None) -> list[Outcome]:
    """Those that went the wrong way most: beside the base where there is one, else by themselves.

    Examples that speak for the rule are left out.
    """
    down = check.bound in _DOWN
    if check.bound in ("max_distance", "min_reduction"):
        down = found.model.value < (ideal or 0.0)
    sign = -1.0 if down else 1.0

    def badness(outcome: Outcome) -> float:
        # A bound on the figure itself is about what is wrong, not only about what got worse.
        beside = outcome.base if check.bound in RELATIVE and outcome.base is not None else None
        if beside is not None and check.bound != "min_reduction":
            return sign * (outcome.model - beside)
        return sign * (outcome.model - _neutral(found.outcomes, sign, ideal))

    ranked = sorted(enumerate(found.outcomes), key=lambda pair: (-badness(pair[1]), pair[0]))
    return [outcome for _, outcome in ranked if badness(outcome) > 0][:SHOWN]


def _neutral(outcomes: Sequence[Outcome], sign: float, ideal: float | None) -> float:
    """What speaks neither for nor against: the ideal, or the best there is."""
    if ideal is not None:
        return ideal
    values = [outcome.model for outcome in outcomes]
    return max(values) if sign < 0 else min(values)
