"""The verbs of the library, the same as the command line's: score, plan, apply, prune, evaluate.

Each takes names or paths and composes the rooms along the flow; none of them prints.
"""

from prune_edit.verbs.applied import apply
from prune_edit.verbs.common import FORMATS, RECOVERIES, check_method
from prune_edit.verbs.edited import edit, undo
from prune_edit.verbs.explained import explain
from prune_edit.verbs.exported import export
from prune_edit.verbs.gated import gate
from prune_edit.verbs.measured import evaluate
from prune_edit.verbs.plans import plan
from prune_edit.verbs.pruned import prune
from prune_edit.verbs.reported import report
from prune_edit.verbs.scores import score
from prune_edit.verbs.swept import sweep
from prune_edit.verbs.verified import verify

__all__ = [
    "FORMATS",
    "RECOVERIES",
    "apply",
    "check_method",
    "edit",
    "evaluate",
    "explain",
    "export",
    "gate",
    "plan",
    "prune",
    "report",
    "score",
    "sweep",
    "undo",
    "verify",
]
