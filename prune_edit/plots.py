"""Pictures: one house style for all, PNG and SVG. Needs the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_edit.frontier import Frontier

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "prune-edit",  # the same picture has the same bytes
    "figure.dpi": 150,
}


def available() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw_frontier(frontier: Frontier, folder: Path) -> list[Path]:
    """`frontier.png` and `.svg`: accuracy against parameters, random selection beside it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Not by pyplot, whose backend is the caller's.
        figure = Figure(figsize=(7.0, 4.8), layout="constrained")
        _fill(figure.subplots(), frontier)
        paths = [folder / "frontier.png", folder / "frontier.svg"]
        for path in paths:
            # No date inside, so that the same frontier has the same bytes.
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    return paths


def _fill(axes: Any, frontier: Frontier) -> None:
    dense, points = frontier.dense, frontier.points
    top = max(point.neurons for point in (dense, *points))
    series = sorted({point.neurons for point in points}, reverse=True)
    colours = (BLUE, GREEN, "#CC79A7", "#D55E00", "#56B4E9")
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
