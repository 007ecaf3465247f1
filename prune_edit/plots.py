"""Pictures: one house style for all, PNG and SVG. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def draw_edit(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`edit.png` and `.svg` of an edit's report: bias by answer, damage against reduction."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        height = max(3.6, 0.2 * len(report["answers"]) + 1.4)
        figure = Figure(figsize=(9.5, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _dumbbell(left, report["answers"])
        _reduction(right, report["curve"])
        figure.suptitle(f"{report['model']}, concept {report['concept']}", x=0.01, ha="left")
        paths = [folder / "edit.png", folder / "edit.svg"]
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    return paths


def _dumbbell(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bias of every answer before and after, a line each, the groups' names behind."""
    for place, row in enumerate(reversed(rows)):
        axes.plot([row["before"], row["after"]], [place, place], color="#bbbbbb", zorder=1)
    places = range(len(rows))
    for key, colour in (("before", ORANGE), ("after", BLUE)):
        axes.scatter([row[key] for row in reversed(rows)], places, color=colour, s=18, label=key)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(places, [f"{row['answer']} ({row['group']})" for row in reversed(rows)])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("bias (nats)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _reduction(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Divergence on the guards against the share of bias that is gone, the edit done in part."""
    xs = [100 * row["reduction"] for row in rows]
    axes.plot(xs, [row["damage"] for row in rows], marker="o", color=BLUE)
    for row, x in zip(rows, xs, strict=True):
        axes.annotate(
            f"{row['part']:.0%}", (x, row["damage"]), (4, -10), textcoords="offset points",
            fontsize=7,
        )  # fmt: skip
    axes.set_xlabel("bias gone on validation pairs (%)")
    axes.set_ylabel("divergence on guard prompts (nats a token)")
    axes.set_title("the edit done in part", loc="left", fontsize=9)


Line = list[tuple[float, float, float, float]]
"""Points (x, y, low, high)."""


def draw_selections(
    panels: list[tuple[str, str, dict[str, Line]]], dense: float, folder: Path, name: str
) -> list[Path]:
    """`NAME.png` and `.svg`: accuracy by budget, a panel each (title, x's label, lines by name).

    Random choice is drawn as a band from its least to its best; `dense` is the level to keep.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(line for *_, lines in panels for line in lines))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * columns, 3.1 * rows + 0.7), layout="constrained")
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
        paths = [folder / f"{name}.png", folder / f"{name}.svg"]
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    return paths


_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", BLACK)
_MARKS = "osD^vP*X<>"


def _panel(
    axes: Any, title: str, label: str, lines: dict[str, Line], names: list[str], dense: float
) -> None:
    ticks = sorted({point[0] for line in lines.values() for point in line})
    for line, points in lines.items():
        points = sorted(points)
        xs, ys = [p[0] for p in points], [100 * p[1] for p in points]
        lows, highs = [100 * p[2] for p in points], [100 * p[3] for p in points]
        if line == "random":
            axes.fill_between(xs, lows, highs, color="#999999", alpha=0.35, linewidth=0)
            axes.plot(xs, ys, color="#666666", linestyle=":", label="random (range)")
            continue
        at = names.index(line)
        off = [[y - low for y, low in zip(ys, lows, strict=True)]]
        off.append([high - y for y, high in zip(ys, highs, strict=True)])
        axes.errorbar(
            xs, ys, yerr=off, color=_COLOURS[at % len(_COLOURS)], marker=_MARKS[at % len(_MARKS)],
            markersize=4, linewidth=1.2, elinewidth=0.6, label=line,
        )  # fmt: skip
    axes.axhline(100 * dense, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylim(-2, 102)
