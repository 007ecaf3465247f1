"""Pictures: one house style for all, PNG and SVG. Needs the extra `plot`."""

from prune_edit.plots.edit import draw_edit
from prune_edit.plots.frontier import draw_frontier
from prune_edit.plots.gate import draw_gate
from prune_edit.plots.selections import Line, draw_selections
from prune_edit.plots.style import MISSING, available, files
from prune_edit.plots.units import draw_curves, draw_heat_maps

__all__ = [
    "MISSING",
    "Line",
    "available",
    "draw_curves",
    "draw_edit",
    "draw_frontier",
    "draw_gate",
    "draw_heat_maps",
    "draw_selections",
    "files",
]
