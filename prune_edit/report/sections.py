"""The sections of an explanation's page, each from its part of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from prune_edit.report.cells import Found, count, key, number, short, table, tokens
from prune_edit.report.svg import bars, heat_map, lines, nats, percent, points

_SHOWN_HEADS = 8


def question(found: Found) -> str:
    """What the model says, and how sure it is."""
    says = " ".join(
        f"<q>{escape(word)}</q> {number(chance, lambda p: f'{p:.4f}')}"
        for word, chance in found["says"]
    )
    read = "".join(f'<span class="token">{escape(each)}</span>' for each in found["tokens"])
    return f'<p class="tokens">{read}</p><p>Likeliest next, with probabilities: {says}</p>'


def carries(found: Found) -> str:
    """The same as for heads, of answer tokens."""
    return heads(found, "answer tokens")


def heads(found: Found, things: str = "prompts") -> str:
    """Two maps of every group, and the top heads of the first."""
    parts = [key(up="the answer loses this without the head", down="the answer gains")]
    for each in found["maps"]:
        name = each["group"] + ("" if each["examples"] == 1 else f", {each['examples']} {things}")
        parts.append(
            f"<h3>{escape(name)}</h3><p>Whole model: mean log probability of the answer "
            f"{number(each['log_prob'], nats)}, accuracy {number(each['accuracy'], percent)}.</p>"
            '<div class="maps">'
            + _head_map(each["log_prob_drops"], "by log probability", nats)
            + _head_map(each["accuracy_drops"], "by accuracy", points)
            + "</div>"
        )
    first = found["maps"][0]
    best = _best(first["log_prob_drops"], _SHOWN_HEADS)
    rows = [
        [
            f"{layer}^{head}",
            number(first["log_prob_drops"][layer][head], nats),
            number(first["accuracy_drops"][layer][head], points),
        ]
        for layer, head in best
    ]
    return "".join(parts) + table(["head", "log probability lost", "accuracy lost"], rows)


def _head_map(grid: Sequence[Sequence[float | None]], label: str, show: Any) -> str:
    drawn = heat_map(grid, f"Heads {label}", lambda i, j: f"{i}^{j}", show)
    said = f"{escape(label)}, layers down, heads across"
    return f"<figure><figcaption>{said}</figcaption>{drawn}</figure>"


def _best(grid: Sequence[Sequence[float | None]], most: int) -> list[tuple[int, int]]:
    flat = [(v, i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if v is not None]
    return [(i, j) for _, i, j in sorted(flat, key=lambda each: -each[0])[:most]]


def attention(found: Found) -> str:
    """Each head's tokens, shaded by its attention from the last position."""
    rows = []
    for each in found["rows"]:
        spans = "".join(
            f'<span class="token" style="--a:{weight:.3f}">{escape(word)}<small>'
            f"{number(weight, lambda w: f'{100 * w:.0f} %')}</small></span>"
            for word, weight in zip(found["tokens"], each["weights"], strict=True)
        )
        rows.append(f"<dt>{each['name']}</dt><dd class='tokens'>{spans}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def neurons(found: Found) -> str:
    """The table of neurons, with what they say."""
    one = any(each["answer_rank"] for each in found["rows"])  # a single answer token
    sign = {"top": "m > 0, top", "bottom": "m < 0, bottom"}
    rows = [
        [
            each["name"],
            number(each["change"], short),
            number(each["importance"], short),
            number(each["importance_other"], short),
            number(each["coefficient"], short),
            number(each["coefficient_other"], short),
            escape(sign[each["promotes"]]),
            tokens(each["top"]),
            tokens(each["bottom"]),
            *([number(each["answer_rank"], count)] if one else []),
        ]
        for each in found["rows"]
    ]
    columns = ["neuron", "change", "importance", "there", "m", "m there", "sign", "top tokens"]
    where = {each["position"] for each in found["rows"]} - {None}
    at = f" All at the last token, <q>{escape(next(iter(where)))}</q>." if len(where) == 1 else ""
    return (
        f"<p>Importance in nats and coefficient m, here and <b>there</b>: "
        f"{escape(found['other'])}.{at} A neuron adds m times its value vector, so m above zero "
        "promotes the value's top tokens, m below zero the bottom ones.</p>"
        + table([*columns, "bottom tokens", *(["answer's rank"] if one else [])], rows)
        + _layer_changes(found)
    )


def _layer_changes(found: Found) -> str:
    rows = [{"layer": i, "change": value} for i, value in enumerate(found["changes"])]
    drawn = bars(rows, ["change"], "Change of importance per layer", nats)
    return f"<h3>Change of importance per layer, nats</h3>{drawn}"


def depth(found: Found) -> str:
    """Where in depth the answer arises."""
    drawn = bars(found["layers"], ["attention", "ffn"], "Increase per layer", nats)
    return (
        f"<p>Log probability of the answer, from {number(found['start'], nats)} after the "
        f"embedding to {number(found['end'], nats)} at the end: what each layer adds.</p>"
        f"{key(bar0='attention', bar1='FFN')}{drawn}"
    )


def curves(found: Found) -> str:
    """Keep or zero only the top neurons, random ones beside."""
    xs = [each["neurons"] for each in found["points"]]
    one = found["examples"] == 1
    field, show, level = ("log_prob", nats, found["log_prob"]) if one else (
        "accuracy", percent, found["accuracy"],
    )  # fmt: skip
    names = {
        "zeroed": "only these zeroed",
        "kept": "only these kept",
        "random_zeroed": "random ones zeroed",
        "random_kept": "random ones kept",
    }
    series = {
        said: [each[f"{kind}_{field}"] for each in found["points"]] for kind, said in names.items()
    }
    drawn = lines(xs, series, level, "Sufficiency and necessity", show, None if one else (0.0, 1.0))
    rows = [
        [number(each["neurons"], count), *(number(each[f"{k}_{field}"], show) for k in names)]
        for each in found["points"]
    ]
    first, last = found["layers"][0], found["layers"][-1]
    what = "log probability of the answer" if one else "accuracy"
    return (
        f"<p>The neurons of layers {first} to {last} ({number(found['of'], count)}) that CNA ranks "
        f"first for each prompt, zeroed or alone kept: {what}, {number(level, show)} with all. "
        f"Random choices: {number(found['draws'], count)}.</p>"
        + key(line0=names["zeroed"], line1=names["kept"], line2=names["random_zeroed"],
              line3=names["random_kept"])
        + drawn + table(["neurons", *names.values()], rows)
    )  # fmt: skip


def lowest(found: Found) -> str:
    """The lowest-neuron intervention."""
    rows = [
        [number(each["neurons"], count)]
        + [number(each[f"without_{k}"], percent) for k in ("head", "lowest", "random")]
        for each in found["rows"]
    ]
    return (
        "<p>By how much the coefficients of each answer token's top neurons fall without its top "
        "head; and those of the others without the lowest of them, or without a random neuron of "
        f"that layer. {number(found['examples'], count)} answer tokens.</p>"
        + table(["top neurons", "without head", "without lowest", "without random"], rows)
    )


def hidden(found: Found) -> str:
    """Hidden-interpretable sets."""
    rows = [
        [
            number(each["least"], count),
            number(each["neurons"], count),
            number(each["share"], percent),
            number(each["chance"], percent),
            number(each["accuracy"], percent),
            number(each["random_accuracy"], percent),
            number(each["log_prob"], nats),
            number(each["random_log_prob"], nats),
        ]
        for each in found["rows"]
    ]
    columns = ["M", "neurons", "share", "by chance", "accuracy", "random", "log p", "random log p"]
    return (
        f"<p>Shallow neurons whose top {number(found['tokens'], count)} tokens name at least M "
        f"concepts ({escape(found['concepts'])}) only after a layer's value-output map, and what "
        f"is left without them: accuracy {number(found['accuracy'], percent)} with all. By chance "
        "is how often as many random tokens name M.</p>" + table(columns, rows)
    )


def lora(found: Found) -> str:
    """Base against tuned model."""
    sides = [
        [side, number(found[f"{side}_accuracy"], percent), number(found[f"{side}_log_prob"], nats)]
        for side in ("base", "tuned")
    ]
    rises = [
        [number(each["neurons"], count), number(each["by_change"], percent),
         number(each["by_importance"], percent)]
        for each in found["amplification"]
    ]  # fmt: skip
    layers = [
        [number(each["layer"], count), number(each["importance"], nats),
         number(each["coefficients"], percent), number(each["weights"], percent)]
        for each in found["layers"]
    ]  # fmt: skip
    drawn = _head_map(found["heads"], "tuned less base, log probability", nats)
    return (
        table(["model", "accuracy", "log probability of the answer"], sides)
        + "<h3>Coefficients of the top neurons grow</h3>"
        + table(["top neurons", "by change", "by the base's importance"], rises)
        + "<h3>Layers</h3>"
        + table(["layer", "importance gained", "coefficients", "weights changed"], layers)
        + f"<h3>Neurons</h3>{neurons(found['neurons'])}"
        + f"<h3>Heads: what the answer loses without each, tuned less base</h3>{drawn}"
    )
