"""Evaluation of one model, Comparison of two: frozen values with a JSON form."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import Accuracy, measure_accuracy, wilson
from prune_edit.evaluation.cost import (
    count_parameters,
    flops_per_token,
    weight_bytes,
)
from prune_edit.evaluation.perplexity import measure_perplexity
from prune_edit.evaluation.speed import measure_speed, measure_speed_pair
from prune_edit.running import Running
from prune_edit.samples import Samples
from prune_edit.tasks.task import Task

FLOPS_CONTEXT = 64
"""Tokens in sight at which `flops_per_token` is stated, where the model has as many positions."""


@dataclass(frozen=True)
class Evaluation:
    """What a model can do and what it costs. Accuracies are shares, 0 to 1, on the test split.

    `groups` maps a group to `accuracy`, `interval` and `examples`, `retained` a task to the same;
    intervals are Wilson's at 95 %. `perplexity` is None where the tokenizer cannot write the text,
    `bytes` where the weights are in no folder, `speed` where it was not measured. Where the task is
    several, `tasks` maps each to the same as `groups`, and `accuracy` is the mean of theirs.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    groups: Mapping[str, Mapping[str, Any]]
    retained: Mapping[str, Mapping[str, Any]]
    perplexity: float | None
    parameters: int
    bytes: int | None
    flops_per_token: int
    flops_context: int = FLOPS_CONTEXT
    speed: Mapping[str, Any] | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As evaluation.json holds it; `tasks` only where there are several."""
        found = {**asdict(self), "accuracy_interval": list(self.accuracy_interval)}
        if not self.tasks:
            del found["tasks"]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`."""
        low, high = values["accuracy_interval"]
        names = {entry.name for entry in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**{**known, "accuracy_interval": (low, high)})


@dataclass(frozen=True)
class Comparison:
    """A dense and a pruned model side by side; `extra` is what else evaluation.json should say."""

    task: str
    dense: Evaluation
    pruned: Evaluation
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As evaluation.json holds it: `task`, `dense`, `pruned`, then the extra keys."""
        return {
            "task": self.task,
            "dense": self.dense.to_dict(),
            "pruned": self.pruned.to_dict(),
            **self.extra,
        }

    def to_json(self) -> str:
        """`to_dict` as text with a final newline."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_dict`."""
        extra = {k: v for k, v in values.items() if k not in ("task", "dense", "pruned")}
        dense, pruned = (Evaluation.from_dict(values[side]) for side in ("dense", "pruned"))
        return cls(values["task"], dense, pruned, extra)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def evaluate_decoder(
    decoder: Decoder,
    task: Task,
    *,
    retain: Sequence[Task] = (),
    folder: Path | None = None,
    options: Running | None = None,
    limit: int | None = None,
    texts: Sequence[str] | None = None,
    speed: bool = False,
) -> Evaluation:
    """Measure a model on the test split of `task` and of the tasks it should retain.

    `folder` holds its weight files (without it `bytes` is None; `cost.weight_folder` finds it for a
    loaded model); at most `limit` examples a task. Raises TaskError.
    """
    options = options or Running()
    found = _accuracy(decoder, task, options, limit)
    context = min(FLOPS_CONTEXT, decoder.max_positions or FLOPS_CONTEXT)
    return Evaluation(
        accuracy=found.value,
        accuracy_interval=found.interval,
        groups={name: _row(hits, total) for name, (hits, total) in found.groups.items()},
        retained={
            other.name: _row(kept.hits, kept.total)
            for other in retain
            for kept in (_accuracy(decoder, other, options, limit),)
        },
        perplexity=measure_perplexity(decoder, texts, options),
        parameters=count_parameters(decoder),
        bytes=None if folder is None else weight_bytes(folder, decoder.model.dtype),
        flops_per_token=flops_per_token(decoder, context),
        flops_context=context,
        speed=measure_speed(decoder, progress=options.progress) if speed else None,
        tasks={name: _row(hits, total) for name, (_, hits, total) in found.parts.items()},
    )


def compare_decoders(
    task: Task,
    dense: Decoder,
    pruned: Decoder,
    *,
    retained: Sequence[Task] = (),
    dense_folder: Path | None = None,
    pruned_folder: Path | None = None,
    options: Running | None = None,
    limit: int | None = None,
    texts: Sequence[str] | None = None,
    speed: bool = True,
    seed: int = 0,
) -> Comparison:
    """Measure two models on the same examples, and their speed in turns. Raises TaskError.

    `extra` of the result holds `environment`: versions, machine, threads and `seed`.
    """
    options = options or Running()
    evaluations = [
        evaluate_decoder(
            decoder,
            task,
            retain=retained,
            folder=folder,
            options=options,
            limit=limit,
            texts=texts,
        )
        for decoder, folder in ((dense, dense_folder), (pruned, pruned_folder))
    ]
    if speed:
        pair = measure_speed_pair(dense, pruned, progress=options.progress)
        evaluations = [
            replace(evaluation, speed=timed)
            for evaluation, timed in zip(evaluations, pair, strict=True)
        ]
    first, second = evaluations
    return Comparison(task.name, first, second, {"environment": environment(pruned, seed)})


def environment(decoder: Decoder, seed: int) -> dict[str, Any]:
    """What the figures were measured with and on: versions, machine, threads, seed."""
    device = decoder.device
    return {
        "prune_edit": _version("prune-edit"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"


def _accuracy(decoder: Decoder, task: Task, options: Running, limit: int | None) -> Accuracy:
    prompts = Samples(task, decoder, limit).encoded("test", None)
    return measure_accuracy(decoder, prompts, options, f"accuracy on {task.name}")


def _row(hits: int, total: int) -> dict[str, Any]:
    return {
        "accuracy": hits / total,
        "interval": list(wilson(hits, total)),
        "examples": total,
    }
