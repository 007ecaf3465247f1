"""Tables 4, 5, 6, 8, 19 to 21 and figure 1: the four stages between a prompt and its answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from cases import Setting, decrease, percent
from found import Found

from prune_edit import plots
from prune_edit.explain import (
    Curves,
    Hidden,
    Lowest,
    NeuronRow,
    answers_with,
    arithmetic_concepts,
    ask,
    explain_chain,
    explain_curves,
    explain_heads,
    explain_hidden,
    explain_lowest,
    explain_neurons,
    shallow_layers,
)
from prune_edit.explain.hidden import carry, count_named, reading_depth
from prune_edit.scoring.cases import present_neurons
from prune_edit.scoring.query import value_map
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units

CASE = "3+5="
_COUNTS = (99, 50, 30, 20, 10)
_GPTJ = ("19", "20", "21")
_POOLS = {"5": "165,120, 0.06 %", "19": "16,384 a layer"}
_known: dict[tuple[int, str, str], Any] = {}  # what several tables of one setting share


def _cases(setting: Setting, table: str) -> tuple[str, list[Encoded]]:
    if table in _GPTJ:
        return "two-digit differences", setting.differences()
    return "one-digit sums and differences", setting.small()


def _shared(setting: Setting, table: str, kind: str) -> Any:
    name, prompts = _cases(setting, table)
    key = (id(setting), kind, name)
    if key not in _known:
        work: Any = {"curves": _curves, "lowest": explain_lowest, "hidden": _hidden}[kind]
        options = setting.options
        _known[key] = work(setting.decoder, prompts, options) if kind == "lowest" else work(
            setting, prompts
        )  # fmt: skip
    return _known[key]


def _curves(setting: Setting, prompts: list[Encoded]) -> Curves:
    return explain_curves(setting.decoder, prompts, setting.options, draws=setting.draws)


def _hidden(setting: Setting, prompts: list[Encoded]) -> Hidden:
    return explain_hidden(setting.decoder, prompts, setting.options, draws=setting.draws)


def one_case(setting: Setting, table: str, folder: Path | None) -> Found:
    """Section 4.2: the probability of `3+5=` without single heads."""
    question = ask(setting.decoder, CASE)
    found = explain_heads(setting.decoder, [question.row], setting.options).of()
    cells: dict[str, float | None] = {"ori": round(question.probability, 4)}
    for layer, head in found.best(5):
        drop = found.log_prob_drops[layer][head]
        cells[f"{layer}^{head}"] = round(math.exp(found.log_prob - (drop or 0.0)), 4)
    return Found(
        table, f"`{CASE}` without single heads",
        {f"probability of {question.answer}": cells}, unit="", notes=question.notes,
    )  # fmt: skip


def neurons_of_case(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 4: the neurons that lose most importance without the top head."""
    question = ask(setting.decoder, CASE)
    found = explain_neurons(setting.decoder, [question.row], setting.options, 4)
    names = {
        "change": "change", "importance": "importance",
        "importance without the head": "importance_other", "coefficient": "coefficient",
        "coefficient without the head": "coefficient_other",
    }  # fmt: skip
    rows: dict[str, dict[str, float | None]] = {
        label: {row.name: round(getattr(row, attribute), 4) for row in found.rows}
        for label, attribute in names.items()
    }
    said = "; ".join(f"{row.name} promotes {_words(row)}" for row in found.rows)
    return Found(
        table, f"neurons of `{CASE}` by CNA", rows, unit="nats, coefficients", notes=(f"{said}.",)
    )


def _words(row: NeuronRow) -> str:
    return ", ".join(word.strip() or repr(word) for word, _ in row.promoted[:6])


def kept_and_masked(setting: Setting, table: str, folder: Path | None) -> Found:
    """Tables 5 and 19: only the top neurons of each case zeroed, or alone kept."""
    curves: Curves = _shared(setting, table, "curves")
    lowest: Lowest = _shared(setting, table, "lowest")
    by_count = {point.neurons: point for point in curves.points}
    falls = {row.neurons: row.without_head for row in lowest.rows}
    counts = [count for count in _COUNTS if count in by_count]
    kinds = {
        "mask": "zeroed_accuracy", "mask, random": "random_zeroed_accuracy",
        "keep": "kept_accuracy", "keep, random": "random_kept_accuracy",
    }  # fmt: skip
    rows: dict[str, dict[str, float | None]] = {
        name: {
            f"top{count}": decrease(curves.accuracy, getattr(by_count[count], attribute))
            for count in counts
        }
        for name, attribute in kinds.items()
    }
    rows["coefficients"] = {f"top{count}": percent(falls[count]) for count in counts}
    if folder is not None and plots.available():
        lines = {
            ("random, " + name.partition(",")[0] if "random" in name else name): [
                (count, 100 * getattr(by_count[count], attribute)) for count in counts
            ]
            for name, attribute in kinds.items()
        }
        plots.draw_curves(
            lines, ("top neurons of each case", "accuracy (%)"), folder, f"table-{table}",
            title=f"{setting.name}: neurons zeroed (mask) or alone kept (keep)", log=True,
        )  # fmt: skip
    name, _ = _cases(setting, table)
    first, last = curves.layers[0], curves.layers[-1]
    return Found(
        table, f"decrease of accuracy and coefficients, {name}", rows,
        notes=(f"{curves.examples} cases that the model answers; neurons of layers {first} to "
               f"{last}, {curves.of:,} in all, of which 99 are {99 / curves.of:.1%} (Llama-7B: "
               "165,120, 0.06 %). Each case has its own top head; the paper takes one for all.",),
    )  # fmt: skip


def lowest_neuron(setting: Setting, table: str, folder: Path | None) -> Found:
    """Tables 6 and 20: the others' coefficients when only the lowest top neuron is zeroed."""
    lowest: Lowest = _shared(setting, table, "lowest")
    by_count = {row.neurons: row for row in lowest.rows}
    rows: dict[str, dict[str, float | None]] = {
        name: {
            f"top{count}": percent(getattr(by_count[count], attribute))
            for count in _COUNTS
            if count in by_count
        }
        for name, attribute in (
            ("coefficients", "without_lowest"), ("random of the same layer", "without_random"),
        )
    }  # fmt: skip
    name, _ = _cases(setting, table)
    title = f"decrease of coefficients without the lowest top neuron, {name}"
    return Found(table, title, rows, notes=(f"{lowest.examples} answer tokens.",))


def hidden_sets(setting: Setting, table: str, folder: Path | None) -> Found:
    """Tables 8 and 21: neurons that name concepts after an attention layer's map, zeroed."""
    hidden: Hidden = _shared(setting, table, "hidden")
    name, prompts = _cases(setting, table)
    rows: dict[str, dict[str, float | None]] = {"neurons": {}, "accuracy": {}, "random": {}}
    for least, (own, drawn, count) in _named_sets(setting, prompts).items():
        rows["neurons"][f"M={least}"] = count
        rows["accuracy"][f"M={least}"] = decrease(hidden.accuracy, own)
        rows["random"][f"M={least}"] = decrease(hidden.accuracy, drawn)
    for label, attribute in (("neurons", "neurons"), ("accuracy", "accuracy"),
                             ("random", "random_accuracy")):  # fmt: skip
        rows[f"{label}, hidden alone"] = {
            f"M={row.least}": row.neurons if label == "neurons"
            else decrease(hidden.accuracy, getattr(row, attribute))
            for row in hidden.rows
        }  # fmt: skip
    first, last = hidden.layers[0], hidden.layers[-1]
    chances = ", ".join(f"{row.chance:.0%}" for row in hidden.rows)
    return Found(
        table, f"hidden-interpretable neurons, and decrease of accuracy without them, {name}",
        rows, unit="number, %",
        notes=(f"{hidden.examples} cases that the model answers; layers {first} to {last}; the top "
               f"{hidden.tokens} tokens of {len(setting.decoder.unembedding):,} are read, among "
               f"which chance alone would name so many concepts in {chances} of neurons.",
               "*hidden alone*: those that name fewer than M without the map, through layers above "
               "their own."),
    )  # fmt: skip


def _named_sets(setting: Setting, prompts: list[Encoded]) -> dict[int, tuple[float, float, int]]:
    """By the paper's rule: through any attention layer up to the first deep one.

    By M: accuracy without the set, mean accuracy without as many random ones, their number.
    """
    decoder, options = setting.decoder, setting.options
    layers = list(shallow_layers(decoder.n_layers))
    concepts, depth = arithmetic_concepts(decoder), reading_depth(decoder)
    pool = present_neurons(decoder).clone()
    pool[len(layers) :] = False
    most = torch.zeros(decoder.neuron_shape, dtype=torch.long)
    for above in range(len(layers) + 1):
        values = value_map(decoder, above, options)
        for layer in layers if values is not None else ():
            slots = decoder.neuron_slots[layer]
            carried = carry(decoder, above, values, decoder.residual_values(layer))
            named = count_named(decoder, carried, concepts, depth)
            most[layer, slots] = torch.maximum(most[layer, slots], named)
    places = pool.flatten().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(setting.seed)

    def accuracy(gone: torch.Tensor) -> float:
        factors = Units(neurons=(~gone).float().view(decoder.neuron_shape))
        return answers_with(decoder, prompts, options, "neurons", lambda _: factors).accuracy

    found = {}
    for least in (1, 2, 3):
        own = (pool & (most >= least)).flatten()
        count, drawn = int(own.sum()), []
        for _ in range(setting.draws):
            some = torch.zeros_like(own)
            some[places[torch.randperm(len(places), generator=generator)[:count]]] = True
            drawn.append(accuracy(some))
        found[least] = (accuracy(own), sum(drawn) / max(1, len(drawn)), count)
    return found


def four_stages(setting: Setting, table: str, folder: Path | None) -> Found:
    """Figure 1: the chain of `3+5=`, each stage's strongest."""
    question = ask(setting.decoder, CASE)
    neurons = explain_neurons(setting.decoder, [question.row], setting.options)
    chain = explain_chain(setting.decoder, question, neurons, setting.options)
    carried = {
        f"layer {layer}": sum(abs(x) for x in row if x is not None)
        for layer, row in enumerate(chain.carriers)
    }
    best = sorted(carried, key=lambda name: -carried[name])[:3]
    rows: dict[str, dict[str, float | None]] = {
        "feature enhancing": {node.name: round(node.score, 4) for node in chain.shallow[:5]},
        "feature transferring": {name: round(carried[name], 4) for name in best},
        "feature predicting": {node.name: round(node.drop, 4) for node in chain.heads[:3]},
        "prediction enhancing": {node.name: round(node.change, 4) for node in chain.deep[:5]},
    }
    places = ", ".join(f"{node.name} at {node.token!r}" for node in chain.shallow[:5])
    hidden = sum(node.hidden for node in chain.shallow)
    return Found(
        table, f"the four stages of `{CASE}`", rows, unit="nats",
        notes=(f"Shallow neurons: {places}; {hidden} of {len(chain.shallow)} are "
               "hidden-interpretable.",
               "`prune-edit explain \"3+5=\"` draws the whole chain; the paper's figure names "
               "units without numbers."),
    )  # fmt: skip
