"""An explanation on the terminal: compact heat maps and tables of its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prune_edit.cli import render

Found = Mapping[str, Any]
_TOKENS = 5
_EDGES = 24


def show(found: Found) -> None:
    """What explanation.json has, in short."""
    if found["kind"] == "prompt":
        asked = found["question"]
        render.line(
            f"{asked['prompt']!r} gives {asked['answer']!r}, probability {asked['probability']:.4f}"
        )
    elif found["kind"] == "task":
        render.line(f"task: {found['task']}, {found['examples']} test prompts")
    for name, part in _PARTS.items():
        if found.get(name):
            part(found[name])


def _carries(found: Found) -> None:
    _heads(found, "digits")


def _heads(found: Found, what: str = "heads") -> None:
    for each in found["maps"]:
        render.line(
            f"{what}, {each['group']}: log probability {each['log_prob']:.3f} nats, accuracy "
            f"{each['accuracy']:.1%}; what the answer loses without each, a line a layer"
        )
        render.grid(each["log_prob_drops"])
        best = best_of(each["log_prob_drops"], 5)
        costs = [
            f"{i}^{j} {each['log_prob_drops'][i][j]:.3f} nats, "
            f"{100 * each['accuracy_drops'][i][j]:.1f} points"
            for i, j in best
        ]
        render.line(f"most: {'; '.join(costs)}")


def best_of(grid: Sequence[Sequence[float | None]], most: int) -> list[tuple[int, int]]:
    """Layers and columns of the largest numbers."""
    flat = [(v, i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if v is not None]
    return [(i, j) for _, i, j in sorted(flat, key=lambda each: -each[0])[:most]]


def _attention(found: Found) -> None:
    cells = []
    for each in found["rows"]:
        pairs = list(zip(each["weights"], found["tokens"], strict=True))
        seen = sorted(pairs, key=lambda pair: -pair[0])[:5]
        cells.append([each["name"], "  ".join(f"{word} {weight:.0%}" for weight, word in seen)])
    render.table("attention from the last position", ["head", "looks at"], cells, [1])


def _neurons(found: Found) -> None:
    cells = [
        [
            each["name"],
            *(f"{each[key]:.4f}" for key in ("change", "importance", "importance_other")),
            f"{each['coefficient']:.3f}",
            f"{each['coefficient_other']:.3f}",
            _words(each[each["promotes"]]),
        ]
        for each in found["rows"]
    ]
    columns = ["neuron", "change", "importance", "there", "m", "m there", "promotes"]
    render.table(f"neurons in nats; there: {found['other']}", columns, cells, [6])


def _depth(found: Found) -> None:
    cells = [
        [str(each["layer"]), f"{each['attention']:+.3f}", f"{each['ffn']:+.3f}"]
        for each in found["layers"]
    ]
    title = f"log probability in nats, from {found['start']:.3f} to {found['end']:.3f}"
    render.table(title, ["layer", "attention", "FFN"], cells)


def _chain(found: Found) -> None:
    cells = [
        [
            f"{each['name']} @{each['position']} {each['token']}",
            f"{each['score']:.1%}",
            _words(each["before"], 4),
            str(each["layer_after"]),
            _words(each["after"], 4),
        ]
        for each in found["shallow"]
    ]
    columns = ["neuron", "brings", "says", "layer", "says after it"]
    render.table("shallow neurons, before and after attention", columns, cells, [2, 4])
    render.line("what each layer brings from each token, a line a layer")
    render.grid(found["carriers"])
    edges = found["edges"]
    cells = []
    for edge in edges[:_EDGES] if not found["verified"] else edges:
        cells.append(
            [
                edge["stage"],
                f"{edge['source']} to {edge['target']}",
                _share(edge["share"]),
                f"{edge['product']:.3f}",
            ]
        )
        if found["verified"]:
            cells[-1] += [_share(edge["measured_share"]), f"{edge['measured_drop']:.4f}"]
    columns = ["stage", "edge", "share", "product"]
    columns += ["cut: share", "cut: nats lost"] if found["verified"] else []
    render.table("edges of the chain", columns, cells)
    if len(edges) > len(cells):
        render.line(f"{len(edges) - len(cells)} more edges are in --json and on the page")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}".replace("-0.0%", "0.0%")


def _curves(found: Found) -> None:
    kinds = ("zeroed", "kept", "random_zeroed", "random_kept")
    cells = [
        [
            str(each["neurons"]),
            *(f"{each[f'{k}_accuracy']:.1%} ({each[f'{k}_log_prob']:.3f})" for k in kinds),
        ]
        for each in found["points"]
    ]
    layers = f"layers {found['layers'][0]} to {found['layers'][-1]}"
    title = f"accuracy (log p) by the top neurons of {layers}; all {found['accuracy']:.1%}"
    columns = ["neurons", "zeroed", "kept", "random zeroed", "random kept"]
    render.table(title, columns, cells)


def _lowest(found: Found) -> None:
    cells = [
        [
            str(each["neurons"]),
            *(f"{each[f'without_{k}']:.1%}" for k in ("head", "lowest", "random")),
        ]
        for each in found["rows"]
    ]
    title = "fall of the top neurons' coefficients"
    render.table(title, ["neurons", "without head", "without lowest", "random"], cells)


def _hidden(found: Found) -> None:
    keys = ("share", "chance", "accuracy", "random_accuracy")
    cells = [
        [str(each["least"]), str(each["neurons"]), *(f"{each[key]:.1%}" for key in keys)]
        for each in found["rows"]
    ]
    title = f"hidden-interpretable neurons zeroed; accuracy of all {found['accuracy']:.1%}"
    render.table(title, ["M", "neurons", "share", "by chance", "accuracy", "random"], cells)


def _lora(found: Found) -> None:
    render.line(
        f"accuracy {found['base_accuracy']:.1%} to {found['tuned_accuracy']:.1%}, log probability "
        f"{found['base_log_prob']:.3f} to {found['tuned_log_prob']:.3f} nats, "
        f"{found['examples']} prompts"
    )
    cells = [
        [str(each["neurons"]), f"{each['by_change']:+.1%}", f"{each['by_importance']:+.1%}"]
        for each in found["amplification"]
    ]
    columns = ["top neurons", "by change", "by importance"]
    render.table("coefficients grow", columns, cells)
    cells = [
        [
            str(each["layer"]),
            f"{each['importance']:+.3f}",
            f"{each['coefficients']:+.1%}",
            f"{each['weights']:.1%}",
        ]
        for each in found["layers"]
    ]
    render.table("layers", ["layer", "importance", "coefficients", "weights"], cells)
    _neurons(found["neurons"])
    render.line("heads: what the answer loses without each, tuned less base, a line a layer")
    render.grid(found["heads"])


_PARTS = {
    "depth": _depth,
    "heads": _heads,
    "carries": _carries,
    "attention": _attention,
    "neurons": _neurons,
    "chain": _chain,
    "curves": _curves,
    "lowest": _lowest,
    "hidden": _hidden,
    "lora": _lora,
}


def _words(pairs: Sequence[Sequence[Any]], most: int = _TOKENS) -> str:
    return "  ".join(repr(word) for word, _ in pairs[:most])
