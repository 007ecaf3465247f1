"""Pictures as inline SVG: no scripts, colours by the page's variables, numbers in their titles.

Every number drawn stands in a `data-value` attribute as JSON has it. Widths are those of a
telephone; on a wider page pictures grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH = 360
Show = Callable[[float], str]


def rounded(value: float, places: int) -> str:
    """A number without a sign where nothing is left of it."""
    said = f"{value:.{places}f}"
    return said if any(each in "123456789" for each in said) else said.lstrip("-")


def nats(value: float) -> str:
    """A log probability, or a difference of some."""
    return f"{rounded(value, 3)} nats"


def percent(value: float) -> str:
    """A share."""
    return f"{rounded(100 * value, 1)} %"


def points(value: float) -> str:
    """A difference of shares."""
    return f"{rounded(100 * value, 1)} points"


def picture(label: str, height: float, body: str, width: float = WIDTH) -> str:
    """An SVG element as wide as its place."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{2 * width:g}px" role="img" '
        f'aria-label="{escape(label, quote=True)}">{body}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A label."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def heat_map(
    grid: Sequence[Sequence[float | None]],
    label: str,
    name: Callable[[int, int], str],
    show: Show,
    columns: Sequence[str] | None = None,
) -> str:
    """Layers by columns: blue is above zero, orange below, darker is larger by its square root.

    What is not there has an outline only.
    """
    width = max(map(len, grid), default=0)
    left, top = 22.0, 14.0
    cell = min(22.0, (WIDTH - left) / max(1, width))
    # Few columns make a narrow picture, not wide cells.
    whole = left + cell * width
    largest = max((abs(each) for row in grid for each in row if each is not None), default=0.0)
    tall = min(cell, 16.0)
    parts = []
    every = max(1, -(-len(grid) // 16))
    for row, cells in enumerate(grid):
        y = top + row * tall
        if row % every == 0:
            parts.append(text(left - 4, y + tall * 0.75, str(row), "end", "tick"))
        for column, value in enumerate(cells):
            x = left + column * cell
            place = f'x="{x:.1f}" y="{y:.1f}" width="{cell - 0.8:.1f}" height="{tall - 0.8:.1f}"'
            if value is None:
                parts.append(f'<rect {place} class="none"/>')
                continue
            shade = (abs(value) / largest) ** 0.5 if largest else 0.0
            kind = "down" if value < 0 else "up"
            parts.append(
                f'<rect {place} class="{kind}" fill-opacity="{shade:.3f}" '
                f'data-value="{value!r}"><title>{escape(name(row, column))}: '
                f"{escape(show(value))}</title></rect>"
            )
    every = max(1, -(-width // 16))
    for column in range(0, width, every):
        x = left + (column + 0.5) * cell
        words = str(column) if columns is None else columns[column][: max(1, int(cell / 5))]
        parts.append(text(x, top - 4, words, "middle", "tick"))
    return picture(label, top + len(grid) * tall + 2, "".join(parts), whole)


def bars(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], label: str, show: Show) -> str:
    """Bars left and right of zero, the keys' one under the other for each row's `layer`."""
    most = max((abs(row[key]) for row in rows for key in keys), default=0.0) or 1.0
    left, top, tall = 24.0, 16.0, 5.5
    middle = left + (WIDTH - left) / 2
    reach = (WIDTH - left) / 2 - 4
    high = tall * len(keys) + 3
    parts = [
        f'<line x1="{middle}" x2="{middle}" y1="{top}" y2="{top + high * len(rows)}" class="rule"/>'
    ]
    for number, row in enumerate(rows):
        y = top + number * high
        parts.append(text(left - 4, y + high * 0.65, str(row["layer"]), "end", "tick"))
        for place, key in enumerate(keys):
            value = row[key]
            length = reach * abs(value) / most
            x = middle if value >= 0 else middle - length
            parts.append(
                f'<rect x="{x:.1f}" y="{y + place * tall:.1f}" width="{max(0.4, length):.1f}" '
                f'height="{tall - 0.6:.1f}" class="bar{place}" data-value="{value!r}"><title>layer '
                f"{row['layer']}, {escape(key)}: {escape(show(value))}</title></rect>"
            )
    parts.append(text(middle, top - 5, "0", "middle", "tick"))
    parts.append(text(WIDTH - 2, top - 5, f"+{most:.2g}", "end", "tick"))
    parts.append(text(left, top - 5, f"-{most:.2g}", "start", "tick"))
    return picture(label, top + high * len(rows) + 2, "".join(parts))


def lines(
    xs: Sequence[int],
    series: Mapping[str, Sequence[float]],
    level: float,
    label: str,
    show: Show,
    bounds: tuple[float, float] | None = None,
) -> str:
    """A line a series over the numbers of neurons, evenly spaced; `level` is the whole model's."""
    values = [each for line in series.values() for each in line] + [level]
    low, high = bounds or (min(values), max(values))
    high = high if high > low else low + 1.0
    left, top, tall = 40.0, 10.0, 130.0

    def y(value: float) -> float:
        return round(top + tall * (high - value) / (high - low), 1)

    def x(place: int) -> float:
        return round(left + 10 + (WIDTH - left - 20) * place / max(1, len(xs) - 1), 1)

    parts = [
        f'<line x1="{left}" x2="{WIDTH}" y1="{y(level)}" y2="{y(level)}" class="rule" '
        f'stroke-dasharray="4 3"/>',
        text(left - 4, y(high) + 4, f"{high:.3g}", "end", "tick"),
        text(left - 4, y(low) + 4, f"{low:.3g}", "end", "tick"),
    ]
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x(i)},{y(value)}" for i, value in enumerate(line))
        parts.append(f'<polyline points="{path}" class="line{number}"/>')
        for i, value in enumerate(line):
            parts.append(
                f'<circle cx="{x(i)}" cy="{y(value)}" r="3" class="dot{number}" '
                f'data-value="{value!r}"><title>{escape(name)}, {xs[i]} neurons: '
                f"{escape(show(value))}</title></circle>"
            )
    parts += [text(x(i), top + tall + 14, f"{n}", "middle", "tick") for i, n in enumerate(xs)]
    return picture(label, top + tall + 20, "".join(parts))
