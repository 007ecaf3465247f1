"""What several verbs share: names to values, and a model into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prune_edit import __version__
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError, PruneEditError
from prune_edit.planning import Kept, Plan
from prune_edit.scoring import (
    METHODS,
    Scores,
)
from prune_edit.tasks import Task, load_task

FORMATS = ("ragged", "masked")
RECOVERIES = ("auto", "none", "mean", "lora")


def check_method(method: str) -> None:
    """Raise PruneEditError for a method that does not exist, naming the nearest."""
    import difflib

    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        raise PruneEditError(
            f"unknown score {method!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"known are {', '.join(METHODS)}"
        )


def as_task(task: str | Task) -> Task:
    """A task given by name or as it is."""
    return task if isinstance(task, Task) else load_task(task)


def portable(source: str) -> str:
    """A task's source without this machine's folders, which a plan must not hold."""
    return Path(source).name if Path(source).is_absolute() else source


def check_task(task: Task, digest: str, chosen: bool) -> None:
    """Raise PlanError where a task found by name is another than the one that was scored."""
    if digest and not chosen and task.digest != digest:
        raise PlanError(
            f"task {task.name!r} is not the one that was scored; give that one with --task"
        )


def present(scores: torch.Tensor) -> int:
    """How many units the scored model has."""
    return int((~scores.isnan()).sum())


def made_plan(heads: Kept, neurons: Kept, scores: Scores) -> Plan:
    """The Plan of these units, with what the scores say of their origin."""
    return Plan(
        heads=heads,
        neurons=neurons,
        n_heads=scores.heads.shape[1],
        n_neurons=scores.neurons.shape[1],
        method=scores.metadata.get("method", ""),
        task=scores.metadata.get("task", ""),
        task_source=portable(scores.metadata.get("task_source", "")),
        task_digest=scores.metadata.get("task_digest", ""),
        model_digest=scores.metadata.get("model_digest", ""),
        scores_digest=scores.digest,
        seed=int(scores.metadata.get("seed", "0")),
    )


def base_name(decoder: Decoder) -> str:
    """A name that is no path of this machine."""
    from prune_edit.loading import REFERENCE_MODEL

    source = decoder.source
    if source == str(REFERENCE_MODEL):
        return "prune-edit/reference-model"
    return Path(source).name if Path(source).is_dir() else source


def probe(decoder: Decoder) -> torch.Tensor:
    """A few ids to verify with: arbitrary, but the same every time, (2, T)."""
    length = min(8, decoder.max_positions or 8)
    ids = torch.arange(2 * length).view(2, length) * 7 + 3
    return ids % decoder.unembedding.shape[0]


def write(
    folder: Path, small: Decoder, dense: Decoder, plan: Plan, format: str, recover: str
) -> dict[str, Any]:
    """Write, verify by reading back, and return where the checkpoint comes from."""
    provenance = {
        "tool_version": __version__,
        "base_model": base_name(dense),
        "base_digest": dense.digest,
        "task": plan.task,
        "method": plan.method,
        "recover": recover,
        "format": format,
        "plan_digest": plan.digest,
    }
    source = Path(dense.source)
    write_checkpoint(
        folder,
        format,
        small.family,
        small.model.config.to_dict(),
        {name: tensor.cpu() for name, tensor in small.model.state_dict().items()},
        small.layout,
        source_folder=source if source.is_dir() else None,
        provenance=provenance,
    )
    if not source.is_dir():
        dense.tokenizer.save_pretrained(folder)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    verify(folder, small.model, probe(small))
    return provenance


def ignore(text: object) -> None:
    """The Note that shows nothing."""
