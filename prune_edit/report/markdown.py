"""Markdown for a job summary or a merge request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_edit.report.words import asked, failures, outcome, side, state, subject, tally, title

_MARKS = {"passed": "✅", "blocked": "⛔", "warning": "⚠️", "info": "ℹ️", "unmeasured": "❔"}


def markdown(found: Mapping[str, Any]) -> str:
    """gate.json's content as Markdown: the verdict, a table of rules, what failed and on what."""
    lines = [f"## {_plain(title(found))}", "", f"{tally(found)}.", ""]
    lines += _table(found)
    for rule in found["rules"]:
        if rule["status"] == "passed" and not rule["notes"]:
            continue
        lines += ["", f"**{_plain(rule['name'])}** ({state(rule)})", ""]
        lines += [f"- {_plain(text)}" for text in (*failures(rule), *rule["notes"])]
        if rule["why"]:
            lines.append(f"- why this rule: {_plain(rule['why'])}")
        if rule["worst"]:
            lines += ["", "<details><summary>examples</summary>", ""]
            lines += ["| | example |", "|---|---|"]
            lines += [f"| {outcome(rule, e)} | {_plain(e['text'])} |" for e in rule["worst"]]
            lines += ["", "</details>"]
    if found["notes"]:
        lines += ["", *(f"- {_plain(note)}" for note in found["notes"])]
    lines += ["", *_foot(found)]
    return "\n".join(lines) + "\n"


def _table(found: Mapping[str, Any]) -> list[str]:
    based = found["base"] is not None
    heads = ["", "rule", "level", "model", *(["base", "change"] if based else []), "wanted"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for rule in found["rules"]:
        wanted = "; ".join(asked(check, rule) for check in rule["checks"]) or "-"
        name = rule["name"] if rule["name"].startswith(subject(rule)) else (
            f"{rule['name']}: {subject(rule)}"
        )  # fmt: skip
        cells = [_MARKS[state(rule)], _plain(name), rule["level"], side(rule, "model")]
        cells += [side(rule, "base"), side(rule, "change")] if based else []
        lines.append(f"| {' | '.join([*cells, wanted])} |")
    return lines


def _foot(found: Mapping[str, Any]) -> list[str]:
    made = found["environment"]
    said = ", ".join(
        f"{key} {made[key]}" for key in ("prune_edit", "torch", "device") if key in made
    )
    return [
        f"Rules: {_plain(found['rules_file'])}. Intervals are at 95 %, of a change paired on the "
        f"same examples; a bound is held against their worst side. {said}."
    ]


def _plain(text: str) -> str:
    """Text that Markdown and tables leave as it is."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
