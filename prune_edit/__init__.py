"""Task-specific pruning and editing of language models.

The verbs of the command line, as functions: `score`, `plan`, `apply`, `prune`, `sweep`,
`edit`, `evaluate`, `gate`, `verify`, `export`; `prune_edit.explain` is a room of functions, and
`verbs.explain` the command.
Importing the package loads neither torch nor transformers; a verb does when it is first used.
Ragged checkpoints load in transformers without remote code once the package is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prune_edit.errors import PruneEditError
from prune_edit.modeling import register_on_import
from prune_edit.tasks import Example, Task, load_task

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prune_edit.decoder import Decoder
    from prune_edit.evaluation.comparison import Comparison, Evaluation
    from prune_edit.loading import load_decoder
    from prune_edit.planning import Budget, Plan
    from prune_edit.scoring import Scores
    from prune_edit.verbs import (
        apply,
        edit,
        evaluate,
        export,
        gate,
        plan,
        prune,
        score,
        sweep,
        undo,
        verify,
    )

_HOMES = {
    "Budget": "prune_edit.planning",
    "Comparison": "prune_edit.evaluation.comparison",
    "Decoder": "prune_edit.decoder",
    "Evaluation": "prune_edit.evaluation.comparison",
    "Plan": "prune_edit.planning",
    "Scores": "prune_edit.scoring",
    "load_decoder": "prune_edit.loading",
    **dict.fromkeys(
        (
            "apply",
            "edit",
            "evaluate",
            "export",
            "gate",
            "plan",
            "prune",
            "score",
            "sweep",
            "undo",
            "verify",
        ),
        "prune_edit.verbs",
    ),
}

__all__ = [
    "Budget",
    "Comparison",
    "Decoder",
    "Evaluation",
    "Example",
    "Plan",
    "PruneEditError",
    "Scores",
    "Task",
    "__version__",
    "apply",
    "edit",
    "evaluate",
    "export",
    "gate",
    "load_decoder",
    "load_task",
    "plan",
    "prune",
    "score",
    "sweep",
    "undo",
    "verify",
]

register_on_import()


def __getattr__(name: str) -> Any:
    """Load a public name from its home when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
