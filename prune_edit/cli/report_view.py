"""What the terminal shows of a checkpoint: its parts in a table, and what is not known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prune_edit.cli import render
from prune_edit.report.measures import show
from prune_edit.report.words import VERDICTS, tally


def known(found: Mapping[str, Any]) -> None:
    """A line a part, then the notes."""
    render.rows(f"{found['name']}: {found['kind']}", ("part", "what"), list(_parts(found)))
    for note in found["notes"]:
        render.line(f"note: {note}")


def _parts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, origin = found["model"], found["provenance"]
    sizes = [
        f"{show(model[key], 'count')} {word}"
        for key, word in (("parameters", "parameters"), ("bytes", "bytes"))
        if model.get(key) is not None
    ]
    yield "model", ", ".join([str(model.get("model_type", "unknown")), *sizes])
    if origin.get("base_model"):
        form = f", {origin['format']}" if origin.get("format") else ""
        yield "origin", f"{origin['base_model']}{form}"
    if plan := found["plan"]:
        kept = (f"{plan[f'kept_{unit}']:,} of {plan[f'of_{unit}']:,} {unit}"
                for unit in ("heads", "neurons"))  # fmt: skip
        yield "plan", ", ".join(kept)
    if figures := found["evaluation"]:
        then, now = (figures[side]["accuracy"] for side in ("dense", "pruned"))
        yield "figures", f"{figures['task']}: {then:.1%} dense, {now:.1%} pruned"
    if edit := found["edit"]:
        yield "edit", f"{edit['concept']}: {len(edit['units'])} units changed"
    for gate in found["gates"]:
        yield "gate", f"{VERDICTS[gate['verdict']]}: {tally(gate)}"
    for frontier in found["frontiers"]:
        yield "frontier", f"{frontier['folder']}: {len(frontier['points'])} points"
    if found["explanations"]:
        yield "explained", ", ".join(each["of"] for each in found["explanations"])
    if found["pictures"]:
        yield "pictures", ", ".join(each["name"] for each in found["pictures"])
    if manifest := found["manifest"]:
        wrong = manifest["differences"]
        yield "manifest", "all files as it says" if manifest["ok"] else "; ".join(wrong)
