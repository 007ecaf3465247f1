"""Gates: which units stay, learned by gradient while the weights are frozen.

Every unit has a hard-concrete gate (Louizos et al., arXiv 1712.01312), which is 0 or 1 most of the
time and has a gradient; a closed gate replaces the unit by its mean. The gates that disturb the
dense model's answers least are learned together, so that they know of each other, as CoFi (arXiv
2204.00408) and Sheared LLaMA (arXiv 2310.06694) do. Those steer the number of open gates by
Lagrange multipliers. Here all gates share an offset that makes the expected number of open ones
the budget in every step, and the gradient is that along this constraint: a gate opens only where
another closes, and no multiplier has to be tuned. The budget falls geometrically from everything
to what was asked for, and stays there for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import answers_only, blend, head_factors, neuron_factors
from prune_edit.recover.draw import Draw
from prune_edit.recover.teacher import Teacher
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import Moments, moments
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.units import Units

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3  # of the hard concrete, as in arXiv 1712.01312
_SHIFT = _TEMPERATURE * math.log(-_LOW / _HIGH)
_BISECTIONS = 60


@dataclass(frozen=True)
class GateTraining:
    """How long and how hard gates are learned; `falling` is the share of steps with more units."""

    steps: int = 500
    batch: int = 64
    learning_rate: float = 0.1
    falling: float = 0.6


def learn_gates(
    dense: Decoder,
    prompts: Sequence[Encoded],
    averaged: Sequence[Encoded] | None,
    heads: int | None,
    neurons: int | None,
    options: Options,
    training: GateTraining | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log odds of each gate, heads (L, H) and neurons (L, N), at these budgets; the best stay.

    None leaves a kind of unit alone, NaN in the result. Units are replaced by their means over the
    prompts `averaged`, by zero without. Neurons of other layers than `layers` are left alone, and
    are part of the budget. The loss is the divergence of the answers' distribution from the dense
    model's, in nats a token, so that labels are not needed. Seeded.
    """
    training = training or GateTraining()
    gates = [
        _Gates(present(dense.layout.heads, dense.head_shape), heads, training),
        _Gates(present(dense.layout.neurons, dense.neuron_shape), neurons, training, layers),
    ]
    learned = [gate.odds for gate in gates if gate.budget is not None]
    if not learned:
        return gates[0].result(), gates[1].result()
    seen = None if averaged is None else moments(dense, averaged, options, "means")
    teacher = Teacher(dense)
    teacher.expect(prompts)
    optimizer = torch.optim.Adam(learned, lr=training.learning_rate, betas=(0.9, 0.98))
    noise = torch.Generator().manual_seed(options.seed)
    draw = Draw(prompts, torch.Generator().manual_seed(options.seed))
    for step in range(training.steps):
        rows = sorted(draw.some(training.batch), key=lambda row: len(row.ids))
        wanted = teacher.log_probs(teacher.states(rows)[:, -1])
        with torch.enable_grad():
            units = Units(*(gate.sampled(step, noise) for gate in gates))
            loss = _divergence(dense, rows, units, seen, wanted)
            optimizer.zero_grad(set_to_none=True)
            grads = torch.autograd.grad(loss, learned)
        for odds, grad in zip(learned, grads, strict=True):
            odds.grad = grad
        optimizer.param_groups[0]["lr"] = training.learning_rate * _fading(step, training)
        optimizer.step()
        options.progress("gates", step + 1, training.steps)
    return gates[0].result(), gates[1].result()


def present(kept: Sequence[Sequence[int]], shape: tuple[int, ...]) -> torch.Tensor:
    """Which units of a layers x units `shape` are there."""
    there = torch.zeros(shape, dtype=torch.bool)
    for layer, units in enumerate(kept):
        there[layer, list(units)] = True
    return there


def _fading(step: int, training: GateTraining) -> float:
    """The learning rate's share: whole while the budget falls, then down to a twentieth."""
    first = training.falling * training.steps
    return 1.0 if step < first else max(0.05, (training.steps - step) / (training.steps - first))


class _Gates:
    """The gates of one kind of unit; no gate is learned without a budget."""

    def __init__(
        self,
        there: torch.Tensor,
        budget: int | None,
        training: GateTraining,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.there, self.training = there, training
        self.present = there.clone()
        if layers is not None:
            self.present[[layer for layer in range(len(there)) if layer not in layers]] = False
        self.total = int(self.present.sum())
        if budget is not None:
            budget = max(1, budget - int(there.sum()) + self.total)
        self.budget = None if budget is None or budget >= self.total else budget
        self.odds = torch.zeros(there.shape, requires_grad=True)

    def sampled(self, step: int, noise: torch.Generator) -> torch.Tensor | None:
        """A factor for every unit, (L, U): absent units 0; None where no gate is learned."""
        if self.budget is None:
            return None
        share = min(1.0, (step + 1) / max(1.0, self.training.falling * self.training.steps))
        start = 0.97 * self.total  # a gate that is surely open has no gradient
        target = start ** (1 - share) * self.budget**share
        offset = _offset(self.odds[self.present], target)
        uniform = torch.rand(self.odds.shape, generator=noise).clamp(1e-6, 1 - 1e-6)
        logistic = uniform.log() - (1 - uniform).log()
        gate = torch.sigmoid((logistic + self.odds - offset) / _TEMPERATURE)
        stretched = (gate * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        return torch.where(self.present, stretched, self.there.float())

    def result(self) -> torch.Tensor:
        """Log odds; NaN for absent units, and for all where no gate was learned."""
        learned = self.present if self.budget is not None else torch.zeros_like(self.present)
        return torch.where(learned, self.odds.detach(), torch.nan)


def open_chance(odds: torch.Tensor) -> torch.Tensor:
    """The chance that a gate is not 0, arXiv 1712.01312 eq. 12."""
    return torch.sigmoid(odds - _SHIFT)


def _offset(odds: torch.Tensor, target: float) -> torch.Tensor:
    """What all odds are lowered by so that `target` gates are open on average; differentiable.

    The implicit gradient of the constraint: `d offset = sum p' d odds / sum p'`.
    """
    fixed = odds.detach().double()
    low, high = float(fixed.min()) - 40, float(fixed.max()) + 40
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(open_chance(fixed - middle).sum()) > target:
            low = middle
        else:
            high = middle
    chance = open_chance(fixed - high).float()
    slope = chance * (1 - chance)
    return high + ((odds - odds.detach()) * slope).sum() / slope.sum().clamp(min=1e-8)


def _divergence(
    dense: Decoder,
    rows: Sequence[Encoded],
    units: Units,
    means: Moments | None,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """KL divergence from the dense model's answers (A, V) with units scaled, nats a token."""
    batch = collate(rows).to(dense.device)
    with ExitStack() as stack:
        for layer in range(dense.n_layers):
            for part, projection, factors in (
                ("heads", dense.attention_output(layer), head_factors(dense, units, layer)),
                ("neurons", dense.ffn_output(layer), neuron_factors(dense, units, layer)),
            ):
                if projection is not None and factors is not None:
                    constant: torch.Tensor | float = 0.0
                    if means is not None:
                        constant = means.mean(part, layer).float().to(dense.device)
                    stack.enter_context(blend(projection, factors.to(dense.device), constant))
        stack.enter_context(answers_only(dense, batch))
        final = dense.final_states(**batch.inputs)[batch.rows, batch.columns]
    found = dense.unembed(final).float().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum() / len(wanted)
