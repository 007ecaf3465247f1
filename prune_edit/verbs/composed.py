"""Editing as a part of `prune`: the pruned model is edited before anything is shown of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.editing.asked import Asked
from prune_edit.editing.concept import Concept, load_concept
from prune_edit.editing.measure import measure_side, plausible_texts
from prune_edit.editing.report import save
from prune_edit.editing.run import find_edit
from prune_edit.editing.said import said_task
from prune_edit.errors import EditError
from prune_edit.loading import load_decoder
from prune_edit.recovery import Note
from prune_edit.scoring import Options
from prune_edit.tasks import Task
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.edited import EDIT_TOKENS, check_asked, write_edited
from prune_edit.workspace import Workspace

SHARE = 0.5
"""How much what the model says of the concept counts in scores and recovery, beside the task."""


@dataclass
class Editing:
    """A concept to edit out of the pruned model; `report` is edit.json's content, in the end.

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

    def said(self, decoder: Decoder, options: Options) -> Task:
        """What the dense model says after the concept's training prompts."""
        return said_task(decoder, self.concept, options)

    def into(
        self,
        folder: Path,
        pruned: Path,
        dense: Decoder,
        tasks: Sequence[Task],
        options: Options,
        note: Note,
    ) -> None:
        """Edit the checkpoint `pruned` into `folder`, with the dense model's figures beside.

        Raises EditError and TaskError as `edit` does.
        """
        dtype = str(dense.model.dtype).removeprefix("torch.")
        decoder = load_decoder(pruned, device=str(dense.device), dtype=dtype)
        options = Options(seed=options.seed, progress=options.progress, batch_tokens=EDIT_TOKENS)
        try:
            found = find_edit(decoder, self.asked, self.concept, tasks, options, note)
        except EditError as error:
            raise EditError(f"the pruned model cannot be edited: {error}") from None
        self.report = write_edited(folder, decoder, found, tasks, options)
        plausible = plausible_texts(dense, found.concept)
        side = measure_side(dense, found.probes, plausible, tasks, options)
        self.report["dense"] = side.to_dict()
        save(self.report, folder)

    def summary(self) -> dict[str, Any]:
        """For evaluation.json: bias of the dense, the pruned, the pruned and edited model."""
        sides = {"dense": "dense", "pruned": "before", "edited": "after"}
        return {
            "concept": self.concept.name,
            "reduce": self.asked.share,
            "units": len(self.report["units"]),
            "bias": {name: self.report[key]["bias"] for name, key in sides.items()},
        }


def fresh(workspace: Workspace, name: str) -> Path:
    """An empty folder in a workspace, for a checkpoint on the way."""
    assert workspace.folder is not None
    folder = workspace.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
