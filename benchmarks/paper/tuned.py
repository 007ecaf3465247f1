"""Tables 9 and 10 and figure 2: LoRA on one attention layer at a time, and what it amplifies."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from cases import SIGNS, Setting, percent
from found import Found
from quality.paper_recipe import tuned

from prune_edit import plots
from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.explain import ask, explain_lora, explain_neurons
from prune_edit.scoring import Options
from prune_edit.tasks import arithmetic
from prune_edit.tasks.prompts import Encoded, encode_all
from prune_edit.tasks.task import Example, Task

_COUNTS = (50, 30, 20, 10)
_TEST = 400
_KNOWN = 0.95  # of the paper's data, above which LoRA has nothing to teach
_BELOW = 30  # operands of the new wording
_known: dict[int, Any] = {}


def two_digits() -> Task:
    """The paper's tuning data: two-digit sums, and differences that are negative, too."""
    rows = list(chain.from_iterable(arithmetic.load(name, digits=(2,)).examples for name in SIGNS))
    drawn = random.Random(0)
    pairs = sorted(arithmetic.pairs("sub", 2))
    for a, b in drawn.sample(pairs, len(pairs) // 2):
        if a > b:
            example = arithmetic.example("sub", a, b, 3, "digits")
            rows.append(Example(f"{b}-{a}=", f"-{a - b}", "sub, negative", key=example.key))
    return Task("two-digit arithmetic with negative differences", tuple(rows))


def new_wording() -> Task:
    """For a model that knows all of that: sums in a wording it was never shown."""
    return Task(
        "sums in a new wording",
        tuple(
            Example(f"{a} {b} sum is", f"{a + b}", key=f"{min(a, b)} {max(a, b)}")
            for a in range(_BELOW)
            for b in range(_BELOW)
        ),
    )


@dataclass(frozen=True)
class Lesson:
    """What LoRA is to teach, and the cases in which its neurons are looked at."""

    task: Task
    case: str
    prompts: list[Encoded]

    def encoded(self, decoder: Decoder, split: str, limit: int | None) -> list[Encoded]:
        rows = self.task.sample(split, limit)
        return encode_all(decoder.tokenizer, rows, self.task.name, decoder.max_positions)


def lesson(setting: Setting) -> Lesson:
    """The paper's, unless there is next to nothing of it to learn."""
    decoder = setting.decoder
    if measure_accuracy(decoder, setting.mixed(), Options()).value < _KNOWN:
        return Lesson(two_digits(), "3+5=", setting.small())
    other = Lesson(new_wording(), "3 5 sum is", [])
    return replace(other, prompts=other.encoded(decoder, "test", setting.cases))


def layers_of(setting: Setting) -> dict[str, list[int]]:
    """Shallow, middle and deep layers, as the paper's 1-9, 10-16 and 17-30 of 32 lie."""
    depth = setting.decoder.n_layers
    ends = [round(depth * part / 32) for part in (1, 10, 17, 31)]
    if depth < 32:
        ends[0], ends[-1] = 0, depth
    return {
        f"layers {start}-{stop - 1}": list(range(start, stop))
        for start, stop in pairwise(ends)
        if stop > start
    }


def _runs(setting: Setting) -> dict[int, dict[str, Any]]:
    """Every layer's tuned model in figures; the model itself is let go."""
    if id(setting) in _known:
        found: dict[int, dict[str, Any]] = _known[id(setting)]
        return found
    decoder = setting.decoder
    taught = lesson(setting)
    train = taught.encoded(decoder, "train", None)
    test = taught.encoded(decoder, "test", _TEST)
    question = ask(decoder, taught.case)
    own = explain_neurons(decoder, [question.row], setting.options, 3).rows
    found = {-1: {"accuracy": measure_accuracy(decoder, test, Options()).value,
                  "task": taught.task.name, "case": taught.case,
                  "examples": (len(train), len(test), len(taught.prompts)),
                  "coefficients": {row.name: row.coefficient for row in own}}}  # fmt: skip
    for layer in range(decoder.n_layers):
        model = tuned(decoder, layer, train, setting.steps, setting.seed)
        lora = explain_lora(decoder, model, taught.prompts, setting.options, _COUNTS)
        means = explain_neurons(model, [question.row], setting.options, 1).means.coefficient
        found[layer] = {
            "accuracy": measure_accuracy(model, test, Options()).value,
            "rises": {row.neurons: (row.by_change, row.by_importance)
                      for row in lora.amplification},
            "coefficients": {row.name: float(means[row.layer, row.neuron]) for row in own},
        }  # fmt: skip
        print(f"LoRA on layer {layer}: {found[layer]['accuracy']:.1%}", flush=True)
    _known[id(setting)] = found
    return found


def _said(setting: Setting, runs: dict[int, dict[str, Any]]) -> str:
    train, test, cases = runs[-1]["examples"]
    return (
        f"{setting.steps} steps of LoRA on one attention layer to learn {runs[-1]['task']} "
        f"({train:,} train and {test} test examples; neurons over {cases} cases)."
    )


def accuracy_by_layer(setting: Setting, table: str, folder: Path | None) -> Found:
    """Figure 2: accuracy with LoRA in each layer."""
    runs = _runs(setting)
    cells: dict[str, float | None] = {"ori": percent(runs[-1]["accuracy"])}
    for name, layers in layers_of(setting).items():
        cells[name] = percent(sum(runs[each]["accuracy"] for each in layers) / len(layers))
    for layer in range(setting.decoder.n_layers):
        cells[str(layer)] = percent(runs[layer]["accuracy"])
    if folder is not None and plots.available():
        points = [(layer, 100 * runs[layer]["accuracy"]) for layer in runs if layer >= 0]
        plots.draw_curves(
            {"LoRA on this layer": points}, ("attention layer", "accuracy (%)"), folder, table,
            title=f"{setting.name}: one LoRA layer", level=("no LoRA", 100 * runs[-1]["accuracy"]),
        )  # fmt: skip
    return Found(table, "accuracy with LoRA on one attention layer", {"accuracy": cells},
                 notes=(_said(setting, runs),))  # fmt: skip


def one_case(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 9: the coefficients of the neurons of `3+5=` with LoRA in some layers."""
    runs = _runs(setting)
    wanted = sorted({round(layer * setting.decoder.n_layers / 32) for layer in (9, 15, 16, 19, 20)})
    names = {"ori": -1} | {str(layer): layer for layer in wanted if layer in runs}
    rows = {
        neuron: {label: round(runs[at]["coefficients"][neuron], 2) for label, at in names.items()}
        for neuron in runs[-1]["coefficients"]
    }
    title = f"coefficients for `{runs[-1]['case']}` with LoRA in these layers"
    return Found(table, title, rows, unit="", notes=(_said(setting, runs),))


def amplification(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 10: by how much the coefficients of the top neurons rise."""
    runs = _runs(setting)
    rows: dict[str, dict[str, float | None]] = {}
    for column, said in ((0, ""), (1, ", ranked in the base")):
        for name, layers in layers_of(setting).items():
            rows[name + said] = {
                f"top{count}": percent(
                    sum(runs[each]["rises"][count][column] for each in layers) / len(layers)
                )
                for count in _COUNTS
            }
    return Found(
        table, "increase of the top neurons' coefficients by LoRA", rows,
        notes=(_said(setting, runs),
               "Ranked by CNA between base and tuned model, which picks what rose; then by "
               "importance in the base alone, which does not."),
    )  # fmt: skip
