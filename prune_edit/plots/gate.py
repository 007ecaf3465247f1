"""A verdict: every bound with the interval that is held against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_edit.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, files, picture
from prune_edit.report.html import allowed
from prune_edit.report.words import asked, of_bound, state, tally, title

_SHOWN = 30  # bounds; the rest is in gate.json
_LOOKS = {  # by colour and by mark, for those who do not tell colours apart
    "passed": (BLUE, "o"),
    "blocked": (RED, "X"),
    "warning": (ORANGE, "^"),
    "info": (PINK, "D"),
}


def draw_gate(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """`gate.png` and `.svg` of gate.json's content: a line a bound; shaded is what is allowed.

    No file where no rule has a bound.
    """
    rows = [(rule, check) for rule in found["rules"] for check in rule["checks"]]
    if not rows:
        return []
    shown = rows[:_SHOWN]
    with picture(folder, "gate", 7.5, 0.82 * len(shown) + 0.9) as figure:
        grid = figure.subplots(len(shown), 1, squeeze=False)
        for axes, (rule, check) in zip(grid.flat, shown, strict=True):
            _bound(axes, rule, check)
        more = f"; {len(rows) - _SHOWN} more bounds in gate.json" if len(rows) > _SHOWN else ""
        figure.suptitle(
            f"{title(found)}\n{tally(found)}{more}; bars are 95 % intervals, shaded is allowed",
            x=0.01, ha="left", fontsize=9,
        )  # fmt: skip
    return files(folder, "gate")


def _bound(axes: Any, rule: Mapping[str, Any], check: Mapping[str, Any]) -> None:
    """One bound on an axis of its own unit."""
    colour, mark = _LOOKS[state(rule) if not check["met"] else "passed"]
    low, high = check["interval"]
    ends = allowed(check, rule)
    points = [low, high, check["value"], *(end for end in ends if end is not None)]
    left, right = min(points), max(points)
    margin = 0.12 * (right - left) or max(abs(left), 1.0) * 0.1
    axes.set_xlim(left - margin, right + margin)
    edges = axes.get_xlim()
    inside = [edge if end is None else end for end, edge in zip(ends, edges, strict=True)]
    axes.axvspan(*inside, color=GREEN, alpha=0.14, linewidth=0)
    for end in ends:
        if end is not None:
            axes.axvline(end, color=GREY, linewidth=1)
    axes.plot([low, high], [0, 0], color=colour, linewidth=4, alpha=0.55, solid_capstyle="butt")
    axes.plot(check["value"], 0, mark, color=colour, markersize=8)
    axes.set_yticks([])
    axes.set_ylim(-1, 1)
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=7, length=2)
    axes.xaxis.set_major_locator(_ticks())
    unit = rule["unit"]
    axes.xaxis.set_major_formatter(lambda value, _: of_bound(check["bound"], value, unit))
    met = "met" if check["met"] else "missed"
    name = " ".join(str(rule["name"]).split())
    axes.set_title(
        f"{name[:70]}: {asked(check, rule)}, {met}", loc="left", fontsize=8, parse_math=False
    )


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
