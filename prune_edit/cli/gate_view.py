"""What the terminal shows of a verdict: a table, and with --explain the examples that failed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prune_edit.cli import render
from prune_edit.report.words import failures, outcome, side, state, tally, title


def verdict(found: Mapping[str, Any], explain: bool) -> None:
    """The rules, what failed in a line each, and the verdict last."""
    based = found["base"] is not None
    render.rows(
        f"rules: {found['rules_file']}",
        ("rule", "", "model", *(("base", "change") if based else ())),
        [_cells(rule, based) for rule in found["rules"]],
    )
    for rule in found["rules"]:
        for said in (*failures(rule), *(rule["notes"] if explain else ())):
            render.line(f"{state(rule)}: {said}")
        if explain:
            _explain(rule)
    if not explain and any(rule["worst"] for rule in found["rules"]):
        render.line("--explain shows the examples")
    render.line(f"{tally(found)}; {title(found)}")


def _cells(rule: Mapping[str, Any], based: bool) -> list[str]:
    cells = [rule["name"], state(rule), _short(side(rule, "model"))]
    if based:
        cells += [side(rule, "base").partition(" (")[0], side(rule, "change").partition(" (")[0]]
    return cells


def _short(text: str) -> str:
    """A unit said once: `98.4 % (96.1 to 99.6)`."""
    value, bracket, ends = text.partition(" (")
    return value + bracket + re.sub(r"(\d[kMGT]?)(?: %| points| nats|B|/s)", r"\1", ends)


def _explain(rule: Mapping[str, Any]) -> None:
    if rule["why"] and rule["status"] != "passed":
        render.line(f"  why: {rule['why']}")
    for each in rule["worst"]:
        group = f" ({each['group']})" if each["group"] else ""
        render.line(f"  {outcome(rule, each)}  {' '.join(each['text'].split())}{group}")
