"""Accuracy by budget for several selections, a panel each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_edit.plots.style import COLOURS, GREY, MARKS, files, picture

Line = list[tuple[float, float, float, float]]
"""Points (x, y, low, high)."""


def draw_selections(
    panels: list[tuple[str, str, dict[str, Line]]], dense: float, folder: Path, name: str
) -> list[Path]:
    """`NAME.png` and `.svg`: accuracy by budget, a panel each (title, x's label, lines by name).

    Random choice is drawn as a band from its least to its best; `dense` is the level to keep.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(line for *_, lines in panels for line in lines))
    with picture(folder, name, 3.4 * columns, 3.1 * rows + 0.7) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_axis_off()
                continue
            _panel(axes, *panels[place], names, dense)
            if place % columns == 0:
                axes.set_ylabel("test accuracy, %")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        for axes in grid.flat:
            more = zip(*axes.get_legend_handles_labels(), strict=True)
            for handle, label in more:
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return files(folder, name)


def _panel(
    axes: Any, title: str, label: str, lines: dict[str, Line], names: list[str], dense: float
) -> None:
    ticks = sorted({point[0] for line in lines.values() for point in line})
    for line, points in lines.items():
        points = sorted(points)
        xs, ys = [p[0] for p in points], [100 * p[1] for p in points]
        lows, highs = [100 * p[2] for p in points], [100 * p[3] for p in points]
        if line == "random":
            axes.fill_between(xs, lows, highs, color=GREY, alpha=0.35, linewidth=0)
            axes.plot(xs, ys, color="#666666", linestyle=":", label="random (range)")
            continue
        at = names.index(line)
        off = [[y - low for y, low in zip(ys, lows, strict=True)]]
        off.append([high - y for y, high in zip(ys, highs, strict=True)])
        axes.errorbar(
            xs, ys, yerr=off, color=COLOURS[at % len(COLOURS)], marker=MARKS[at % len(MARKS)],
            markersize=4, linewidth=1.2, elinewidth=0.6, label=line,
        )  # fmt: skip
    axes.axhline(100 * dense, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylim(-2, 102)
