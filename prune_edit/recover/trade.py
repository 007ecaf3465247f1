"""Heads and neurons under one budget: ranked by a method, priced in one currency.

A method ranks units of a kind well without saying what a head is worth in neurons: an ablated head
loses all that it feeds, importance is a neuron's direct effect alone, and others have no unit at
all. So only ranks are the method's. The price of the unit of each rank is that of the same rank by
the first-order effect on the answer's log probability (`scoring/taylor.py`), which is in nats, the
same for both kinds, for one backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prune_edit.allocate import Block
from prune_edit.costs import Cost
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept
from prune_edit.rules import Rules
from prune_edit.scoring import METHODS, Options
from prune_edit.scoring.blocks import block_worths, worth_of
from prune_edit.scoring.combine import weighted
from prune_edit.scoring.statistics import Moments, moments
from prune_edit.tasks.prompts import Encoded


def priced(scores: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
    """The scores' order (L, U) with the prices' numbers; float64, NaN for absent units of either.

    Ties go to the first layer, and there to the first unit.
    """
    flat = scores.double().flatten()
    there = (~(flat.isnan() | prices.flatten().isnan())).nonzero()[:, 0]
    order = there[flat[there].argsort(descending=True, stable=True)]
    found = torch.full_like(flat, torch.nan)
    found[order] = prices.double().flatten()[there].sort(descending=True).values
    return found.view(scores.shape)


def trade(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    scores: tuple[torch.Tensor, torch.Tensor],
    rules: Rules,
    options: Options,
    by_mean: bool = True,
    budget: Cost | None = None,
) -> tuple[Kept, Kept]:
    """The heads and neurons that stay within the rules' budget, or a larger one on the way to it.

    `scores` (L, H), (L, N) rank them, neurons by size. `by_mean` says what removed units leave,
    where whole blocks are tried. Raises BudgetError where no head fits.
    """
    plain = replace(options, neurons=True, measure="logprob", integrated_steps=1)
    prices = weighted(lambda rows: METHODS["taylor"](decoder, rows, plain), prompts)
    heads, neurons = priced(scores[0], prices[0]), priced(scores[1].abs(), prices[1])
    kept = rules.units(heads, neurons, budget)
    if not rules.whole_blocks:
        return kept
    means = moments(decoder, prompts, options, "means") if by_mean else None
    return _without_blocks(decoder, prompts, kept, (heads, neurons), rules, plain, means, budget)


def _without_blocks(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    kept: tuple[Kept, Kept],
    scores: tuple[torch.Tensor, torch.Tensor],
    rules: Rules,
    options: Options,
    means: Moments | None,
    budget: Cost | None,
) -> tuple[Kept, Kept]:
    """The units with blocks left out whose cost serves the answer better elsewhere.

    Each block in turn, the one whose loss alone is least first, is tried for real: the answers' log
    probability with what the budget keeps without it.
    """
    closed: set[Block] = set()
    most = worth_of(decoder, prompts, options, *kept, means)
    worths = block_worths(decoder, prompts, options, means)
    for block in sorted(worths, key=lambda block: -worths[block]):
        layer, part = block
        if not kept[part][layer]:
            continue
        try:
            fewer = rules.units(*scores, budget, {*closed, block})
        except BudgetError:  # the last heads
            continue
        found = worth_of(decoder, prompts, options, *fewer, means)
        if found > most:
            kept, most = fewer, found
            closed.add(block)
    return kept
