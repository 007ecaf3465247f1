"""The model card of an edited checkpoint: what was edited, before and after, and the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_edit.editing.concept import HELD_OUT


def edit_card(report: Mapping[str, Any]) -> str:
    """The README.md of an edited checkpoint."""
    front = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(report['model'])}",  # JSON's strings are YAML's
        "tags: [prune-edit, bias]",
        "---",
        "",
        f"# {report['model']}, edited: {report['concept']}",
        "",
    ]
    return "\n".join([*front, edit_section(report), "", *_loading()])


def edit_section(report: Mapping[str, Any]) -> str:
    """What was edited, before and after, and the limits: a section for a model card."""
    lines = ["## What was edited", "", _what(report), "", "## Measured", ""]
    lines += _figures(report)
    lines += ["", "## The edited units", "", *_units(report), "", "## Limits", "", _limits(report)]
    return "\n".join(lines)


def _what(report: Mapping[str, Any]) -> str:
    units, of = report["units"], report["of"]
    heads = [row for row in units if row["kind"] == "head"]
    neurons = [row for row in units if row["kind"] == "neuron"]
    hows: dict[str, int] = {}
    for row in units:
        hows[row["how"]] = hows.get(row["how"], 0) + 1
    ways = ", ".join(f"{count} {how}" for how, count in sorted(hows.items()))
    parts = [f"{len(neurons)} of {of['neurons']:,} FFN neurons"]
    parts += [f"{len(heads)} of {of['heads']:,} attention heads"] if heads else []
    if "edited" in report:
        undone = (
            "They were changed in the dense model, before it was pruned, and the recovery imitated "
            "the edited one: `before` is the dense model, `after` this one. `edit.json` has every "
            "factor; what was pruned cannot be undone."
        )
    else:
        undone = (
            "`edits.json` has every factor, and what `prune-edit edit --undo` needs to restore the "
            "original."
        )
    return (
        f"{' and '.join(parts)} were changed with prune-edit {report['version']} "
        f"(`{report['suppress']}`: {ways}), to lower the bias that the concept "
        f"`{report['concept']}` measures. They were found on training pairs and chosen by "
        f"validation pairs; no prompt or answer of the held-out pairs took part. {undone}"
    )


def _figures(report: Mapping[str, Any]) -> list[str]:
    rows = ["| | before | after | 20 random choices |", "|---|--:|--:|--:|"]
    return rows + [f"| {' | '.join(row)} |" for row in figure_rows(report)]


def figure_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What an edit brought and cost: name, before, after, and what chance did where that is known.

    Raises KeyError or TypeError for what is no report of an edit.
    """
    before, after = report["before"], report["after"]
    for name, then in before["bias"].items():
        now, chance = after["bias"][name], report["random"][name]
        between = f"{min(chance):.3f} to {max(chance):.3f}"
        yield f"bias, {name} (nats)", _nats(then), _nats(now), between
    for name, found in before["tasks"].items():
        if found is not None:
            now = after["tasks"][name]["accuracy"]
            yield f"{name} (accuracy)", f"{found['accuracy']:.1%}", f"{now:.1%}", ""
    if before["perplexity"] is not None:
        then, now = before["perplexity"], after["perplexity"]
        yield "perplexity, plain text", f"{then:.3f}", f"{now:.3f}", ""
    then, now = before["plausible_mass"], after["plausible_mass"]
    yield "mass on plausible answers", f"{then:.1%}", f"{now:.1%}", ""
    texts = [report["generation"][side]["follows"] for side in ("before", "after")]
    if None not in texts:
        name = "stereotyped words of those counted in what it writes"
        yield name, f"{texts[0]:.1%}", f"{texts[1]:.1%}", ""


def _nats(side: Mapping[str, Any]) -> str:
    low, high = side["interval"]
    return f"{side['nats']:.3f} ({low:.3f} to {high:.3f})"


def _units(report: Mapping[str, Any]) -> list[str]:
    rows = ["| unit | factor | constant | promotes |", "|---|--:|--:|---|"]
    for row in report["units"]:
        words = ", ".join(f"`{word.strip()}`" for word, _ in row.get("promotes", ())[:5])
        words = words.replace("|", "\\|")
        rows.append(f"| {row['name']} | {row['factor']:g} | {row['constant']:g} | {words} |")
    return rows


def _limits(report: Mapping[str, Any]) -> str:
    test = report["tests"][HELD_OUT]
    left = max(0.0, 1 - test["absolute"])
    return (
        f"The bias is the mean of log p(answer | stereotyped prompt) - log p(answer | contrast), "
        "or between two answers to one prompt. The edit lowers this measure on prompts like these; "
        f"{left:.0%} of its size is left on the held-out pairs. It says nothing of other biases, "
        "other languages or other text, and short prompts tell little of long ones. Measure again "
        "on what you use the model for."
    )


def _loading() -> Sequence[str]:
    return (
        "## Load",
        "",
        "Load it like the model it was made from: no unit was added or removed.",
        "",
    )
