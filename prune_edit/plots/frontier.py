"""A frontier: accuracy against parameters, the knee, and random selections beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_edit.plots.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, files, picture

if TYPE_CHECKING:
    from prune_edit.frontier import Frontier


def draw_frontier(frontier: Frontier, folder: Path) -> list[Path]:
    """`frontier.png` and `.svg`: accuracy against parameters, random selection beside it."""
    with picture(folder, "frontier", 7.0, 4.8) as figure:
        _fill(figure.subplots(), frontier)
    return files(folder, "frontier")


def _fill(axes: Any, frontier: Frontier) -> None:
    dense, points = frontier.dense, frontier.points
    top = max(point.neurons for point in (dense, *points))
    series = sorted({point.neurons for point in points}, reverse=True)
    colours = (BLUE, GREEN, PINK, RED, SKY)
    for number, neurons in enumerate(series):
        own = [point for point in points if point.neurons == neurons]
        xs = [point.parameters / 1e6 for point in own]
        ys = [100 * point.accuracy for point in own]
        low = [100 * (point.accuracy - point.interval[0]) for point in own]
        high = [100 * (point.interval[1] - point.accuracy) for point in own]
        label = f"{frontier.method}, " + (
            "all neurons" if neurons == top else f"{neurons:,} of {top:,} neurons"
        )
        colour = colours[number % len(colours)]
        axes.errorbar(
            xs, ys, [low, high], marker="o", capsize=2, linewidth=1.4, color=colour, label=label
        )
        if number == 0:
            for point, x, y in zip(own, xs, ys, strict=True):
                axes.annotate(
                    f"{point.heads} heads", (x, y), (5, -11), textcoords="offset points", fontsize=8
                )
    drawn = [(p.parameters / 1e6, 100 * value) for p in points for value in p.random]
    if drawn:
        label = "random units, same budget and recovery"
        axes.plot(*zip(*drawn, strict=True), "x", color=ORANGE, markersize=5, label=label)
    axes.plot(dense.parameters / 1e6, 100 * dense.accuracy, "s", color=BLACK, label="dense model")
    knee = frontier.knee
    axes.plot(
        knee.parameters / 1e6, 100 * knee.accuracy, "o", markersize=13, markerfacecolor="none",
        markeredgecolor=BLACK, label="knee (by validation)",
    )  # fmt: skip
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("test accuracy (%), 95 % intervals")
    axes.set_ylim(-3, 105)
    axes.set_title(f"{frontier.task}: recovery {frontier.recover}", loc="left", fontsize=10)
    axes.figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
