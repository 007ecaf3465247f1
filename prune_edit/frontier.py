"""Frontier: what a model keeps of a task at a grid of budgets, one walk down for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.planning import keep_neurons
from prune_edit.recovery import Recovery
from prune_edit.scoring import METHODS, predicted_targets
from prune_edit.scoring.combine import weighted
from prune_edit.scoring.shards import Part
from prune_edit.tasks.prompts import Encoded

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One model of the frontier: accuracies are shares, of the test and of the validation split.

    `speed` is how many times faster than the dense model, by phase and batch; `random` the test
    accuracies of random units with the same budget and recovery; `plan` a file of the frontier's
    folder. `tasks` has the test accuracy of each of several tasks, `retained` that of the tasks
    beside them.
    """

    heads: int
    neurons: int
    accuracy: float
    interval: tuple[float, float]
    validation: float
    parameters: int
    flops_per_token: int
    speed: dict[str, float] | None = None
    random: tuple[float, ...] = ()
    plan: str = ""
    tasks: dict[str, float] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `tasks` and `retained` only where there are some."""
        found = asdict(self)
        for name in ("tasks", "retained"):
            if not found[name]:
                del found[name]
        return found


@dataclass(frozen=True)
class Frontier:
    """The dense model and the points below it, largest first."""

    model: str
    task: str
    method: str
    recover: str
    dense: Point
    points: tuple[Point, ...]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def knee(self) -> Point:
        """The point farthest above the line from the dense model to the smallest one.

        By validation accuracy against parameters, both from 0 at the smallest to 1 at the dense.
        """
        everything = (self.dense, *self.points)
        return everything[knee_of([(point.parameters, point.validation) for point in everything])]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "schema": SCHEMA_VERSION,
            **asdict(self),
            "dense": self.dense.to_dict(),
            "points": tuple(point.to_dict() for point in self.points),
            "knee": self.knee.to_dict(),
        }

    def to_json(self) -> str:
        """As JSON, a final newline."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def knee_of(points: Sequence[tuple[int, float]]) -> int:
    """Which of the points (size, kept) is farthest above the line from the largest to the smallest.

    Both from 0 at the least to 1 at the most; of equals the one that keeps more, then the smaller.
    """
    sizes, kept = [size for size, _ in points], [each for _, each in points]
    width = max(sizes) - min(sizes) or 1
    height = max(kept) - min(kept) or 1.0

    def above(size: int, each: float) -> float:
        return (each - min(kept)) / height - (size - min(sizes)) / width

    return max(
        range(len(points)),
        key=lambda i: (round(above(*points[i]), 9), kept[i], -sizes[i], -i),
    )


def walk(
    recovery: Recovery, heads: Sequence[int], neurons: Sequence[int]
) -> Iterator[tuple[int, int, Decoder]]:
    """The models of a grid of budgets, heads descending: how many of each, and the model.

    Where units go in rounds, each number of heads starts from the rounds of the one before, and its
    numbers of neurons from the model with all of them.
    """
    current, rounds, number = recovery.dense, recovery.in_rounds(), 0
    every = current.layout.neurons
    total = sum(map(len, every))
    if not recovery.rounds:  # as one step of `prune` ranks them
        ranked = any(few < total for few in neurons)  # by intervention they take very long
        options = replace(recovery.options, neurons=ranked)
        dense_scores, dense_neurons = _scores(replace(recovery, options=options), current)
    for count in sorted(set(heads), reverse=True):
        have = sum(map(len, current.layout.heads))
        name = f"heads-{count}"
        if not recovery.rounds:
            chosen = recovery.rules.heads(dense_scores, count)
            for few in sorted(set(neurons), reverse=True):
                kept = keep_neurons(dense_neurons, few) if few < total else every
                yield count, few, recovery.once(chosen, kept, f"{name}-neurons-{few}")
            continue
        way = rounds.schedule.counts(have, count) if count < have else []
        for wanted in way:
            number += 1
            current = rounds.step(current, wanted, None, f"{name}-{wanted}", number)
        whole = recovery.workspace.load_model(name, current)
        if whole is None:
            final = rounds.schedule.final_tuning
            whole = rounds.recover(current, final, name, number) if way else current
            recovery.workspace.save_model(name, whole)
        ranks = None
        for few in sorted(set(neurons), reverse=True):
            if few == total:
                yield count, few, whole
                continue
            if ranks is None:
                ranks = _scores(recovery, whole)[1]
            kept = keep_neurons(ranks, few)
            yield count, few, recovery.with_neurons(whole, kept, f"{name}-neurons-{few}")


def _scores(recovery: Recovery, decoder: Decoder) -> Part:
    """What the model's heads (L, H) and neurons (L, N) are worth now."""
    method = METHODS[recovery.method]
    return weighted(
        lambda rows: method(decoder, rows, recovery.options), _scored(recovery, decoder)
    )


def _scored(recovery: Recovery, decoder: Decoder) -> list[Encoded]:
    if recovery.target == "predicted":
        return predicted_targets(decoder, recovery.scoring, recovery.options)
    return recovery.scoring
