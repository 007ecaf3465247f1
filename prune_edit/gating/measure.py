"""Measure what the rules name, each thing once, on the model and on its base alike."""

from __future__ import annotations

from collections.abc import Callable

from prune_edit.gating.bench import Bench
from prune_edit.gating.measured import Measured
from prune_edit.gating.of_data_sets import data_set_figure
from prune_edit.gating.of_models import (
    cost_figure,
    lm_eval_figure,
    perplexity_figure,
    speed_figure,
)
from prune_edit.gating.of_tasks import concept_figure, task_figure
from prune_edit.gating.rules import Rule

_SOURCES: dict[str, Callable[[Bench, Rule], Measured]] = {
    "task": task_figure,
    "concept": concept_figure,
    "data set": data_set_figure,
    "perplexity": perplexity_figure,
    "cost": cost_figure,
    "speed": speed_figure,
    "lm-eval": lm_eval_figure,
}


def measure(bench: Bench, rule: Rule) -> Measured:
    """The rule's figure. Raises TaskError or GateError where it cannot be measured."""
    return _SOURCES[rule.kind.source](bench, rule)
