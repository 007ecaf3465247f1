"""Fit built-in arithmetic to a model: its vocabulary decides the wordings, its range the digits.

A user's task is taken as it is: there, an example that the model cannot read is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import compress

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.running import Running
from prune_edit.tasks import arithmetic
from prune_edit.tasks.combine import CombinedTask, combine
from prune_edit.tasks.prompts import can_write, encode_all, join, texts_ids
from prune_edit.tasks.task import Example, Task

_SAMPLE = 64
_IN_RANGE = 0.5  # of the three-digit answers, for three digits to join the task


def fit_task(
    task: Task, decoder: Decoder, options: Running, note: Callable[[str], None] | None = None
) -> Task:
    """The task as this model can take it, of several each. Raises TaskError where none is left."""
    if isinstance(task, CombinedTask):
        return combine(
            (fit_task(each, decoder, options, note), weight) for each, weight in task.parts
        )
    if not task.adapts:
        return task
    written = _writable(task.examples, decoder)
    operation = task.name.partition("/")[2] or None
    if not written:
        padded = arithmetic.load_padded()
        if operation not in (None, "add") or not _writable(padded.examples[:1], decoder):
            raise TaskError(
                f"task {task.name!r}: this model's vocabulary can write none of its wordings; give "
                "your own with --task FILE.jsonl"
            )
        if note is not None:
            note(f"this model's vocabulary is digits alone: the task is {padded.name}")
        return padded
    longer = arithmetic.load(operation, (3,)).examples
    if _answers(_every(longer, 4 * _SAMPLE), decoder, options) >= _IN_RANGE:
        written = (*written, *_writable(longer, decoder))
        if note is not None:
            note("three-digit operands are within this model's range and join the task")
    return task if written == task.examples else replace(task, examples=written)


def _every(examples: tuple[Example, ...], count: int) -> tuple[Example, ...]:
    """About `count` examples at even distances."""
    return examples[:: max(1, len(examples) // count)]


def _writable(examples: tuple[Example, ...], decoder: Decoder) -> tuple[Example, ...]:
    """The examples that the vocabulary has words for."""
    # Most models can write all or nothing; a sample over the whole task spares reading it.
    verdicts = set(_verdicts(_every(examples, 4 * _SAMPLE), decoder))
    if verdicts == {True}:
        return examples
    if verdicts == {False}:
        return ()
    return tuple(compress(examples, _verdicts(examples, decoder)))


def _verdicts(examples: tuple[Example, ...], decoder: Decoder) -> list[bool]:
    """Whether the vocabulary has words for each example, and the model positions."""
    tokenizer, most = decoder.tokenizer, decoder.max_positions
    texts = ["".join(join(example.prompt, example.answer)) for example in examples]
    return [
        (most is None or len(ids) - 1 <= most) and can_write(tokenizer, text, ids)
        for text, ids in zip(texts, texts_ids(tokenizer, texts), strict=True)
    ]


def _answers(examples: tuple[Example, ...], decoder: Decoder, options: Running) -> float:
    """The share of a few train examples that the model answers; 0 where it can write none."""
    written = tuple(compress(examples, _verdicts(examples, decoder)))
    if not written:
        return 0.0
    sample = Task("range", written).sample("train", _SAMPLE)
    rows = encode_all(decoder.tokenizer, sample, "range")
    return measure_accuracy(decoder, rows, options, "range").value
