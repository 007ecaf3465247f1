"""The built-in tasks by name, and the one way from a name or file to a Task."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks import arithmetic, gender, jsonl, lm_eval, skills
from prune_edit.tasks.datasets import DATA_SETS, is_data_set, load_data_set
from prune_edit.tasks.task import Task

BUILT_IN: dict[str, Callable[[], Task]] = {
    "arithmetic": arithmetic.load,
    **{
        f"arithmetic/{operation}": partial(arithmetic.load, operation)
        for operation in arithmetic.OPERATIONS
    },
    "arithmetic/padded": arithmetic.load_padded,
    "facts": skills.facts,
    "copying": skills.copying,
    "order": skills.order,
    "succession": skills.succession,
    "factual-gender": gender.factual_gender,
}
RETAINED = ("facts", "copying", "order", "succession", "factual-gender")
"""What the reference model can do beside arithmetic."""


def name_of(text: str) -> str:
    """What the task of a name or file is called, without loading it."""
    if is_data_set(text):
        return text.partition(":")[0]
    if lm_eval.is_lm_eval(text):
        return Path(text.removeprefix(f"{lm_eval.PREFIX}:")).stem
    return text if text in BUILT_IN else Path(text).stem


def load_task(name: str) -> Task:
    """A built-in task, a data set's, lm-eval's, or that of a JSONL file. Raises TaskError."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if is_data_set(name) and not Path(name).is_file():
        return replace(load_data_set(name).task(), source=name)
    if lm_eval.is_lm_eval(name):
        return lm_eval.load(name)
    path = Path(name)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        return jsonl.load(path)
    near = difflib.get_close_matches(name, [*BUILT_IN, *DATA_SETS], 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise TaskError(
        f"unknown task {name!r}; {hint}built in are {', '.join(BUILT_IN)}, or give a .jsonl file, "
        "a data set as NAME:PATH, or lm-eval:TASK"
    )
