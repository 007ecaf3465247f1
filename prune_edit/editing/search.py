"""Search the least damaging edit that lowers the bias as far as wanted.

Near the dense model the bias of every pair is linear in what units are multiplied by and moved by,
and the divergence on guard prompts is quadratic, with Fisher's matrix (slopes.py). Units are chosen
in that picture (pursuit.py): those whose changes together take the wanted share of every training
pair's bias, guards counted by `weight`. From there on only they change. In rounds, Gauss-Newton
steps on the pairs' real bias find the best point that the picture of the guards allows, a step
counts if what it is to lower did fall on training pairs and guards, else it is made shorter
(Levenberg and Marquardt), and the picture is taken anew where it ended. Checks on validation pairs,
which share no prompt and no answer with the others, choose among the edits seen on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.descent import Aim, Descent
from prune_edit.editing.edit import Edit, applied
from prune_edit.editing.guard import Guards, Watched
from prune_edit.editing.probe import Probe
from prune_edit.editing.pursuit import leading, pursue
from prune_edit.editing.slopes import Space, pair_slopes, space_of
from prune_edit.running import Running

_CANDIDATES = 4096  # units whose effect on the guards is looked at
_DOUBT = 10.0  # the ridge of the choice beside that of the steps: curvature is an estimate
_MARGIN = 0.3  # of the bias that may stay: what training aims at, since validation is harder
_SURE = 0.9  # of it, on validation, since other pairs may be harder than those
_SLOW = 0.02  # of what is lowered: a round that brings less is the last
_ENOUGH = 0.1  # the same, once as much is gone as wanted


@dataclass(frozen=True)
class SearchSettings:
    """What the search may change, and how long it takes.

    `reduce` is the share of the bias that should go, `neurons` and `heads` how many may be changed,
    `weight` what a nat of divergence costs beside the bias as a squared share, `ridge` what a
    squared change does; the neurons `protected` (L, N) stay. `prompts` of every guard are looked
    at, `draws` random directions of the vocabulary at each.
    """

    reduce: float = 0.9
    neurons: int = 30
    heads: int = 0
    shift: bool = True
    weight: float = 10.0
    ridge: float = 1e-5
    rounds: int = 10
    prompts: int = 128
    draws: int = 2
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
        settings, decoder = self.settings, self.decoder
        space = space_of(decoder, self.train, settings.heads > 0, settings.shift)
        watched = Watched(decoder, self.guards.some(settings.prompts))
        checked = Watched(decoder, self.guards.validation)
        generator = torch.Generator().manual_seed(settings.seed)
        aim = Aim(
            space,
            self.train,
            watched,
            (1 - settings.reduce) * _MARGIN,
            settings.weight,
            settings.ridge,
            settings.draws,
            generator,
            self.options,
            settings.rounds + 1,
        )
        descent = Descent(aim, self._chosen(aim))
        usual = max(float(self.validation.texts.sums(decoder)[0].detach().abs().mean()), 1e-6)
        best: tuple[tuple[bool, float], torch.Tensor] | None = None
        for step in range(1, settings.rounds + 1):
            if not descent.step():
                break
            check = self._check(space, descent.theta, step, usual, checked)
            self.checks.append(check)
            missed = check.left > (1 - settings.reduce) * _SURE
            rank = (missed, check.left if missed else check.damage)
            if best is None or rank < best[0]:
                best = rank, descent.theta
            if descent.gain < (_SLOW if missed else _ENOUGH):
                break
        return space.edit(best[1] if best is not None else torch.zeros(space.n_units, 2))

    def _chosen(self, aim: Aim) -> torch.Tensor:
        """The units that may change, ascending numbers; the picture is that of the dense model."""
        space, settings = aim.space, self.settings
        free = space.there.clone()
        if settings.protected is not None:
            free[space.n_heads :] &= ~settings.protected.flatten()
        units = free.nonzero().flatten()
        theta = torch.zeros(space.n_units, 2)
        gaps, slopes = pair_slopes(space, theta, self.train, units)
        some = leading(slopes, _CANDIDATES)
        units, slopes = units[some], slopes[:, some]
        aim.start(gaps)
        _, _, curvature = aim.look(theta, units)
        columns = torch.cat([slopes / aim.size, (settings.weight / 2) ** 0.5 * curvature])
        target = torch.zeros(len(columns))
        target[: len(gaps)] = (aim.wanted - gaps) / aim.size
        heads = (units < space.n_heads).long()
        most = settings.neurons, settings.heads
        places = pursue(columns, target, _DOUBT * settings.ridge, heads, most)
        aim.keep(curvature[:, places])
        return units[places]

    @torch.no_grad()
    def _check(
        self, space: Space, theta: torch.Tensor, step: int, usual: float, checked: Watched
    ) -> Check:
        edit = space.edit(theta)
        with applied(self.decoder, edit):
            left = float(self.validation.gaps(self.decoder).abs().mean()) / usual
        return Check(step, left, checked.damage(partial(applied, self.decoder, edit)))


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
