"""Measure what the rules name, each thing once, on the model and on its base alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.editing.concept import load_concept
from prune_edit.errors import GateError, TaskError
from prune_edit.evaluation.accuracy import answer_sums, correct
from prune_edit.evaluation.cost import (
    count_parameters,
    flops_per_token,
    weight_bytes,
    weight_folder,
)
from prune_edit.evaluation.perplexity import plain_texts, text_losses
from prune_edit.evaluation.published import (
    FIGURES,
    Published,
    measure_items,
    with_examples,
)
from prune_edit.evaluation.resampling import Rows, exp_mean, mean
from prune_edit.evaluation.speed import Run, run_in_turns
from prune_edit.fitting import fit_task
from prune_edit.gating.measured import Measured, Outcome, exact, from_rows, of_times
from prune_edit.gating.rules import Rule
from prune_edit.running import Running
from prune_edit.samples import TEST_EXAMPLES, Samples
from prune_edit.tasks import load_task
from prune_edit.tasks.datasets import DataSet, Item, is_data_set, load_data_set
from prune_edit.tasks.datasets.files import read_text
from prune_edit.tasks.prompts import encode_all, join
from prune_edit.tasks.task import Example, even, fraction_of

_FEW_ANSWERS = 8
_BATCHES = ("batch 1", "batch 32")
_FLOPS_CONTEXT = 64
_CHANCE_FIGURES = ("gap", "accuracy", "accuracy-pro", "accuracy-anti")


@dataclass
class Bench:
    """A model and its base, and what of them has been measured already."""

    decoders: tuple[Decoder, ...]  # the model, then its base if there is one
    options: Running
    limit: int | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> Decoder:
        """The model that is judged."""
        return self.decoders[0]

    @property
    def reference(self) -> Decoder:
        """The model that tasks are fitted to: the base, where there is one."""
        return self.decoders[-1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def measure(self, rule: Rule) -> Measured:
        """The rule's figure. Raises TaskError or GateError where it cannot be measured."""
        found: Measured = _SOURCES[rule.kind.source](self, rule)
        return found


# Tasks


def _task(bench: Bench, rule: Rule) -> Measured:
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
    _check_group(rule, len(found), task.groups)
    clusters = [example.split_key for example, _ in found]
    rows = [
        Rows.of([(float(right[side]), 1.0) for _, right in found], mean, clusters, share=True)
        for side in range(len(bench.decoders))
    ]
    outcomes = [_outcome(_shown(example), example.group, right) for example, right in found]
    measured = from_rows(rows, bench.options.seed, None, outcomes)
    chance = _mean(1 / len(e.choices) if e.choices else 0.0 for e, _ in found)
    return replace(measured, unable=_at_chance(measured, chance, rule.of))


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _shown(example: Example) -> str:
    prompt, answer = join(example.prompt, example.answer)
    return f"{prompt}[{answer}]"


def _outcome(text: str, group: str, sides: Sequence[float]) -> Outcome:
    base = float(sides[1]) if len(sides) > 1 else None
    return Outcome(text, group, float(sides[0]), base)


def _check_group(rule: Rule, count: int, groups: Sequence[str]) -> None:
    """Raise TaskError where a group is unknown or too small for an interval."""
    if not count:
        raise TaskError(
            f"{rule.subject}: there is no such group; known are "
            + (", ".join(filter(None, groups)) or "none")
        )
    if count < 2:
        raise TaskError(
            f"{rule.subject}: one example says nothing of a group; give more examples, or leave "
            "out the rule"
        )


def _at_chance(found: Measured, chance: float, what: str) -> str:
    """Why nothing relative can be said, where the base does no better than chance."""
    side = found.base
    if side is None or (side.value > chance and side.interval[0] > chance):
        return ""
    return (
        f"the base cannot do {what}: {side.value:.1%} right, chance is {chance:.1%}; what it "
        "cannot do, a model cannot lose"
    )


# Concepts


def _concept(bench: Bench, rule: Rule) -> Measured:
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
    _check_group(rule, len(pairs), groups)
    gaps = [
        bench.once(("gaps", rule.of, rule.group, i), partial(pair_gaps, decoder, pairs, bench))
        for i, decoder in enumerate(bench.decoders)
    ]
    answers = [pair.answer for pair in pairs]
    # One profession's prompts are resampled together, where there are enough professions.
    clusters = answers if len(set(answers)) >= _FEW_ANSWERS else None
    rows = [Rows.of([(gap, 1.0) for gap in side], mean, clusters) for side in gaps]
    outcomes = [
        _outcome(f"{pair.prompt} / {pair.contrast} [{pair.answer}]", pair.group, each)
        for pair, each in zip(pairs, zip(*gaps, strict=True), strict=True)
    ]
    return from_rows(rows, bench.options.seed, rule.kind.ideal, outcomes)


def pair_gaps(decoder: Decoder, pairs: Sequence[Example], bench: Bench) -> list[float]:
    """`log p(answer | prompt) - log p(answer | contrast)` of each pair, whose mean is the bias.

    Raises TaskError where the tokenizer cannot write a pair.
    """
    sides = []
    for rows in (pairs, [replace(pair, prompt=str(pair.contrast)) for pair in pairs]):
        encoded = encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
        sides.append(answer_sums(decoder, encoded, bench.options))
    return [a - b for a, b in zip(*sides, strict=True)]


# Data sets


def _data_set(bench: Bench, rule: Rule) -> Measured:
    data = load_data_set(rule.of)
    figure = FIGURES[data.name][rule.figure]
    items, skipped = bench.once(("items", rule.of), lambda: with_examples(data, bench.decoders))
    groups = sorted({item.group for item in items})
    used = [item for item in items if figure.uses(item)]
    used = [item for item in used if not rule.group or item.group == rule.group]
    _check_group(rule, len(used), groups)
    used = _sample_items(used, bench.limit)
    sums = [_item_sums(bench, rule.of, side, used) for side in range(len(bench.decoders))]
    rows = [figure.rows(used, each) for each in sums]
    outcomes = [
        _outcome(_item_text(item), item.group, values)
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


def _sample(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    if limit is None or len(examples) <= limit:
        return examples
    return even(sorted(examples, key=lambda example: example.rank), limit)


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


# Text, cost, speed, lm-eval


def _perplexity(bench: Bench, rule: Rule) -> Measured:
    if rule.of:
        lines = read_text(Path(rule.of), "text").split("\n")
        texts = [line.strip() for line in lines if line.strip()]
    else:
        texts = plain_texts()
    vocabularies = [decoder.tokenizer.get_vocab() for decoder in bench.decoders]
    if vocabularies[0] != vocabularies[-1]:
        raise TaskError(
            "perplexities of two vocabularies do not compare: a token is not the same text; use "
            "max without a base"
        )
    sides = [
        bench.once(("losses", rule.of, i), partial(text_losses, decoder, texts, bench.options))
        for i, decoder in enumerate(bench.decoders)
    ]
    if any(side is None for side in sides):
        raise TaskError(
            "perplexity: the tokenizer cannot write the texts; give a file of the model's own "
            "language with of"
        )
    used = [i for i, (_, tokens) in enumerate(sides[0]) if tokens]
    if len(used) < 2:
        raise TaskError("perplexity: an interval needs two texts at least, one a line")
    rows = [Rows.of([side[i] for i in used], exp_mean) for side in sides]
    outcomes = [_outcome(texts[i], "", [side[i][0] / side[i][1] for side in sides]) for i in used]
    return from_rows(rows, bench.options.seed, None, outcomes)


def _cost(bench: Bench, rule: Rule) -> Measured:
    values = [_count(rule.figure, decoder, bench) for decoder in bench.decoders]
    return exact(values[0], values[1] if len(values) > 1 else None)


def _count(figure: str, decoder: Decoder, bench: Bench) -> int:
    if figure == "parameters":
        return count_parameters(decoder)
    if figure == "flops":
        positions = [each.max_positions or _FLOPS_CONTEXT for each in bench.decoders]
        return flops_per_token(decoder, min(_FLOPS_CONTEXT, *positions))
    folder = weight_folder(decoder.source)
    if folder is None:
        raise GateError(f"bytes: the weight files of {decoder.source} are not to be found")
    return weight_bytes(folder, decoder.model.dtype)


def _speed(bench: Bench, rule: Rule) -> Measured:
    name = rule.of or _BATCHES[0]
    try:
        batch = int(name.removeprefix("batch "))
    except ValueError:
        batch = 0
    if batch < 1:
        raise GateError(f'{rule.figure}: of = {rule.of!r} is no batch size; give of = "batch 32"')
    runs: list[Run] = bench.once(("speed", batch), lambda: run_in_turns(bench.decoders, batch)[0])
    rows, prompt = runs[0].prompt.shape
    work = rows * prompt if rule.figure == "prefill" else rows
    times = [run.prefill if rule.figure == "prefill" else run.decode for run in runs]
    return of_times(times, work, bench.options.seed)


def _lm_eval(bench: Bench, rule: Rule) -> Measured:
    from prune_edit.evaluation import harness

    limit = bench.limit
    sides = [
        bench.once(("lm-eval", rule.of, i), partial(harness.scores, decoder, rule.of, limit))
        for i, decoder in enumerate(bench.decoders)
    ]
    tables = [side.of(rule.figure) for side in sides]
    rows = [Rows.of([(value, 1.0) for _, value in table], mean) for table in tables]
    share = all(value in (0.0, 1.0) for table in tables for _, value in table)
    rows = [replace(each, share=share) for each in rows]
    outcomes = [
        _outcome(pair[0][0], "", [value for _, value in pair]) for pair in zip(*tables, strict=True)
    ]
    return from_rows(rows, bench.options.seed, None, outcomes)


_SOURCES: dict[str, Callable[[Bench, Rule], Measured]] = {
    "task": _task,
    "concept": _concept,
    "data set": _data_set,
    "perplexity": _perplexity,
    "cost": _cost,
    "speed": _speed,
    "lm-eval": _lm_eval,
}
