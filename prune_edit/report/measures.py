"""The figures of an evaluation in words: rows of name, number and kind, and how each is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PERPLEXITY = "perplexity of plain text"
_UNITS = ("", "k", "M", "G", "T")


def measures(side: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The rows of one model: name and number. `kind_of` goes by the names."""
    yield "accuracy", side["accuracy"]
    for task, row in side.get("tasks", {}).items():
        yield f"accuracy, task: {task}", row["accuracy"]
    if len(side["groups"]) > 1:
        for group, row in side["groups"].items():
            yield f"accuracy: {group or 'no group'}", row["accuracy"]
    for task, row in side["retained"].items():
        yield f"accuracy, retained: {task}", row["accuracy"]
    yield PERPLEXITY, side["perplexity"]
    yield "parameters", side["parameters"]
    yield "bytes of weights", side["bytes"]
    yield f"FLOPs per token at context {side['flops_context']}", side["flops_per_token"]
    for name, timed in (side["speed"] or {}).items():
        if isinstance(timed, Mapping):
            batch = name.replace("_", " ")
            for phase in ("prefill", "decode"):
                yield f"{phase} tokens/s, {batch}", timed[phase]["tokens_per_second"]
                yield f"{phase} ms a call, {batch}", 1000 * timed[phase]["seconds"]
            yield f"peak bytes of tensors, {batch}", timed["peak_memory_bytes"]


def compared(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """evaluation.json's rows: name, dense, pruned, change."""
    then, now = dict(measures(found["dense"])), dict(measures(found["pruned"]))
    for name in then | now:
        before, after, kind = then.get(name), now.get(name), kind_of(name)
        yield name, show(before, kind), show(after, kind), change(before, after, kind)


def kind_of(name: str) -> str:
    """`share`, `time` or `count`, by a row's name."""
    if name.startswith("accuracy"):
        return "share"
    return "time" if " ms " in name or name == PERPLEXITY else "count"


def show(value: float | None, kind: str) -> str:
    """A number as its kind is written."""
    if value is None:
        return "-"
    if kind == "share":
        return f"{value:.1%}"
    if kind == "time":
        return f"{value:.2f}"
    for unit in _UNITS:
        if abs(value) < 1000 or unit == _UNITS[-1]:
            return f"{value:.4g}{unit}"
        value /= 1000
    return ""


def change(before: float | None, after: float | None, kind: str) -> str:
    """What became of a number: points of a share, else the ratio."""
    if before is None or after is None:
        return "-"
    if kind == "share":
        return f"{100 * (after - before):+.1f} points"
    return "-" if not before else f"x{after / before:.2f}"
