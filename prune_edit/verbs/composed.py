"""Editing as a part of `prune`: the dense model is edited first, the recovery imitates that one.

A pruned model has little room for an edit: what is left of it does more than one thing. The edited
model's weights, scores and outputs are what pruning starts from instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.store import replacing
from prune_edit.decoder import Decoder
from prune_edit.editing.asked import Asked
from prune_edit.editing.concept import HELD_OUT, Concept, load_concept
from prune_edit.editing.probe import probe_pairs
from prune_edit.editing.refuse import fitting
from prune_edit.editing.run import find_edit
from prune_edit.editing.said import said_task
from prune_edit.loading import load_decoder
from prune_edit.recovery import Note
from prune_edit.scoring import Options
from prune_edit.tasks import Task
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.common import base_name, ignore
from prune_edit.verbs.edited import (
    EDIT_TOKENS,
    check_asked,
    save_report,
    sides_report,
    write_edited,
)
from prune_edit.workspace import Workspace

SHARE = 0.5
"""How much what the model says of the concept counts in scores and recovery, beside the task."""


@dataclass
class Editing:
    """A concept to edit out before pruning; `report` is edit.json's content, in the end.

    Raises PruneEditError's branches for what makes no sense, before any model is loaded.
    """

    name: str
    reduce: str
    asked: Asked = field(init=False)
    concept: Concept = field(init=False)
    report: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.asked = Asked(self.name, self.reduce)
        check_asked(self.asked)
        self.concept = load_concept(self.name)

    def with_factual(
        self, retained: Sequence[Task], weights: Sequence[float]
    ) -> tuple[list[Task], list[float]]:
        """The tasks to retain and their weights: the concept's factual side takes part."""
        tasks, shares = list(retained), list(weights)
        if not self.concept.factual:
            return tasks, shares
        factual = factual_gender()
        names = [task.name for task in tasks]
        if factual.name not in names:
            return [*tasks, factual], [*shares, SHARE]
        at = names.index(factual.name)
        shares[at] = shares[at] or SHARE
        return tasks, shares

    def said(self, edited: Decoder, options: Options) -> Task:
        """What the edited model says after the concept's training prompts."""
        return said_task(edited, self.concept, options)

    def first(
        self,
        dense: Decoder,
        workspace: Workspace,
        tasks: Sequence[Task],
        options: Options,
        note: Note,
    ) -> Decoder:
        """The dense model, edited, as a checkpoint in the workspace; a finished one is found again.

        Raises EditError and TaskError as `edit` does, OutputWriteError.
        """
        name = re.sub(r"[^\w.-]+", "-", f"{Path(base_name(dense)).name}-edited-{self.concept.name}")
        place = workspace.place(name)
        if not place.is_dir():
            found = find_edit(dense, self.asked, self.concept, tasks, _small(options), note)
            with replacing(place) as folder:
                write_edited(folder, dense, found, tasks, _small(options))
        self.report = json.loads((place / "edit.json").read_text())
        dtype = str(dense.model.dtype).removeprefix("torch.")
        return load_decoder(place, device=str(dense.device), dtype=dtype)

    def show(
        self,
        folder: Path,
        dense: Decoder,
        pruned: Decoder,
        tasks: Sequence[Task],
        options: Options,
        note: Note,
    ) -> None:
        """Write what is left of the bias in the pruned model, beside the dense and the edited one.

        In edit.json, whose `after` is this model then, as the folder's is anywhere.
        """
        concept = fitting(dense, self.concept, self.asked.uneven, ignore)
        probes = {name: probe_pairs(dense, pairs) for name, pairs in concept.shown.items()}
        self.report["edited"] = self.report["after"]
        self.report |= sides_report((dense, pruned), concept, probes, tasks, _small(options))
        left = self.report["tests"][HELD_OUT]["absolute"]
        if left < self.asked.share:
            note(
                f"{left:.0%} of the bias on {HELD_OUT} is gone, and not {self.asked.share:.0%}: "
                "give a larger budget, or another --recover"
            )
        save_report(self.report, folder, note)

    def summary(self) -> dict[str, Any]:
        """For evaluation.json: bias of the dense, the edited, the edited and pruned model."""
        sides = {"dense": "before", "edited": "edited", "pruned": "after"}
        return {
            "concept": self.concept.name,
            "reduce": self.asked.share,
            "units": len(self.report["units"]),
            "bias": {name: self.report[key]["bias"] for name, key in sides.items()},
        }


def _small(options: Options) -> Options:
    return Options(seed=options.seed, progress=options.progress, batch_tokens=EDIT_TOKENS)
