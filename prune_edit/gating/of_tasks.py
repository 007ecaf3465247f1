"""Figures of tasks and concepts: accuracy by example, bias by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import units_of
from prune_edit.editing.concept import load_concept
from prune_edit.editing.probe import probe_pairs
from prune_edit.errors import TaskError
from prune_edit.evaluation.accuracy import correct
from prune_edit.evaluation.published import FIGURES
from prune_edit.evaluation.resampling import Rows, mean
from prune_edit.fitting import fit_task
from prune_edit.gating.bench import Bench, check_group, outcome
from prune_edit.gating.measured import Measured, from_rows
from prune_edit.gating.rules import Rule
from prune_edit.samples import TEST_EXAMPLES, Samples
from prune_edit.tasks import load_task
from prune_edit.tasks.datasets import is_data_set, load_data_set
from prune_edit.tasks.prompts import join
from prune_edit.tasks.task import Example, even

_FEW_UNITS = 8


def task_figure(bench: Bench, rule: Rule) -> Measured:
    """Accuracy on a task's test split. Raises TaskError for a group unknown or too small."""
    task = bench.once(
        ("task", rule.of), lambda: fit_task(load_task(rule.of), bench.reference, bench.options)
    )
    limit = TEST_EXAMPLES if bench.limit is None else bench.limit

    def right() -> list[tuple[Example, list[bool]]]:
        sides = []
        for decoder in bench.decoders:
            rows = Samples(task, decoder, limit).encoded("test", None)
            sides.append((rows, correct(decoder, rows, bench.options, f"accuracy on {task.name}")))
        examples = [row.example for row in sides[0][0]]
        verdicts = [list(each) for each in zip(*(found for _, found in sides), strict=True)]
        return list(zip(examples, verdicts, strict=True))

    found = bench.once(("right", rule.of), right)
    found = [pair for pair in found if not rule.group or pair[0].group == rule.group]
    check_group(rule, len(found), task.groups)
    clusters = [example.split_key for example, _ in found]
    rows = [
        Rows.of([(float(right[side]), 1.0) for _, right in found], mean, clusters, share=True)
        for side in range(len(bench.decoders))
    ]
    outcomes = [outcome(_shown(example), example.group, right) for example, right in found]
    measured = from_rows(rows, bench.options.seed, None, outcomes)
    chance = _mean(1 / len(e.choices) if e.choices else 0.0 for e, _ in found)
    return replace(measured, unable=_at_chance(measured, chance, rule.of))


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _shown(example: Example) -> str:
    prompt, answer = join(example.prompt, example.answer)
    return f"{prompt}[{answer}]"


def _pair(pair: Example) -> str:
    others = [choice for choice in pair.choices if choice != pair.answer]
    prompts = " / ".join(filter(None, (pair.prompt, pair.contrast)))
    return f"{prompts} [{', not'.join([pair.answer, *others])}]"


def _at_chance(found: Measured, chance: float, what: str) -> str:
    """Why nothing relative can be said, where the base does no better than chance."""
    side = found.base
    if side is None or (side.value > chance and side.interval[0] > chance):
        return ""
    return (
        f"the base cannot do {what}: {side.value:.1%} right, chance is {chance:.1%}; what it "
        "cannot do, a model cannot lose"
    )


def concept_figure(bench: Bench, rule: Rule) -> Measured:
    """The bias on a concept's held-out pairs, or on a data set's pairs. Raises TaskError."""
    if is_data_set(rule.of):
        data = load_data_set(rule.of)
        if not data.pairs:
            raise TaskError(
                f"{data.name} gives no contrast pairs; its own figures are "
                + ", ".join(FIGURES.get(data.name, {}))
            )
        pairs: Sequence[Example] = _sample(data.pairs, bench.limit)
    else:
        # Pairs that an edit was not made on.
        pairs = load_concept(rule.of).held_out
    groups = sorted({pair.group for pair in pairs})
    pairs = [pair for pair in pairs if not rule.group or pair.group == rule.group]
    check_group(rule, len(pairs), groups)
    gaps = [
        bench.once(("gaps", rule.of, rule.group, i), partial(pair_gaps, decoder, pairs))
        for i, decoder in enumerate(bench.decoders)
    ]
    units = units_of(pairs)
    # One profession's prompts are resampled together, where there are enough professions.
    clusters = units if len(set(units)) >= _FEW_UNITS else None
    rows = [Rows.of([(gap, 1.0) for gap in side], mean, clusters) for side in gaps]
    outcomes = [
        outcome(_pair(pair), pair.group, each)
        for pair, each in zip(pairs, zip(*gaps, strict=True), strict=True)
    ]
    return from_rows(rows, bench.options.seed, rule.kind.ideal, outcomes)


@torch.no_grad()
def pair_gaps(decoder: Decoder, pairs: Sequence[Example]) -> list[float]:
    """Every pair's bias in nats, whose mean is the concept's. Raises TaskError for no tokens."""
    return probe_pairs(decoder, pairs).gaps(decoder).tolist()


def _sample(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    if limit is None or len(examples) <= limit:
        return examples
    return even(sorted(examples, key=lambda example: example.rank), limit)
