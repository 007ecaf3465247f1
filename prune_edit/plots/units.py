"""Values of heads, layers by heads, as heat maps; and curves over layers or numbers of units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_edit.plots.style import BLACK, COLOURS, GREY, MARKS, files, picture

_DIVERGING = "PuOr_r"  # both ends are told apart by colour-blind readers
_ABSENT = "#c8c8c8"


def draw_heat_maps(
    panels: Sequence[tuple[str, Sequence[Sequence[float | None]]]],
    unit: str,
    folder: Path,
    name: str,
    *,
    of: str = "head",
) -> list[Path]:
    """`NAME.png` and `.svg`: a heat map a panel (title, rows of a layer each), one scale for all.

    Zero is white, absent units (None, NaN) are grey; `unit` is the scale's label.
    """
    grids = [
        (title, [[math.nan if value is None else value for value in row] for row in rows])
        for title, rows in panels
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    depth, width = len(grids[0][1]), max(map(len, grids[0][1]))
    tall = 3.0 * max(0.55, min(1.6, depth / max(width, 1))) + 0.7
    sizes = [abs(value) for _, values in grids for row in values for value in row]
    most = max((size for size in sizes if not math.isnan(size)), default=0.0) or 1.0
    with picture(folder, name, 3.3 * columns + 0.9, tall * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        shown = None
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_axis_off()
                continue
            shown = _heat(axes, *grids[place], most)
            axes.set_xlabel(of)
            if place % columns == 0:
                axes.set_ylabel("layer")
        figure.colorbar(shown, ax=list(grid.flat), label=unit, shrink=0.8)
    return files(folder, name)


def _heat(axes: Any, title: str, values: Sequence[Sequence[float]], most: float) -> Any:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps[_DIVERGING].with_extremes(bad=_ABSENT)
    shown = axes.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    axes.grid(visible=False)
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    return shown


def draw_curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    folder: Path,
    name: str,
    *,
    title: str = "",
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> list[Path]:
    """`NAME.png` and `.svg`: lines (points x, y) by name, `labels` of the axes with their units.

    `level` is a named horizontal line; `log` scales x.
    """
    with picture(folder, name, 6.0, 4.0) as figure:
        axes = figure.subplots()
        for at, (line, points) in enumerate(lines.items()):
            random = line.startswith("random")
            axes.plot(
                *zip(*sorted(points), strict=True), label=line, linewidth=1.4, markersize=4,
                color=GREY if random else COLOURS[at % len(COLOURS)],
                linestyle=":" if random else "-", marker=MARKS[at % len(MARKS)],
            )  # fmt: skip
        if level is not None:
            axes.axhline(level[1], color=BLACK, linewidth=0.8, linestyle="--", label=level[0])
        if log:
            ticks = sorted({x for points in lines.values() for x, _ in points})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return files(folder, name)
