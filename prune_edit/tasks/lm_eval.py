"""Tasks of lm-evaluation-harness: `lm-eval:arithmetic_2da`, or `lm-eval:FILE.yaml`.

The optional extra `eval`. Its requests become Examples, so that such a task is scored, pruned for
and retained like any other: a choice among continuations, or an answer to be generated. Its own
metrics are `evaluation/harness.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.task import Example, Task

PREFIX = "lm-eval"


def is_lm_eval(text: str) -> bool:
    """Whether `text` names a task of lm-evaluation-harness."""
    return text.startswith(f"{PREFIX}:")


def load(text: str) -> Task:
    """The requests of its test documents as a Task. Raises TaskError.

    The harness has one set of documents for evaluation; ours are split by hash as any task's.
    """
    name, task, _ = harness_task(text)
    with quietly(name):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    kinds = {instance.request_type for instance in task.instances}
    if not kinds <= {"loglikelihood", "generate_until"} or len(kinds) != 1:
        raise TaskError(
            f"{PREFIX}:{name} asks for {', '.join(sorted(kinds)) or 'nothing'}, which has no right "
            "answer to score; name it in a rule of `prune-edit gate`, with one of its metrics"
        )
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    make = _choices if kinds == {"loglikelihood"} else _generation
    examples = [make(task, found) for found in by_document.values()]
    return Task(name, tuple(dict.fromkeys(examples)), f"lm-eval's {name}", source=text)


def _choices(task: Any, found: list[Any]) -> Example:
    """One document of a choice: the target's continuation is the answer."""
    context = found[0].args[0]
    answers = tuple(instance.args[1] for instance in found)
    target = task.doc_to_target(found[0].doc)
    if len(answers) == 1:  # what is asked is whether greedy decoding gives it
        return Example(context, answers[0])
    if isinstance(target, str):
        target = [answer.strip() for answer in answers].index(target.strip())
    if not isinstance(target, int) or any(i.args[0] != context for i in found):
        raise TaskError(
            f"{PREFIX}: document {found[0].doc_id} is no choice of one answer after one prompt; "
            "name the task in a rule of `prune-edit gate`, with one of its metrics"
        )
    return Example(context, answers[target], choices=tuple(dict.fromkeys(answers)))


def _generation(task: Any, found: list[Any]) -> Example:
    """One document of a generation: its target is what greedy decoding must give."""
    target = task.doc_to_target(found[0].doc)
    target = target[0] if isinstance(target, list) else target
    return Example(found[0].args[0], f"{task.config.target_delimiter or ''}{target}")


@lru_cache(maxsize=8)
def harness_task(text: str) -> tuple[str, Any, Any]:
    """The task's name, its object, and the TaskManager that knows it. Raises TaskError."""
    place = text.removeprefix(f"{PREFIX}:")
    if not place:
        raise TaskError(f"{text!r} names no task; give {PREFIX}:NAME or {PREFIX}:FILE.yaml")
    name, folder = place, None
    if place.endswith((".yaml", ".yml")):
        name, folder = _named_in(Path(place)), Path(place).parent
    with quietly(name):
        manager_of = _manager()
        manager = manager_of(
            include_path=None if folder is None else str(folder), include_defaults=folder is None
        )
        if name not in manager.all_tasks:
            raise TaskError(f"lm-eval knows no task {name!r}; `lm-eval ls tasks` lists its own")
        found = _flat(manager.load_task_or_group([name]))
    if len(found) != 1:
        raise TaskError(f"{PREFIX}:{name} is a group of {len(found)} tasks; give them one by one")
    return name, found[0], manager


def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise TaskError(
            f"{PREFIX} tasks need lm-evaluation-harness: pip install 'prune-edit[eval]'"
        ) from None
    return TaskManager


def _flat(tasks: Any) -> list[Any]:
    """The tasks of a dictionary that may hold groups."""
    found: list[Any] = []
    for value in tasks.values():
        found += _flat(value) if isinstance(value, dict) else [value]
    return found


def _named_in(path: Path) -> str:
    import yaml

    # Read for its name alone: functions that the file names are left as text, and not run.
    reader: Any = type("Reader", (yaml.SafeLoader,), {})
    reader.add_constructor("!function", lambda loader, node: str(node.value))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=reader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise TaskError(f"lm-eval task file {path} cannot be read: {said}") from None
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise TaskError(f"{path} names no task; an lm-eval file has `task: NAME`")
    return name


@contextlib.contextmanager
def quietly(name: str) -> Iterator[None]:
    """Without the libraries' bars and messages; what they raise becomes a TaskError."""
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    before = {key: os.environ.get(key) for key in quiet}
    os.environ.update(quiet)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except TaskError:
        raise
    except Exception as error:  # lm-eval, datasets and the hub each raise their own
        said = " ".join(str(error).split())[:300]
        raise TaskError(
            f"lm-eval task {name!r} cannot be loaded: {type(error).__name__}: {said}"
        ) from None
    finally:
        logging.disable(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
