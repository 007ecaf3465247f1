"""Search the least damaging edit that lowers the bias as far as wanted.

Every head and neuron starts with a factor of its own, learned by gradient on the training pairs:
the loss is the pairs' squared bias, as a share of the dense model's, and the divergence from the
dense model on guard prompts by `weight`; a neuron may be moved by a constant, too. In rounds, half
of the units still open are closed (their factor goes back to one), until few enough are
left: those whose effect is worth the least of what they cost the guards. Units that cost much
(`guard.prices`) move little in a step, so that the change goes to those that do nothing else. From
then on bias counts only above what is wanted, so that what remains of the steps lowers
the damage. Checks on validation pairs, which share no prompt and no answer with the others, choose
among the edits seen on the way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit, applied, edit_of, named
from prune_edit.editing.guard import Guards, divergence, log_probs, prices
from prune_edit.editing.probe import Probe
from prune_edit.hooks import scale, shift
from prune_edit.running import Running
from prune_edit.tasks.prompts import Batch, collate
from prune_edit.units import Units

NEURON_FACTORS = (-2.0, 6.0)
HEAD_FACTORS = (0.0, 2.0)
_GUARDS = 3  # drawn in one step
_MARGIN = 0.7  # of the bias that may stay: what training aims at, since validation is harder
_PULL = 3.0  # of bias above the mark
_AVERAGE = 0.8  # of the running mean of first-order effects
_EXPECTED = 0.3  # of the damage that prices foretell, beside that of the drawn prompts
_CHECKS = 10  # steps between checks on validation


@dataclass(frozen=True)
class SearchSettings:
    """What the search may change, and how long it takes.

    `reduce` is the share of the bias that should go, `neurons` and `heads` how many may be changed,
    `weight` what a nat of divergence costs beside the bias as a share; the neurons `protected`
    (L, N) stay.
    """

    reduce: float = 0.9
    neurons: int = 30
    heads: int = 0
    shift: bool = True
    weight: float = 5.0
    round_steps: int = 2
    final_steps: int = 200
    seed: int = 0
    protected: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Check:
    """One edit on the way: bias that is left on validation, as a share, and damage in nats."""

    step: int
    left: float
    damage: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self)


@dataclass
class Search:
    """One search on one model."""

    decoder: Decoder
    train: Probe
    validation: Probe
    guards: Guards
    settings: SearchSettings
    options: Running
    checks: list[Check] = field(default_factory=list)

    def run(self) -> Edit:
        """The best edit of all checks: the least damage of those that reach what is wanted."""
        with _frozen(self.decoder):
            return self._run()

    def _run(self) -> Edit:
        settings = self.settings
        rng = random.Random(settings.seed)
        self._setup()
        counts = _rounds(int(self.open["neurons"].sum()), settings.neurons)
        heads = _rounds(int(self.open["heads"].sum()), settings.heads, len(counts))
        total = len(counts) * settings.round_steps + settings.final_steps
        done = 0
        for neurons, some_heads in zip(counts, heads, strict=True):
            effects = self._steps(settings.round_steps, rng, 0.05, done, total)
            done += settings.round_steps
            self._close("neurons", effects, neurons)
            self._close("heads", effects, some_heads)
        best: tuple[tuple[bool, float], Edit] | None = None
        for start in range(0, settings.final_steps, _CHECKS):
            rate = 0.05 * (1 - 0.9 * start / settings.final_steps)
            self._steps(min(_CHECKS, settings.final_steps - start), rng, rate, done + start, total)
            edit, check = self._edit(), self._check(done + start)
            self.checks.append(check)
            missed = check.left > 1 - settings.reduce
            rank = (missed, check.left if missed else check.damage)
            if best is None or rank < best[0]:
                best = rank, edit
        assert best is not None
        return best[1]

    def _setup(self) -> None:
        decoder = self.decoder
        self.delta, self.open = {}, {}
        self.strayed: dict[str, float] = {}
        for part, shape, kept in (
            ("heads", decoder.head_shape, decoder.layout.heads),
            ("neurons", decoder.neuron_shape, decoder.layout.neurons),
        ):
            there = torch.zeros(shape)
            for layer, units in enumerate(kept):
                there[layer, list(units)] = 1
            if part == "neurons" and self.settings.protected is not None:
                there[self.settings.protected] = 0
            if part == "heads" and not self.settings.heads:
                there.zero_()
            self.open[part] = there
            self.delta[part] = torch.zeros(shape, requires_grad=True)
        self.moved = torch.zeros(decoder.neuron_shape, requires_grad=True)
        self.price = dict(zip(("heads", "neurons"), prices(decoder, self.guards), strict=True))
        self.ease = {part: _ease(price) for part, price in self.price.items()}
        self.optimizer = torch.optim.Adam([*self.delta.values(), self.moved], lr=0.05)
        with torch.no_grad():
            gaps, self.levels = self.train.both(decoder)
            self.before = max(float(gaps.pow(2).mean().sqrt()), 1e-6)
            self.validation_before = max(float(self.validation.gaps(decoder).abs().mean()), 1e-6)

    @contextmanager
    def _as_learned(self) -> Iterator[None]:
        """The model with the factors and constants of the moment."""
        heads = 1 + self.delta["heads"] if self.settings.heads else None
        with ExitStack() as stack:
            stack.enter_context(scale(self.decoder, Units(heads, 1 + self.delta["neurons"])))
            if self.settings.shift:
                stack.enter_context(shift(self.decoder, self.moved))
            yield

    def _steps(
        self, count: int, rng: random.Random, rate: float, done: int, total: int
    ) -> dict[str, torch.Tensor]:
        """So many steps of learning; the running first-order effect of every unit on the bias."""
        settings, parts = self.settings, list(self.delta)
        effects = {part: torch.zeros_like(self.open[part]) for part in parts}
        few = int(self.open["neurons"].sum()) <= settings.neurons
        mark = (1 - settings.reduce) * _MARGIN
        for step in range(count):
            drawn = list(self.guards.draw(rng, _GUARDS, self.strayed))
            batches = [batch.to(self.decoder.device) for _, batch in drawn]
            with torch.no_grad():
                dense = [log_probs(self.decoder, batch) for batch in batches]
            with self._as_learned():
                gaps, levels = self.train.both(self.decoder)
                left = gaps.pow(2).mean() / self.before**2
                fallen = (self.levels - levels).clamp(min=0).mean()
                each = self._damages(batches, dense)
            damage = each.mean() if len(each) else torch.zeros(())
            for (name, _), found in zip(drawn, each.tolist(), strict=True):
                self.strayed[name] = _AVERAGE * self.strayed.get(name, found) + 0.2 * found
            root = (left + 1e-12).sqrt()
            bias = (root - mark).clamp(min=0) * _PULL
            bias = bias + (left if not few else (left - mark**2).clamp(min=0))
            slopes: Sequence[torch.Tensor | None] = [None] * len(parts)
            if not few:  # units are still to be closed
                slopes = torch.autograd.grad(
                    left, list(self.delta.values()), retain_graph=True, allow_unused=True
                )
            self.optimizer.zero_grad()
            expected = sum((p * self.delta[k].pow(2)).sum() / 2 for k, p in self.price.items())
            (bias + settings.weight * (damage + _EXPECTED * expected) + 0.1 * fallen).backward()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            held = {part: each.detach().clone() for part, each in self.delta.items()}
            self.optimizer.step()
            with torch.no_grad():
                for part, slope in zip(parts, slopes, strict=True):
                    low, high = HEAD_FACTORS if part == "heads" else NEURON_FACTORS
                    delta = self.delta[part]
                    delta.sub_(held[part]).mul_(self.ease[part]).add_(held[part])
                    delta.clamp_(low - 1, high - 1).mul_(self.open[part])
                    if slope is not None:
                        cost = settings.weight * self.price[part] * delta.pow(2) / 2
                        effects[part] = _AVERAGE * effects[part] - delta * slope - cost
                self.moved.mul_(self.open["neurons"])
            self.options.progress("searching the edit", done + step + 1, total)
        return effects

    def _damages(self, batches: Sequence[Batch], dense: Sequence[torch.Tensor]) -> torch.Tensor:
        found = [
            divergence(then, log_probs(self.decoder, batch))
            for batch, then in zip(batches, dense, strict=True)
        ]
        return torch.stack(found) if found else torch.zeros(0)

    def _close(self, part: str, effects: dict[str, torch.Tensor], count: int) -> None:
        """Leave open the `count` units whose factors lower the bias most, by first order."""
        scores = effects[part].masked_fill(self.open[part] == 0, -math.inf).flatten()
        order = scores.argsort(descending=True, stable=True)[:count]
        opened = torch.zeros(scores.shape)
        opened[order[scores[order] > -math.inf]] = 1
        self.open[part] = opened.view_as(self.open[part])
        with torch.no_grad():
            self.delta[part].mul_(self.open[part])

    def _edit(self) -> Edit:
        changes = []
        constants = self.moved.detach().tolist()
        for kind, part in (("head", "heads"), ("neuron", "neurons")):
            factors = (1 + self.delta[part].detach()).tolist()
            for layer, unit in self.open[part].nonzero().tolist():
                factor = round(factors[layer][unit], 4)
                moved = round(constants[layer][unit], 5) if kind == "neuron" else 0.0
                changes.append(Change(kind, layer, unit, factor, moved, named(factor)))
        return edit_of(self.decoder, changes)

    @torch.no_grad()
    def _check(self, step: int) -> Check:
        batches = [collate(r).to(self.decoder.device) for r in self.guards.validation.values()]
        dense = [log_probs(self.decoder, batch) for batch in batches]
        with self._as_learned():
            left = float(self.validation.gaps(self.decoder).abs().mean()) / self.validation_before
            return Check(
                step, left, float(self._damages(batches, dense).sum()) / max(1, len(batches))
            )


def _ease(price: torch.Tensor) -> torch.Tensor:
    """How far a unit's factor moves in a step: the less the more it costs, 1 if nothing."""
    usual = price[price > 0].median() if (price > 0).any() else torch.ones(())
    return (usual / (price + usual)).sqrt()


def _rounds(have: int, want: int, count: int | None = None) -> list[int]:
    """How many units stay open after each round: about half, `want` at the end."""
    want = min(have, want)
    if count is None:
        count = max(1, math.ceil(math.log2(max(have, 1) / max(want, 1))))
    if want == 0:
        return [0] * count
    return [round(have * (want / have) ** ((i + 1) / count)) for i in range(count)]


@contextmanager
def _frozen(decoder: Decoder) -> Iterator[None]:
    """The model's weights without gradients meanwhile."""
    wanted = [p for p in decoder.model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@torch.no_grad()
def damage_of(decoder: Decoder, edit: Edit, guards: Guards) -> float:
    """Divergence of the edited model on the guards' validation prompts, mean over guards, nats."""
    found = []
    for rows in guards.validation.values():
        batch = collate(rows).to(decoder.device)
        dense = log_probs(decoder, batch)
        with applied(decoder, edit):
            found.append(float(divergence(dense, log_probs(decoder, batch))))
    return sum(found) / max(1, len(found))
