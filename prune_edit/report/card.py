"""The gate's section in a model card: what was measured, against what, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prune_edit.report.words import VERDICTS, asked, side, state, subject

_START, _END = "<!-- prune-edit gate -->", "<!-- /prune-edit gate -->"


def with_section(card: str, found: Mapping[str, Any]) -> str:
    """The card with this verdict's section, in the place of an earlier one's."""
    section = f"{_START}\n{gate_section(found)}{_END}"
    block = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if block.search(card):
        return block.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n" if card.strip() else f"{section}\n"


def gate_section(found: Mapping[str, Any]) -> str:
    """Every rule with what was measured; no timings, which hold for one machine."""
    base = f" against {found['base']['name']}" if found["base"] else ""
    lines = [
        f"## Gate: {VERDICTS[found['verdict']]}",
        "",
        f"Measured{base} by the rules in `{found['rules_file']}`.",
        "",
        "| rule | level | model | base | wanted | |",
        "|---|---|---|---|---|---|",
    ]
    for rule in found["rules"]:
        if rule["unit"] == "tokens/s":
            continue
        wanted = "; ".join(asked(check, rule) for check in rule["checks"]) or "-"
        cells = (subject(rule), rule["level"], side(rule, "model"), side(rule, "base"), wanted,
                 state(rule))  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "Intervals are at 95 %. The figures hold for these tests and texts alone: they say nothing "
        "of other groups, other wordings or other languages, and a rule that is met does not mean "
        "that a bias is gone.",
        "",
    ]
    return "\n".join(lines)
