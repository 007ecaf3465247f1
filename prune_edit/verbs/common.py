"""What several verbs share: names to values, and a model into its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from prune_edit import __version__
from prune_edit.checkpoint.stock import stocks
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, PlanError, PruneEditError, TaskError
from prune_edit.layout import Kept
from prune_edit.lineage import block_of, descent
from prune_edit.planning import Plan
from prune_edit.recover.adapters import FOLDER, Adapter, weights_digest
from prune_edit.recover.tuning import ADAPTER
from prune_edit.recovery import Note
from prune_edit.scoring import (
    METHODS,
    Scores,
)
from prune_edit.scoring.cache import code_digest
from prune_edit.tasks import Task, combine, load_task
from prune_edit.tasks.combine import check_weight, parse_weighted, sources_of
from prune_edit.workspace import Workspace

FORMATS = ("ragged", "uniform", "masked")
RECOVERIES = ("auto", "none", "mean", "least-squares", "lora", "full")
TARGETS = ("answer", "predicted")


def pruning_method(score: str, adapted: bool = False) -> str:
    """What ranks the units: as asked for, else what did best where CNA and others were compared.

    Neurons by both sides (benchmarks/quality/selections.py); CNA where a LoRA `adapted` model is
    the contrast. Raises PruneEditError for a method that does not exist, naming the nearest.
    """
    if score == "auto":
        return "cna" if adapted else "circuit"
    check_method(score)
    return score


def check_method(method: str) -> None:
    """Raise PruneEditError for a method that does not exist, naming the nearest."""
    check_known("score", method, METHODS)


def check_known(what: str, value: str, known: Iterable[str]) -> None:
    """Raise PruneEditError for a value that is none of those known, naming the nearest."""
    import difflib

    if value not in (known := list(known)):
        near = difflib.get_close_matches(value, known, 1)
        raise PruneEditError(
            f"unknown {what} {value!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"known are {', '.join(known)}"
        )


def check_limit(limit: int | None) -> None:
    """Raise PruneEditError for a number of examples below one."""
    if limit is not None and limit < 1:
        raise PruneEditError(f"limit {limit} leaves no examples; give at least 1, or None")


def check_drop(max_drop: float) -> None:
    """Raise BudgetError for a drop that is no number of points."""
    if not 0 <= max_drop <= 100:
        raise BudgetError(f"max_drop {max_drop} is not between 0 and 100 points")


Tasks = str | Task | Sequence[str | Task]
"""A task by name or as it is, or several."""


def as_task(task: Tasks) -> Task:
    """A task given by name or as it is; several become one. Raises TaskError."""
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        return load_task(task)
    if not task:
        raise TaskError("no task is given; give at least one")
    return combine((as_task(each), 1.0) for each in task)


def task_of_origin(source: str) -> Task:
    """The task that scores or a plan were made for. Raises TaskError where it is not found."""
    try:
        sources = sources_of(source)
        if len(sources) == 1:
            return load_task(source)
        named = [parse_weighted(each) for each in sources]
        return combine(
            (load_task(name), 1.0 if weight is None else weight) for name, weight in named
        )
    except TaskError as error:
        raise TaskError(
            f"the task that was scored ({source or 'unnamed'}) is not to be found from here: "
            f"{error}; give it with --task"
        ) from None


def check_format(format: str, decoder: Decoder, recover: str) -> None:
    """Raise PlanError where a format cannot hold what the recovery adds, before any work is done.

    Compensation is a bias, which not every stock architecture has room for.
    """
    if format != "ragged" and recover != "none":
        biases = {"attention_output_bias": True, "ffn_output_bias": True}
        stocks({**decoder.model.config.to_dict(), **biases}, decoder.family)


def stages_beside(out: Path, decoder: Decoder, task: Task, how: Sequence[object]) -> Workspace:
    """Where a run keeps its finished stages: by everything that decides its result."""
    import torch
    import transformers

    return Workspace.beside(
        out,
        {
            "version": __version__,
            "libraries": [torch.__version__, transformers.__version__],
            "code": code_digest(),
            "model": decoder.digest or decoder.source,
            "task": task.digest,
            "how": [str(each) for each in how],
        },
    )


def retained_tasks(retain: Sequence[str | Task]) -> list[Task]:
    """The tasks to retain. Raises TaskError where two have one name, and so one row."""
    tasks = [as_task(name) for name in retain]
    for i, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:i]):
            raise TaskError(
                f"two retained tasks are named {task.name!r}, and figures are kept by name; rename "
                "one of the files, or leave one out"
            )
    return tasks


def retained_with_weights(
    retain: Sequence[str | Task | tuple[str | Task, float]],
) -> tuple[list[Task], list[float]]:
    """The tasks to retain, and how much each counts: `NAME=0.5`, or a pair; 0 without a weight.

    Raises TaskError, also for a weight below 0 or of no finite size.
    """
    named = [
        parse_weighted(each)
        if isinstance(each, str)
        else (each, 0.0)
        if isinstance(each, Task)
        else each
        for each in retain
    ]
    tasks = retained_tasks([task for task, _ in named])
    weights = [weight or 0.0 for _, weight in named]
    for task, weight in zip(tasks, weights, strict=True):
        check_weight(task.name, weight)
    return tasks, weights


def with_retained(task: Task, retained: Sequence[Task], weights: Sequence[float]) -> Task:
    """What scores, tuning and searches go by: the task, and those to retain that have a weight.

    The task itself where all weights are 0.
    """
    some = [(other, weight) for other, weight in zip(retained, weights, strict=True) if weight]
    return combine([(task, 1.0), *some])


def portable(source: str) -> str:
    """A task's source without this machine's folders, which a plan must not hold."""
    sources = sources_of(source)
    if len(sources) > 1:
        return json.dumps(
            [Path(each).name if Path(each).is_absolute() else each for each in sources]
        )
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


def made_plan(heads: Kept, neurons: Kept, scores: Scores, task: Task | None = None) -> Plan:
    """The Plan of these units, with what the scores say of their origin, for their task or this."""
    named = {key: scores.metadata.get(key, "") for key in ("task", "task_source", "task_digest")}
    if task is not None:
        named = {
            "task": task.name,
            "task_source": task.source or task.name,
            "task_digest": task.digest,
        }
    return Plan(
        heads=heads,
        neurons=neurons,
        n_heads=scores.heads.shape[1],
        n_neurons=scores.neurons.shape[1],
        method=scores.metadata.get("method", ""),
        task=named["task"],
        task_source=portable(named["task_source"]),
        task_digest=named["task_digest"],
        model_digest=scores.metadata.get("model_digest", ""),
        scores_digest=scores.digest,
        seed=int(scores.metadata.get("seed", "0")),
    )


def base_name(decoder: Decoder) -> str:
    """A name that is no path of this machine."""
    return name_of(decoder.source)


def name_of(source: str) -> str:
    """The same for a model that is not loaded."""
    from prune_edit.loading import REFERENCE_MODEL

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
        **descent(block_of(dense), base_name(dense), dense.digest, "pruned"),
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
        kv="duplicate" if plan.kv == "duplicate" else None,
    )
    if not source.is_dir():
        dense.tokenizer.save_pretrained(folder)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    verify(folder, small.model, probe(small))
    return provenance


def write_adapter(
    folder: Path, small: Decoder, format: str, recover: str, workspace: Workspace, note: Note
) -> dict[str, str]:
    """Put the adapter of the last LoRA beside the weights it is merged into; what to say of it.

    Notes why there is none.
    """
    if recover != "lora":
        return {}
    if format != "ragged":
        note("no adapter is kept: it has the shapes of --format ragged")
        return {}
    merged = weights_digest(small.model.state_dict())
    found = workspace.find_tensors(ADAPTER, "merged", merged)
    if found is None:
        note("no adapter is kept: units were removed after the last tuning")
        return {}
    tensors, about = found
    Adapter(tensors, about["config"], about["base"], merged).write(folder / FOLDER)
    return {"adapter": FOLDER, "adapter_base_digest": about["base"]}


def ignore(text: object) -> None:
    """The Note that shows nothing."""
