"""The house style of every picture, and how one is written: PNG and SVG, the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
PINK, RED, SKY, YELLOW = "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"
GREY = "#999999"
COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY, YELLOW, BLACK)
MARKS = "osD^vP*X<>"
"""A mark a line: what colour says, shape says, too."""

STYLE: Any = {
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

MISSING = "no picture: matplotlib is missing (pip install 'prune-edit[plot]')"
"""What a verb notes where pictures cannot be drawn."""


def available() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def files(folder: Path, name: str) -> list[Path]:
    """The files of a picture."""
    return [folder / f"{name}.png", folder / f"{name}.svg"]


@contextmanager
def picture(folder: Path, name: str, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches to draw on, written to `files` when the block ends well."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        # Not by pyplot, whose backend is the caller's.
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for path in files(folder, name):
            # No date inside, so that the same values have the same bytes.
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
