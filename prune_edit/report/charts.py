"""Charts for a page: inline SVG in the page's own colours, so that dark and light both read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_edit.report.svg import picture, text

WIDTH = 600
_LEFT = 180  # room for names
_MOST = 60  # rows


def kept_map(plan: Mapping[str, Any]) -> str:
    """A line a layer: a cell a kept head, and a bar for the share of neurons that stay."""
    layers, n_heads = plan["layers"], plan["n_heads"]
    tall = 16 if len(layers) <= 40 else 9
    left, right, gap = 40, 400, 30
    cell = (right - left) / max(n_heads, 1)
    bar = WIDTH - right - gap
    parts = [
        text(left, 12, "heads kept, by number", "start"),
        text(right + gap, 12, "neurons kept", "start"),
    ]
    for layer, row in enumerate(layers):
        y = 20 + layer * tall
        parts.append(_rect(left, y, right - left, tall - 3, "var(--line)", 0.55))
        parts += [
            _rect(left + start * cell, y, (stop - start) * cell - min(1, cell / 4), tall - 3)
            for start, stop in _runs(row["heads"])
        ]
        share = row["neurons"] / max(plan["n_neurons"], 1)
        parts.append(_rect(right + gap, y, bar, tall - 3, "var(--line)", 0.55))
        parts.append(_rect(right + gap, y, bar * share, tall - 3))
        if tall > 10 or layer % 5 == 0:
            parts.append(text(left - 6, y + tall - 5, str(layer), "end"))
    label = (
        f"{plan['kept_heads']} of {plan['of_heads']} heads and {plan['kept_neurons']} of "
        f"{plan['of_neurons']} neurons are kept; a line a layer"
    )
    return picture(label, 20 + len(layers) * tall + 4, "".join(parts), WIDTH)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among ascending numbers as (start, stop)."""
    start = None
    for at, number in enumerate(numbers):
        if start is None:
            start = number
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            yield start, number + 1
            start = None


def accuracy_bars(found: Mapping[str, Any]) -> str:
    """evaluation.json's accuracies with their intervals, dense above pruned, a row a group."""
    rows: list[tuple[str, list[tuple[float, float, float]]]] = []
    sides = (found["dense"], found["pruned"])
    rows.append((found["task"], [(s["accuracy"], *s["accuracy_interval"]) for s in sides]))
    for kind in ("tasks", "groups", "retained"):
        names = list(found["dense"].get(kind, {}))
        if kind == "groups" and len(names) < 2:
            continue
        for name in names:
            pair = [side[kind].get(name) for side in sides]
            if all(pair):
                shown = f"{name or 'no group'}, retained" if kind == "retained" else name
                rows.append((shown, [(p["accuracy"], *p["interval"]) for p in pair]))
    parts = []
    for at, (name, pair) in enumerate(rows[:_MOST]):
        y = 6 + 34 * at
        parts.append(text(_LEFT - 8, y + 17, _short(name), "end"))
        for number, (value, low, high) in enumerate(pair):
            top = y + 12 * number
            parts.append(_rect(_LEFT, top, _x(1) - _LEFT, 9, "var(--line)", 0.4))
            tone = "var(--soft)" if number == 0 else "var(--info)"
            parts.append(_rect(_LEFT, top, _x(value) - _LEFT, 9, tone))
            parts.append(_line(_x(low), _x(high), top + 4.5, top + 4.5, "var(--ink)"))
            parts.append(text(WIDTH - 4, top + 9, f"{value:.1%}", "end"))
    label = "accuracy, dense in grey above pruned in blue, with 95 % intervals"
    return picture(label, 10 + 34 * len(rows[:_MOST]), "".join(parts), WIDTH)


def _x(share: float) -> float:
    return _LEFT + (WIDTH - 60 - _LEFT) * max(0.0, min(1.0, share))


def bias_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """An edit's answers: bias in nats before (ring) and after (dot), a line each, zero marked."""
    shown = rows[:_MOST]
    ends = [row[key] for row in shown for key in ("before", "after")] + [0.0]
    low, high = min(ends), max(ends)
    room = (high - low) or 1.0

    def x(value: float) -> float:
        return float(_LEFT + 14 + (WIDTH - 28 - _LEFT) * (value - low) / room)

    foot = 10 + 15 * len(shown)
    parts = [_line(x(0), x(0), 2, foot, "var(--soft)")]
    for at, row in enumerate(shown):
        y = 12 + 15 * at
        before, after = x(row["before"]), x(row["after"])
        parts.append(text(_LEFT - 2, y + 4, _short(f"{row['answer']} ({row['group']})"), "end"))
        parts.append(_line(before, after, y, y, "var(--line)"))
        parts.append(
            f'<circle cx="{before:.1f}" cy="{y}" r="4" fill="none" stroke="var(--warning)" '
            'stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{after:.1f}" cy="{y}" r="4" fill="var(--info)"/>')
    parts += [
        text(x(value), foot + 14, f"{value:+.2f} nats", "end" if value == high else "middle")
        for value in dict.fromkeys((low, high))
    ]
    return picture(
        "bias in nats of each answer, before (ring) and after (dot)",
        foot + 20,
        "".join(parts),
        WIDTH,
    )


def _short(words: str, most: int = 24) -> str:
    words = " ".join(words.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _rect(
    x: float, y: float, width: float, height: float, fill: str = "var(--info)", opacity: float = 1
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" '
        f'fill="{fill}" opacity="{opacity:g}"/>'
    )


def _line(x1: float, x2: float, y1: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'
