"""Several tasks as one: each keeps its splits, its share and, before its groups, its name.

A task's weight is its share in scores, calibration, tuning and searches, whatever its number of
examples: figures are means over the tasks, by weight, of what each has by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, zip_longest
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

from prune_edit.errors import TaskError
from prune_edit.tasks.task import Example, Task, even

if TYPE_CHECKING:
    from prune_edit.tasks.prompts import Encoded

Row = TypeVar("Row")
_SEEN_IN = {"train": ("validation", "test"), "validation": ("test",), "test": ()}
"""Where a prompt of another task must not come up again."""


@dataclass(frozen=True)
class CombinedTask(Task):
    """Tasks by name with a weight each, above 0. `examples` are those of all, groups renamed."""

    parts: tuple[tuple[Task, float], ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, weights and the parts' digests."""
        rows = [(task.name, weight, task.digest) for task, weight in self.parts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def split(self, name: str) -> tuple[Example, ...]:
        """The parts' splits, each in canonical order, the tasks in turn."""
        return self.sample(name, None)

    def sample(self, split: str, limit: int | None) -> tuple[Example, ...]:
        """At most `limit` examples of *each* task, as it samples them alone, the tasks in turn."""
        return tuple(in_turn([rows for _, _, rows in self.samples(split, limit)]))

    def samples(self, split: str, limit: int | None) -> list[tuple[str, float, list[Example]]]:
        """Name, weight and sample of every task.

        A prompt that another task tests by stays out of train and validation. Raises TaskError
        where that leaves a task without examples.
        """
        found = []
        for task, weight in self.parts:
            kept = self._rows(task, split)
            if not kept:
                raise TaskError(
                    f"task {task.name!r}: every {split} example is one that another task is tested "
                    "by; leave out one of them"
                )
            # Unlimited, the canonical order, in the task's own proportions.
            some = kept if limit is None else even(kept, limit)
            found.append((task.name, weight, [_renamed(each, task.name) for each in some]))
        return found

    def _rows(self, task: Task, split: str) -> list[Example]:
        held = {
            example.prompt
            for other, _ in self.parts
            if other is not task
            for later in _SEEN_IN.get(split, ())
            for example in other.split(later)
        }
        return [example for example in task.split(split) if example.prompt not in held]


def combine(parts: Iterable[tuple[Task, float]]) -> Task:
    """Tasks with their weights as one Task; in whatever order, the same.

    A single task is itself. Raises TaskError for two of one name, or a weight that is not above 0.
    """
    flat = [
        (task, weight * factor)
        for each, factor in parts
        for task, weight in (each.parts if isinstance(each, CombinedTask) else ((each, 1.0),))
    ]
    for task, weight in flat:
        check_weight(task.name, weight)
        if not weight:
            raise TaskError(f"task {task.name!r} has weight 0 and would take no part; leave it out")
    if len(flat) == 1:
        return flat[0][0]
    flat.sort(key=lambda part: part[0].name)
    for (one, _), (other, _) in pairwise(flat):
        if one.name == other.name:
            raise TaskError(
                f"two tasks are named {one.name!r}, and figures are kept by name; rename one of "
                "the files, or leave one out"
            )
    sources = [written(task.source or task.name, weight) for task, weight in flat]
    return CombinedTask(
        name="+".join(written(task.name, weight) for task, weight in flat),
        examples=tuple(_renamed(e, task.name) for task, _ in flat for e in task.examples),
        about=f"{len(flat)} tasks",
        source=json.dumps(sources),
        parts=tuple(flat),
    )


def _renamed(example: Example, name: str) -> Example:
    return replace(example, group=f"{name}: {example.group}" if example.group else name)


# Weights and sources as text


def parse_weighted(text: str) -> tuple[str, float | None]:
    """`facts=0.5` as name and weight; no weight where what follows the last `=` is no number.

    Raises TaskError for a weight below 0 or of no finite size.
    """
    name, sign, number = text.rpartition("=")
    try:
        weight = float(number) if sign else None
    except ValueError:
        weight = None
    if weight is None or not name:
        return text, None
    check_weight(name, weight)
    return name, weight


def check_weight(name: str, weight: float) -> None:
    """Raise TaskError for a weight below 0 or of no finite size."""
    if not (math.isfinite(weight) and weight >= 0):
        raise TaskError(
            f"task {name!r} has weight {weight:g}; give 0 (only measured) or a number above it, "
            "such as 0.5"
        )


def written(name: str, weight: float) -> str:
    """What `parse_weighted` reads as this name and weight; the name alone for weight 1."""
    try:
        plain = parse_weighted(name)[1] is None
    except TaskError:
        plain = False
    return name if weight == 1 and plain else f"{name}={weight!r}"


def sources_of(source: str) -> list[str]:
    """The sources of a task's parts, where it was combined; else its own."""
    try:
        found = json.loads(source)
    except ValueError:
        return [source]
    several = isinstance(found, list) and all(isinstance(each, str) for each in found)
    return found if several and len(found) > 1 else [source]


# Rows of several tasks


def in_turn(lists: Sequence[Sequence[Row]]) -> list[Row]:
    """One of each list after another, as long as each lasts."""
    missing = object()
    rounds = zip_longest(*lists, fillvalue=missing)
    return [row for some in rounds for row in some if row is not missing]  # type: ignore[misc]


def first(prompts: Sequence[Encoded], count: int) -> list[Encoded]:
    """The first `count` prompts of each task, in their order."""
    seen: dict[str, int] = {}
    found = []
    for row in prompts:
        seen[row.part] = seen.get(row.part, 0) + 1
        if seen[row.part] <= count:
            found.append(row)
    return found


def balanced(prompts: Sequence[Encoded], count: int) -> list[Encoded]:
    """At most `count` prompts of each task, as evenly over its groups as they go, in their order.

    By what `Task.sample` takes validation and test by.
    """
    chosen: set[int] = set()
    for _, _, rows in by_part(prompts):
        chosen.update(map(id, even(rows, count, attrgetter("example.group"))))
    return [row for row in prompts if id(row) in chosen]


def by_part(prompts: Sequence[Encoded]) -> list[tuple[str, float, list[Encoded]]]:
    """The prompts of each task, with its name and its share of all weight, by name.

    One part, without a name, for those of a single task.
    """
    found: dict[str, list[Encoded]] = {}
    for row in prompts:
        found.setdefault(row.part, []).append(row)
    total = sum(rows[0].weight for rows in found.values())
    return [(name, found[name][0].weight / total, found[name]) for name in sorted(found)]
