"""One search, as scores of the units it looked at: what stays is what ranks first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from prune_edit.errors import PlanError
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.least_squares import check_refittable
from prune_edit.scoring import Scores, predicted_targets
from prune_edit.selection.gates import learn_gates, present
from prune_edit.selection.greedy import EXAMPLES, Greedy
from prune_edit.tasks.combine import balanced

_SURE, _SURE_COUNT = 2, 24
"""Heads go in rounds down to so many times what is to stay, or so many; from there one by one."""

if TYPE_CHECKING:
    from prune_edit.recovery import Recovery


def search(
    recovery: Recovery, scores: Scores, heads: int, neurons: int | None
) -> dict[str, torch.Tensor]:
    """Ranks of `heads` (L, H) and `neurons` (L, N) by the recovery's search, larger for better.

    `greedy` takes heads one by one and leaves neurons to gates, learned with all heads there. NaN
    marks absent units.
    Raises PlanError for rules that a search cannot keep.
    """
    if recovery.select == "gates":
        return _gates(recovery, heads, neurons)
    if recovery.rules.kv not in ("pad", "duplicate"):
        raise PlanError(
            f"--select greedy takes heads one by one and cannot --kv {recovery.rules.kv}; leave "
            "one of them out"
        )
    check_refittable(recovery.dense)
    kept = recovery.workspace.within("greedy")
    found = kept.load_tensors("heads")
    if found is None:
        found = {"heads": _greedy(recovery, scores, heads)}
        kept.save_tensors("heads", found)
    return {**found, "neurons": _gates(recovery, None, neurons)["neurons"]}


def _gates(recovery: Recovery, heads: int | None, neurons: int | None) -> dict[str, torch.Tensor]:
    """Ranks of both kinds by gates; those without a budget all have the same."""
    dense, layers = recovery.dense, recovery.neuron_layers
    odds = learn_gates(
        dense, recovery.data.train(), recovery.means, heads, neurons, recovery.options,
        layers=layers,
    )  # fmt: skip
    kinds = zip(odds, (dense.layout.heads, dense.layout.neurons), strict=True)
    found = [_ranks(each, present(kept, tuple(each.shape))) for each, kept in kinds]
    return {"heads": found[0], "neurons": found[1]}


def _ranks(odds: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Odds as ranks above zero; all alike where units are there and no gate was learned."""
    least = odds.nan_to_num(nan=torch.inf).min()
    return torch.where(odds.isnan(), 1.0, odds - least + 1).masked_fill(~there, torch.nan)


def _greedy(recovery: Recovery, scores: Scores, count: int) -> torch.Tensor:
    """Ranks (L, H): heads go in rounds with least squares as far as is safe, then one by one."""
    dense, options = recovery.dense, recovery.options
    there = torch.where(scores.heads.isnan(), torch.nan, 0.0)
    width = dense.head_shape[1]
    every = frozenset((~there.isnan()).flatten().nonzero()[:, 0].tolist())
    few = max(_SURE_COUNT, _SURE * count)
    if few < len(every):
        schedule = Schedule.of("least-squares")
        rounds = replace(recovery, recovered="least-squares", schedule=schedule).in_rounds()
        small = gradual(replace(rounds, workspace=recovery.workspace.within("greedy")), few)
        every = frozenset(
            layer * width + head for layer, heads in enumerate(small.layout.heads) for head in heads
        )
    prompts = balanced(recovery.data.train(), recovery.data.limit or EXAMPLES)
    if recovery.target == "predicted":
        prompts = predicted_targets(dense, prompts, options)
    order = Greedy(dense, prompts, options).backward(every, count)
    for unit in every:
        there[divmod(unit, width)] = len(order) + 1.0
    for rank, unit in enumerate(order):
        there[divmod(unit, width)] = rank + 1.0
    return there
