"""Rules: what a file says of figures, checked before any model is loaded.

A bound speaks of the figure itself (`min`, `max`, `max_distance`), or of the model beside its base
(`max_drop`, `max_rise`, `min_ratio`, `max_ratio`, `min_reduction`).
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_edit.errors import GateError
from prune_edit.gating.known import FACTUAL_TASK, Kind, kind_of

LEVELS = ("block", "warn", "info")
ABSOLUTE = ("min", "max", "max_distance")
RELATIVE = ("max_drop", "max_rise", "min_ratio", "max_ratio", "min_reduction")
BOUNDS = ABSOLUTE + RELATIVE
_KEYS = ("name", "figure", "of", "group", "level", "why", *BOUNDS)
_SETTINGS = ("seed", "limit")
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "K": 10**3, "M": 10**6, "G": 10**9}  # fmt: skip
_NUMBER = re.compile(r"\s*([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*([A-Za-z%]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One rule: bounds on a figure of a task, a concept or a data set.

    `kind` tells unit and ideal. `bounds` are in the figure's unit: shares 0 to 1, nats, bytes.
    """

    name: str
    figure: str
    of: str
    kind: Kind
    level: str
    bounds: Mapping[str, float]
    group: str = ""
    why: str = ""

    @property
    def relative(self) -> bool:
        """Whether it needs a base."""
        return any(bound in RELATIVE for bound in self.bounds)

    @property
    def subject(self) -> str:
        """The figure in words: `accuracy of arithmetic, add`."""
        of = f" of {self.of}" if self.of else ""
        return f"{self.figure}{of}" + (f", {self.group}" if self.group else "")


@dataclass(frozen=True)
class Rules:
    """The rules of a file, and how to measure for them."""

    rules: tuple[Rule, ...]
    seed: int = 0
    limit: int | None = None
    source: str = ""
    notes: tuple[str, ...] = field(default=())


def load_rules(path: str | Path) -> Rules:
    """The rules in a TOML file. Raises GateError naming the rule, the key and what was meant."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"rules {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise GateError(f"rules {path} are not TOML: {error}") from None
    return parse_rules(content, path.name)


def parse_rules(content: Mapping[str, Any], source: str = "rules") -> Rules:
    """The rules of a file's content: tables `[gate]` and `[[rule]]`. Raises GateError."""
    _check_keys(content, ("gate", "rule"), source)
    settings = content.get("gate", {})
    if not isinstance(settings, dict):
        raise GateError(f"{source}: [gate] must be a table")
    _check_keys(settings, _SETTINGS, f"{source} [gate]")
    for name in settings:
        least = 1 if name == "limit" else 0
        if not _is_whole(settings[name]) or settings[name] < least:
            raise GateError(f"{source} [gate]: {name} must be a whole number of at least {least}")
    entries = content.get("rule", [])
    if not isinstance(entries, list) or not entries:
        raise GateError(
            f"{source} has no rules; give at least one [[rule]] with figure and a bound"
        )
    rules = tuple(_rule(entry, number, source) for number, entry in enumerate(entries, 1))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise GateError(
                f"{source}: two rules are named {name!r}, and results are kept by name; name them "
                "apart"
            )
    check_contradictions(rules, source)
    return Rules(rules, settings.get("seed", 0), settings.get("limit"), source)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(given: Iterable[str], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise GateError(f"{where}: unknown key {key!r}; {hint}")


def _rule(entry: Any, number: int, source: str) -> Rule:
    where = f"{source} rule {number}"
    if not isinstance(entry, dict):
        raise GateError(f"{where}: must be a table, [[rule]]")
    _check_keys(entry, _KEYS, where)
    for key in ("name", "figure", "of", "group", "level", "why"):
        if not isinstance(entry.get(key, ""), str):
            raise GateError(f"{where}: {key} must be text")
    figure = entry.get("figure", "")
    if not figure:
        raise GateError(f'{where} names no figure; give one, such as figure = "accuracy"')
    of = entry.get("of", "")
    kind = kind_of(figure, of, where)
    if figure == "factual" and not of:
        of = FACTUAL_TASK
    level = entry.get("level", "block")
    if level not in LEVELS:
        near = difflib.get_close_matches(level, LEVELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(LEVELS)}"
        raise GateError(f"{where}: unknown level {level!r}; {hint}")
    if entry.get("group") and not kind.grouped:
        raise GateError(f"{where}: {figure} has no groups; leave out group")
    bounds = {
        bound: _number(entry[bound], bound, kind, f"{where}: {bound}")
        for bound in BOUNDS
        if bound in entry
    }
    if not bounds and level != "info":
        raise GateError(
            f'{where}: no bound; give one of {", ".join(BOUNDS)}, or level = "info" to report only'
        )
    rule = Rule(entry.get("name", ""), figure, of, kind, level, bounds,
                entry.get("group", ""), entry.get("why", ""))  # fmt: skip
    if rule.name:
        return rule
    return Rule(" ".join((rule.subject, *sorted(bounds))), *list(vars(rule).values())[1:])


def _number(value: Any, bound: str, kind: Kind, where: str) -> float:
    """A bound as a number in its unit. Raises GateError for another unit or no finite size."""
    if bound == "max_distance" and kind.ideal is None:
        raise GateError(
            f"{where}: this figure has no ideal value to be distant from; give min or max"
        )
    if bound == "min_reduction" and kind.ideal is None:
        raise GateError(f"{where}: only a bias is reduced; give max_drop or min_ratio")
    number, unit = _split(value, where)
    ratio = bound in ("min_ratio", "max_ratio", "min_reduction")
    if unit == "%":
        if not ratio and kind.unit != "share":
            raise GateError(f"{where}: {value!r} is a share, and the figure is in {kind.unit}")
        number /= 100
    elif unit in ("point", "points"):
        if kind.unit != "share" or bound in ("min", "max") or ratio:
            raise GateError(f"{where}: points are of a change of shares; give a plain number")
        number /= 100
    elif unit == "nats" and kind.unit == "nats":
        pass
    elif unit and kind.unit in ("bytes", "count") and not ratio:
        if unit.upper() not in _SIZES:
            raise GateError(f"{where}: unit {unit!r} is unknown; give a number, 4MB or 4MiB")
        number *= _SIZES[unit.upper()]
    elif unit:
        raise GateError(f"{where}: unit {unit!r} does not fit a figure in {kind.unit}")
    elif kind.unit == "share" and not ratio and not -1 <= number <= 1:
        percent = bound in ("min", "max")
        raise GateError(
            f"{where}: {value} is no share; shares are 0 to 1: write "
            + (f'"{number:g}%"' if percent else f'"{number:g} points"')
        )
    if bound in ("max_distance", "max_drop", "max_rise", "min_ratio", "max_ratio") and number < 0:
        raise GateError(f"{where}: {value} is below 0, and how much may change is not")
    if bound == "min_reduction" and not 0 <= number <= 1:
        raise GateError(f'{where}: {value} is no share; give one such as "50%"')
    return number


def _split(value: Any, where: str) -> tuple[float, str]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    elif isinstance(value, str) and (found := _NUMBER.fullmatch(value)):
        number, unit = float(found[1]), found[2]
    else:
        raise GateError(f'{where}: {value!r} is no number; give one, such as 0.95 or "95%"')
    if not math.isfinite(number):
        raise GateError(f"{where}: {value} is of no finite size")
    return number, unit


# Rules that no model can meet


def check_contradictions(rules: Iterable[Rule], source: str) -> None:
    """Raise GateError for two bounds of one figure that exclude each other, in whatever rules."""
    limits: dict[tuple[str, ...], tuple[float, str]] = {}
    for rule in rules:
        for bound, limit in rule.bounds.items():
            for scale, low, high in _spans(bound, limit, rule.kind):
                key = (rule.figure, rule.of, rule.group, scale)
                for side, end in (("low", low), ("high", high)):
                    if end is None:
                        continue
                    other = limits.get((*key, "high" if side == "low" else "low"))
                    if other and (end > other[0] if side == "low" else end < other[0]):
                        raise GateError(
                            f"{source}: no model can meet both {bound} of rule {rule.name!r} and "
                            f"{other[1]}; change one of them"
                        )
                    said = f"{bound} of rule {rule.name!r}"
                    kept = limits.get((*key, side))
                    tighter = kept is None or (end > kept[0] if side == "low" else end < kept[0])
                    if tighter:
                        limits[*key, side] = end, said


def _spans(bound: str, limit: float, kind: Kind) -> list[tuple[str, float | None, float | None]]:
    """What a bound asks for, as a span on its scale: lowest and highest."""
    if bound == "min":
        return [("value", limit, None)]
    if bound == "max":
        return [("value", None, limit)]
    if bound == "max_distance":
        ideal = kind.ideal or 0.0
        return [("value", ideal - limit, ideal + limit)]
    if bound == "max_drop":
        return [("change", -limit, None)]
    if bound == "max_rise":
        return [("change", None, limit)]
    # Of a figure that is never below 0, a ratio of at least 1 is no drop, and one below 1 no rise.
    positive = kind.unit not in ("nats", "correlation", "score")
    if bound == "min_ratio":
        return [
            ("ratio", limit, None),
            *([("change", 0.0, None)] if limit >= 1 and positive else []),
        ]
    if bound == "max_ratio":
        return [
            ("ratio", None, limit),
            *([("change", None, 0.0)] if limit <= 1 and positive else []),
        ]
    return []
