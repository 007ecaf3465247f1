"""`edit.json`: an edit, what it did, chance beside it; and the card that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import Bias, paired_test
from prune_edit.editing.edit import Edit
from prune_edit.editing.measure import Side
from prune_edit.editing.probe import Probe
from prune_edit.scoring.projection import project

T = TypeVar("T")


def unit_rows(
    decoder: Decoder, edit: Edit, heads: torch.Tensor, neurons: torch.Tensor
) -> list[dict[str, Any]]:
    """The changed units with their scores; of neurons the tokens that they promote and push down.

    Strongest change of what the unit does first: by size of score times change of factor.
    """
    rows = []
    for change in edit.changes:
        scores = heads if change.kind == "head" else neurons
        row: dict[str, Any] = {
            "name": change.name,
            **vars(change),
            "score": float(scores[change.layer, change.unit]),
        }
        if change.kind == "neuron":
            slot = decoder.neuron_slots[change.layer].tolist().index(change.unit)
            value = decoder.residual_values(change.layer)[slot]
            row["promotes"] = [list(pair) for pair in project(decoder, value)]
            row["suppresses"] = [list(pair) for pair in project(decoder, -value)]
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["score"] * (1 - row["factor"])))


def tests(probes: Mapping[str, Probe], before: Side, after: Side) -> dict[str, dict[str, float]]:
    """By view, how much of the bias went, as a share, and the p-value of the paired test.

    `reduction` is of the mean, whichever sign is left; `absolute` of the mean absolute gap, which
    cannot be small by cancelling.
    """
    found = {}
    for name, probe in probes.items():
        then, now = before.views[name], after.views[name]
        changes = [abs(a) - abs(b) for a, b in zip(then.gaps, now.gaps, strict=True)]
        found[name] = {
            "reduction": 1 - abs(now.value) / max(abs(then.value), 1e-9),
            "absolute": 1 - now.size / max(then.size, 1e-9),
            "p": paired_test(probe.pairs, changes),
        }
    return found


def dumbbell(probe: Probe, before: Bias, after: Bias) -> list[dict[str, Any]]:
    """Mean gap of every answer before and after, largest first."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for pair, then, now in zip(probe.pairs, before.gaps, after.gaps, strict=True):
        who = pair.prompt if len({p.answer for p in probe.pairs}) <= 2 else pair.answer
        rows.setdefault((pair.group, who.strip()), []).append((then, now))
    found = [
        {
            "group": group,
            "answer": answer,
            "before": sum(a for a, _ in gaps) / len(gaps),
            "after": sum(b for _, b in gaps) / len(gaps),
        }
        for (group, answer), gaps in rows.items()
    ]
    return sorted(found, key=lambda row: -float(row["before"]))


def save(report: Mapping[str, Any], folder: Path) -> None:
    """Write `edit.json`."""
    (folder / "edit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


_SHOWN = "all the paper's pairs"


def all_of(views: Mapping[str, T]) -> T:
    """What belongs to the view with the most pairs: all the paper's, else the training pairs."""
    return views.get(_SHOWN, next(iter(views.values())))
