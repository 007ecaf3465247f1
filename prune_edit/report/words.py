"""What every report says in the same words: figures with units, bounds, by how much they failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SIZES = ("", "k", "M", "G", "T")
_SYMBOLS = {
    "min": "at least",
    "max": "at most",
    "max_distance": "within",
    "max_drop": "a fall of at most",
    "max_rise": "a rise of at most",
    "min_ratio": "at least",
    "max_ratio": "at most",
    "min_reduction": "a reduction of at least",
}
VERDICTS = {
    "passed": "passed",
    "blocked": "blocked",
    "unmeasured": "could not be measured",
}


def number(value: float, unit: str) -> str:
    """A figure in its unit."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "nats":
        return f"{value:.3f} nats"
    if unit in ("perplexity", "correlation", "score"):
        return f"{value:.3f}"
    size = abs(value)
    for symbol in _SIZES:
        if size < 999.5 or symbol == _SIZES[-1]:
            plain = f"{value:.4g}{symbol}"
            return f"{plain}B" if unit == "bytes" else f"{plain}/s" if "/" in unit else plain
        size, value = size / 1000, value / 1000
    return ""


def change(value: float, unit: str, signed: bool = True) -> str:
    """A difference of two figures in their unit."""
    sign = "+" if signed and value >= 0 else ""
    if unit == "share":
        return f"{sign}{100 * value:.1f} points"
    return sign + number(value, unit)


def of_bound(bound: str, value: float, unit: str) -> str:
    """A number as the bound counts it."""
    if bound in ("min_ratio", "max_ratio"):
        return f"x{value:.3f}"
    if bound == "min_reduction":
        return f"{100 * value:.1f} %"
    if bound in ("max_drop", "max_rise"):
        return change(value, unit)
    return number(value, unit)


def asked(check: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """What a bound asks for: `a fall of at most 2.0 points`."""
    bound, limit, unit = check["bound"], check["limit"], rule["unit"]
    said = _SYMBOLS[bound]
    if bound in ("max_drop", "max_rise"):
        return f"{said} {change(limit, unit, signed=False)}"
    if bound == "max_distance":
        ideal = rule["ideal"] or 0.0
        return f"{said} {change(limit, unit, signed=False)} of {number(ideal, unit)}"
    if bound in ("min_ratio", "max_ratio"):
        return f"{said} {of_bound(bound, limit, unit)} of the base"
    return f"{said} {of_bound(bound, limit, unit)}"


def got(check: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """What was measured for a bound, with its interval."""
    bound, unit = check["bound"], rule["unit"]
    value = of_bound(bound, check["value"], unit)
    low, high = check["interval"]
    if low == high:
        return value
    ends = span(*(of_bound(bound, end, unit) for end in (low, high)))
    return f"{value} (95 %: {ends})"


def missed(check: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """By how much a bound was missed, and whether the value alone would have met it."""
    bound, unit = check["bound"], rule["unit"]
    short = -check["margin"]
    if bound in ("min_ratio", "max_ratio"):
        by = f"x{short:.3f}"
    elif bound == "min_reduction":
        by = f"{100 * short:.1f} points"
    else:
        by = change(short, unit, signed=False)
    said = f"the worst side, {of_bound(bound, check['worst'], unit)}, misses it by {by}"
    if check["value_meets"]:
        said += f"; the value itself meets it, but {rule['examples']} examples are too few to tell"
    return said


def failures(rule: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each bound that was missed, or for why nothing was measured."""
    if rule["error"]:
        yield rule["error"]
        return
    for check in rule["checks"]:
        if not check["met"]:
            wanted, found = asked(check, rule), got(check, rule)
            yield f"{subject(rule)}: {found}, wanted {wanted}; {missed(check, rule)}"


def subject(rule: Mapping[str, Any]) -> str:
    """The figure in words."""
    of = f" of {rule['of']}" if rule["of"] else ""
    return f"{rule['figure']}{of}" + (f", {rule['group']}" if rule["group"] else "")


def state(rule: Mapping[str, Any]) -> str:
    """`passed`, `blocked`, `warning`, `info` (missed, decides nothing) or `unmeasured`."""
    if rule["status"] != "failed":
        return str(rule["status"])
    return {"block": "blocked", "warn": "warning", "info": "info"}[rule["level"]]


def side(rule: Mapping[str, Any], name: str) -> str:
    """A model's figure with its interval, or a dash."""
    found = rule[name]
    if found is None:
        return "-"
    show = {"change": change, "model": number, "base": number}.get(name)
    low, high = found["interval"]
    if show is None:
        bound = "min_reduction" if name == "reduction" else "min_ratio"
        texts = [of_bound(bound, value, rule["unit"]) for value in (found["value"], low, high)]
    else:
        texts = [show(value, rule["unit"]) for value in (found["value"], low, high)]
    return texts[0] if low == high else f"{texts[0]} ({span(texts[1], texts[2])})"


def span(low: str, high: str) -> str:
    """`96.1 to 99.6 %`: a unit that both ends have is said once."""
    for unit in (" %", " points", " nats"):
        if low.endswith(unit) and high.endswith(unit):
            low = low.removesuffix(unit)
    return f"{low} to {high}"


def outcome(rule: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What an example brought, in the base and in the model."""
    unit = "nats" if rule["unit"] in ("nats", "perplexity", "correlation") else ""
    now, before = (
        "" if value is None else f"{value:.3f} {unit}" if unit else _verdict(rule, value)
        for value in (found["model"], found["base"])
    )
    return f"{before} -> {now}" if before else now


def _verdict(rule: Mapping[str, Any], value: float) -> str:
    """Right or wrong where the figure is an accuracy, else the number."""
    if rule["figure"].startswith(("accuracy", "factual")):
        return "right" if value else "wrong"
    return f"{value:g}"


def title(found: Mapping[str, Any]) -> str:
    """`release against dense: blocked`."""
    base = f" against {found['base']['name']}" if found["base"] else ""
    return f"{found['model']['name']}{base}: {VERDICTS[found['verdict']]}"


def tally(found: Mapping[str, Any]) -> str:
    """How many rules ended how: `3 passed, 1 blocked`."""
    counts: dict[str, int] = {}
    for rule in found["rules"]:
        counts[state(rule)] = counts.get(state(rule), 0) + 1
    order = ("blocked", "unmeasured", "warning", "info", "passed")
    return ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
