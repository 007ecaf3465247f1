"""One search, as scores of the units it looked at: what stays is what ranks first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prune_edit.errors import PlanError
from prune_edit.scoring import Scores, predicted_targets
from prune_edit.selection.gates import learn_gates
from prune_edit.selection.greedy import EXAMPLES, Greedy
from prune_edit.tasks.combine import first

if TYPE_CHECKING:
    from prune_edit.recovery import Recovery


def search(
    recovery: Recovery, scores: Scores, heads: int, neurons: int | None
) -> dict[str, torch.Tensor]:
    """Ranks of `heads` (L, H) and `neurons` (L, N) by the recovery's search, larger for better.

    `greedy` looks at heads; neurons keep the size of their `scores` there. NaN marks absent units.
    Raises PlanError for rules that a search cannot keep.
    """
    dense, options = recovery.dense, recovery.options
    train = recovery.data.train()
    if recovery.select == "gates":
        means = recovery.scoring
        odds = learn_gates(dense, train, means, heads, neurons, options)
        ranks = [each - each.nan_to_num(torch.inf).min() + 1 for each in odds]
        every = torch.where(scores.heads.isnan(), torch.nan, 1.0)
        return {"heads": every if ranks[0].isnan().all() else ranks[0], "neurons": ranks[1]}
    if recovery.rules.kv != "pad":
        raise PlanError(
            f"--select greedy adds heads one by one and cannot --kv {recovery.rules.kv}; leave one "
            "of them out"
        )
    prompts = first(train, recovery.data.limit or EXAMPLES)
    if recovery.target == "predicted":
        prompts = predicted_targets(dense, prompts, options)
    found = torch.where(scores.heads.isnan(), torch.nan, 0.0)
    for rank, (layer, head) in enumerate(Greedy(dense, prompts, options).forward(heads)):
        found[layer, head] = heads - rank
    return {"heads": found, "neurons": scores.neurons.abs()}
