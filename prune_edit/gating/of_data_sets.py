"""Figures of published tests, as their authors define them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prune_edit.evaluation.published import FIGURES, Published, measure_items, with_examples
from prune_edit.gating.bench import Bench, check_group, outcome
from prune_edit.gating.measured import Measured, Outcome, from_rows
from prune_edit.gating.rules import Rule
from prune_edit.tasks.datasets import DataSet, Item, load_data_set
from prune_edit.tasks.prompts import join
from prune_edit.tasks.task import fraction_of

_CHANCE_FIGURES = ("gap", "accuracy", "accuracy-pro", "accuracy-anti")


def data_set_figure(bench: Bench, rule: Rule) -> Measured:
    """A published figure of a test, texts outside the vocabulary left out. Raises TaskError."""
    data = load_data_set(rule.of)
    figure = FIGURES[data.name][rule.figure]
    items, skipped = bench.once(("items", rule.of), lambda: with_examples(data, bench.decoders))
    groups = sorted({item.group for item in items})
    used = [item for item in items if figure.uses(item)]
    used = [item for item in used if not rule.group or item.group == rule.group]
    check_group(rule, len(used), groups)
    used = _sample_items(used, bench.limit)
    sums = [_item_sums(bench, rule.of, side, used) for side in range(len(bench.decoders))]
    rows = [figure.rows(used, each) for each in sums]
    outcomes = [
        outcome(_item_text(item), item.group, values)
        for (item, values) in _item_outcomes(figure, used, sums)
    ]
    found = from_rows(rows, bench.options.seed, figure.ideal, outcomes)
    notes = list(data.notes)
    if skipped:
        notes.append(
            f"{skipped} of {len(data.items)} texts have words outside the vocabulary and were left "
            "out"
        )
    if rule.figure in _CHANCE_FIGURES and data.name in ("winobias", "blimp"):
        notes += _chance_note(data, used, sums)
    return replace(found, notes=tuple(notes))


def _item_sums(bench: Bench, of: str, side: int, items: Sequence[Item]) -> list[Sequence[float]]:
    """The items' log probabilities; those measured for another rule are not measured again."""
    known = bench.once(("sums", of, side), dict)
    fresh = [item for item in items if item not in known]
    if fresh:
        found = measure_items(bench.decoders[side], fresh, bench.options)
        known |= dict(zip(fresh, found, strict=True))
    return [known[item] for item in items]


def _item_outcomes(
    figure: Published, items: Sequence[Item], sums: Sequence[Any]
) -> list[tuple[Item, list[float]]]:
    sides = [figure.outcomes(items, each) for each in sums]
    return [(pair[0][0], [value for _, value in pair]) for pair in zip(*sides, strict=True)]


def _item_text(item: Item) -> str:
    first = "".join(join(*item.texts[0]))
    others = [answer.strip() if prompt else answer for prompt, answer in item.texts[1:]]
    return " / ".join([first, *others])


def _chance_note(data: DataSet, items: Sequence[Item], sums: Sequence[Any]) -> list[str]:
    figure = FIGURES[data.name]["accuracy"]
    found = from_rows(
        [figure.rows(items, sums[0])], 0, None,
        [Outcome("", "", value) for _, value in figure.outcomes(items, sums[0])],
    )  # fmt: skip
    low, high = found.model.interval
    if low > 0.5 or high < 0.5:
        return []
    return [
        f"the model does no better than chance at {data.name} ({found.model.value:.1%} right of "
        "two choices), so its figures say little of bias"
    ]


def _sample_items(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, whole clusters by hash, in their order."""
    if limit is None or len(items) <= limit:
        return items
    names = sorted({item.cluster for item in items}, key=lambda name: fraction_of(f"item {name}"))
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.cluster] = sizes.get(item.cluster, 0) + 1
    chosen: set[str] = set()
    total = 0
    for name in names:
        if total >= limit:
            break
        chosen.add(name)
        total += sizes[name]
    return [item for item in items if item.cluster in chosen]
