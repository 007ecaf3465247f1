"""What answers are worth in a model whose units are scaled, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import scale
from prune_edit.running import Running, answer_log_probs, best_tokens, numbered
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units


@dataclass(frozen=True)
class Answers:
    """Of each prompt (P,): the answer's summed log probability in nats, and whether all of its
    tokens are the arg-max.
    """

    log_probs: torch.Tensor
    right: torch.Tensor

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(self.right.double().mean())

    @property
    def log_prob(self) -> float:
        """Mean log probability of the answer, in nats."""
        return float(self.log_probs.double().mean())


@torch.no_grad()
def answers_with(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    running: Running,
    what: str = "answers",
    units: Callable[[list[int]], Units] | None = None,
) -> Answers:
    """Run the prompts; `units` gives the factors for the prompts of these numbers."""
    log_probs = torch.zeros(len(prompts), dtype=torch.float64)
    misses = torch.zeros(len(prompts))
    for numbers, batch in numbered(decoder, prompts, running, what):
        with scale(decoder, Units() if units is None else units(numbers)):
            states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        owners = torch.tensor(numbers)[batch.rows.cpu()]
        found = answer_log_probs(decoder, states, batch.targets).double().cpu()
        log_probs.index_add_(0, owners, found)
        wrong = best_tokens(decoder, states) != batch.targets
        misses.index_add_(0, owners, wrong.float().cpu())
    return Answers(log_probs, misses == 0)
