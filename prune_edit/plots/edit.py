"""An edit: the bias of every answer before and after, and what the guards paid for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_edit.plots.style import BLACK, BLUE, ORANGE, files, picture


def draw_edit(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`edit.png` and `.svg` of an edit's report: bias by answer, damage against reduction."""
    height = max(3.6, 0.2 * len(report["answers"]) + 1.4)
    with picture(folder, "edit", 9.5, height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _dumbbell(left, report["answers"])
        _reduction(right, report["curve"])
        figure.suptitle(f"{report['model']}, concept {report['concept']}", x=0.01, ha="left")
    return files(folder, "edit")


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
