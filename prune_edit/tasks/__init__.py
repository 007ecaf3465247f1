"""Tasks: what a model is pruned for, and what it should keep."""

from prune_edit.tasks.combine import CombinedTask, combine
from prune_edit.tasks.registry import BUILT_IN, RETAINED, load_task, name_of
from prune_edit.tasks.task import Example, Task

__all__ = [
    "BUILT_IN",
    "RETAINED",
    "CombinedTask",
    "Example",
    "Task",
    "combine",
    "load_task",
    "name_of",
]
