"""Fit built-in arithmetic to a model: its vocabulary decides the wordings, its range the digits.

A user's task is taken as it is: there, an example that the model cannot read is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.scoring.streaming import Options
from prune_edit.tasks import arithmetic
from prune_edit.tasks.prompts import can_write, encode_all, join, text_ids
from prune_edit.tasks.task import Example, Task

_SAMPLE = 64
_IN_RANGE = 0.5  # of the three-digit answers, for three digits to join the task


def fit_task(
    task: Task, decoder: Decoder, options: Options, note: Callable[[str], None] | None = None
) -> Task:
    """The task as this model can take it. Raises TaskError where nothing of it is left."""
    if not task.adapts:
        return task
    written = _writable(task.examples, decoder)
    if not written:
        padded = arithmetic.load_padded()
        hint = (
            f"it can write --task {padded.name}"
            if _writable(padded.examples[:1], decoder)
            else "give your own with --task FILE.jsonl"
        )
        raise TaskError(
            f"task {task.name!r}: this model's vocabulary can write none of its wordings; {hint}"
        )
    operation = task.name.partition("/")[2] or None
    longer = _writable(arithmetic.load(operation, (3,)).examples, decoder)
    if longer and _answers(longer, decoder, options) >= _IN_RANGE:
        written = (*written, *longer)
        if note is not None:
            note("three-digit operands are within this model's range and join the task")
    return task if written == task.examples else replace(task, examples=written)


def _writable(examples: tuple[Example, ...], decoder: Decoder) -> tuple[Example, ...]:
    """The examples that the vocabulary has words for."""
    tokenizer = decoder.tokenizer

    def writable(example: Example) -> bool:
        text = "".join(join(example.prompt, example.answer))
        ids = text_ids(tokenizer, text)
        return can_write(tokenizer, text, ids) and (
            decoder.max_positions is None or len(ids) - 1 <= decoder.max_positions
        )

    # Most models can write all or nothing; a sample over the whole task spares reading it.
    sample = examples[:: max(1, len(examples) // (4 * _SAMPLE))]
    verdicts = {writable(example) for example in sample}
    if verdicts == {True}:
        return examples
    return () if verdicts == {False} else tuple(filter(writable, examples))


def _answers(examples: tuple[Example, ...], decoder: Decoder, options: Options) -> float:
    """The share of a few train examples that the model answers."""
    sample = Task("range", examples).sample("train", _SAMPLE)
    rows = encode_all(decoder.tokenizer, sample, "range")
    return measure_accuracy(decoder, rows, options, "range").value
