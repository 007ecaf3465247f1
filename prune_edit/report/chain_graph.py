"""The chain as a graph: tokens above, then shallow neurons, heads, deep neurons, the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from prune_edit.report.svg import WIDTH, nats, percent, picture, text

_ROW = 26.0
_TALL = 15.0
_CHARACTER = 5.2
_WEAK = 0.02  # shares below this are in the table alone


def graph(chain: Mapping[str, Any]) -> str:
    """The graph of a chain's JSON. Blue edges bring, orange ones take; wider is more."""
    places: dict[str, tuple[float, float]] = {}
    boxes: list[str] = []
    y = 22.0
    for title, names in _bands(chain):
        boxes.append(text(2, y - 4, title, "start", "band"))
        for row in names:
            for name, x, words, kind in row:
                wide = max(16.0, _CHARACTER * len(words) + 8)
                x = min(max(x, wide / 2 + 1), WIDTH - wide / 2 - 1)
                places[name] = (x, y + _TALL / 2)
                boxes.append(
                    f'<g class="{kind}"><rect x="{x - wide / 2:.1f}" y="{y:g}" '
                    f'width="{wide:.1f}" height="{_TALL:g}" rx="4" class="node"/>'
                    f"{text(x, y + 10.5, words, 'middle', 'name')}</g>"
                )
            y += _ROW
        y += 18
    drawn = "".join(_line(edge, places, chain) for edge in chain["edges"])
    drawn += "".join(_standing(each, places, chain["tokens"]) for each in chain["shallow"])
    return picture("The chain of this prediction", y - 18, drawn + "".join(boxes))


Node = tuple[str, float, str, str]
"""Name in the edges, x, words in the box, class."""


def _bands(chain: Mapping[str, Any]) -> Iterator[tuple[str, list[list[Node]]]]:
    tokens = chain["tokens"]
    used = {edge["source"] for edge in chain["edges"]}
    at = {i: WIDTH * (i + 0.5) / len(tokens) for i in range(len(tokens))}
    shown = [
        (f"{token} @{i}", at[i], token[:8], "token")
        for i, token in enumerate(tokens)
        if len(tokens) <= 16 or f"{token} @{i}" in used
    ]
    if len(tokens) > 16:
        shown = [(n, x, w, k) for (n, _, w, k), x in zip(shown, _spread(len(shown)), strict=True)]
    yield "the prompt's tokens", [shown]
    shallow = sorted(chain["shallow"], key=lambda each: each["position"])
    nodes = [(f"{each['name']} @{each['position']}", each["name"], "shallow") for each in shallow]
    yield "1 feature enhancing: shallow neurons", _rows(nodes, 6)
    # A box ends an edge only below where it starts: heads in the order of their layers.
    nodes = [
        (each["name"], each["name"], "predicts" if each["predicts"] else "carries")
        for each in chain["heads"]
    ]
    yield "2, 3 transferring and predicting heads", _rows(nodes, 6)
    deep = sorted(chain["deep"], key=lambda each: (each["layer"], each["neuron"]))
    layers = sorted({each["layer"] for each in deep})
    rows = []
    for layer in layers:
        own = [(each["name"], each["name"], "deep") for each in deep if each["layer"] == layer]
        rows += _rows(own, 6)
    yield "4 prediction enhancing: deep neurons by layer", rows
    yield "the answer", [[(chain["answer"], WIDTH / 2, chain["answer"][:20], "answer")]]


def _standing(
    each: Mapping[str, Any], places: Mapping[str, tuple[float, float]], tokens: Sequence[str]
) -> str:
    """A dotted line from a token to a shallow neuron that stands at it."""
    position = each["position"]
    start = places.get(f"{tokens[position]} @{position}")
    end = places.get(f"{each['name']} @{position}")
    if start is None or end is None:
        return ""
    return f'<path d="M{start[0]:.1f},{start[1]:.1f} L{end[0]:.1f},{end[1]:.1f}" class="at"/>'


def _spread(count: int) -> list[float]:
    return [WIDTH * (i + 0.5) / count for i in range(count)]


def _rows(nodes: Sequence[tuple[str, str, str]], most: int) -> list[list[Node]]:
    """Nodes in rows of at most `most`, those of the second row between those of the first."""
    count = max(1, -(-len(nodes) // most))
    rows: list[list[Node]] = [[] for _ in range(count)]
    for i, ((name, words, kind), x) in enumerate(zip(nodes, _spread(len(nodes)), strict=True)):
        rows[i % count].append((name, x, words, kind))
    return rows


def _line(
    edge: Mapping[str, Any], places: Mapping[str, tuple[float, float]], chain: Mapping[str, Any]
) -> str:
    start, end = places.get(edge["source"]), places.get(edge["target"])
    share = edge["share"]
    if start is None or end is None or (share is not None and abs(share) < _WEAK):
        return ""
    if share is None:
        largest = max((abs(each["importance"]) for each in chain["deep"]), default=1.0) or 1.0
        size, said, value = edge["product"] / largest, nats(edge["product"]), edge["product"]
    else:
        size, said, value = share, percent(share), share
    kind = "falls" if size < 0 else "rises"
    middle = (start[1] + end[1]) / 2
    words = f"{edge['source']} to {edge['target']}: {said}"
    return (
        f'<path d="M{start[0]:.1f},{start[1]:.1f} C{start[0]:.1f},{middle:.1f} {end[0]:.1f},'
        f'{middle:.1f} {end[0]:.1f},{end[1]:.1f}" class="{kind}" '
        f'stroke-width="{0.6 + 3 * min(1.0, abs(size)):.2f}" data-value="{value!r}">'
        f"<title>{escape(words)}</title></path>"
    )
