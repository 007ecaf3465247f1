"""The way down for units that are chosen: Gauss-Newton on pairs, a picture of the guards beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from prune_edit.editing.guard import Watched
from prune_edit.editing.probe import Probe
from prune_edit.editing.slopes import Space, guard_slopes, pair_slopes
from prune_edit.running import Running

_INNER = 8  # Gauss-Newton steps in one picture
_LONGEST = 1.5  # change of a coordinate in one of them
_TRIES = 6  # of a shorter step, before there is none
_SHORTER, _LONGER = 8.0, 16.0
_FIRST, _LEAST = 3e-3, 1e-5  # what moving away costs, at first and at least


@dataclass
class Aim:
    """What is to be lowered: `|gaps - wanted|^2 / |before|^2 + weight * damage + ridge * |x|^2`.

    `mark` is the share of every pair's bias that is wanted; `rounds` are those of the progress.
    """

    space: Space
    train: Probe
    watched: Watched
    mark: float
    weight: float
    ridge: float
    draws: int
    generator: torch.Generator
    options: Running
    rounds: int
    looks: int = 0
    size: float = 1.0
    wanted: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    curvature: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def start(self, gaps: torch.Tensor) -> None:
        """Take the dense model's gaps (P,) for what there is to lower."""
        self.size = max(float(gaps.pow(2).sum().sqrt()), 1e-6)
        self.wanted = self.mark * gaps

    def look(
        self, theta: torch.Tensor, units: torch.Tensor
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The damage at theta, its slopes (C, 2) and rows (R, C, 2) of its curvature."""
        total, slope = 0.0, torch.zeros(len(units), 2)
        rows = [torch.zeros(0, len(units), 2)]
        batches = list(self.watched.batches())
        for number, (batch, dense, share) in enumerate(batches, 1):
            found = guard_slopes(
                self.space, theta, batch, dense, units, share, self.draws, self.generator
            )
            total += found[0]
            slope += found[1]
            rows.append(found[2])
            done = self.looks * len(batches) + number
            self.options.progress("searching the edit", done, self.rounds * len(batches))
        self.looks += 1
        return total, slope, torch.cat(rows)

    def keep(self, curvature: torch.Tensor) -> None:
        """Remember a picture's curvature; those before fade, but never at once."""
        if len(self.curvature):
            curvature = torch.cat([self.curvature, curvature]) * 0.5**0.5
        self.curvature = curvature

    @torch.no_grad()
    def at(self, theta: torch.Tensor) -> float:
        """What it is at theta, measured."""
        with self.space.at(theta):
            gaps = self.train.gaps(self.space.decoder)
        damage = self.watched.damage(partial(self.space.at, theta))
        return self._bias(gaps) + self.weight * damage + self.ridge * float(theta.pow(2).sum())

    def _bias(self, gaps: torch.Tensor) -> float:
        return float((gaps - self.wanted).pow(2).sum()) / self.size**2


class Descent:
    """A point `theta` (U, 2) of which only `units` change, from the dense model on."""

    def __init__(self, aim: Aim, units: torch.Tensor) -> None:
        self.aim, self.units = aim, units
        self.theta = torch.zeros(aim.space.n_units, 2)
        self.best = aim.at(self.theta)
        self.gain = 1.0  # what the last round brought, as a share
        self._shy = _FIRST
        self._damage, self._slope = 0.0, torch.zeros(2 * len(units), dtype=torch.float64)
        self._fresh = True  # the picture is that of theta

    def step(self) -> bool:
        """One round; whether there was a way down."""
        if not self._fresh:
            self._look()
        for _ in range(_TRIES):
            theta = self._placed(self._solved())
            found = self.aim.at(theta)
            if found < self.best:
                self.gain = 1 - found / self.best
                self.theta, self.best, self._fresh = theta, found, False
                self._shy = max(self._shy / _LONGER, _LEAST)
                return True
            self._shy *= _SHORTER
        return False

    def _look(self) -> None:
        self._damage, slope, curvature = self.aim.look(self.theta, self.units)
        self._slope = slope.flatten().double()
        self.aim.keep(curvature)
        self._fresh = True

    def _solved(self) -> torch.Tensor:
        """The least of the aim in the picture, with real gaps: coordinates (2 C,) float64."""
        aim = self.aim
        start = self.theta[self.units].flatten().double()
        rows = aim.curvature.flatten(1).double()
        curvature = rows.T @ rows
        point, last, least = start.clone(), start, float("inf")
        for _ in range(_INNER):
            gaps, slopes = pair_slopes(aim.space, self._placed(point), aim.train, self.units)
            off = (gaps - aim.wanted).double()
            jacobian = slopes.flatten(1).double()
            moved = point - start
            pull = curvature @ moved
            value = float(
                off.pow(2).sum() / aim.size**2
                + aim.weight * (self._damage + self._slope @ moved + moved @ pull / 2)
                + aim.ridge * point.pow(2).sum()
                + self._shy * moved.pow(2).sum()
            )
            if value > least - 1e-4 * abs(least):
                return last if value > least else point
            last, least = point, value
            slope = (
                2 * jacobian.T @ off / aim.size**2
                + aim.weight * (self._slope + pull)
                + 2 * aim.ridge * point
                + 2 * self._shy * moved
            )
            bend = 2 * jacobian.T @ jacobian / aim.size**2 + aim.weight * curvature
            bend.diagonal().add_(2 * (aim.ridge + self._shy))
            by = torch.linalg.solve(bend, -slope)
            point = point + by * min(1.0, _LONGEST / max(float(by.abs().max()), 1e-12))
        return last

    def _placed(self, point: torch.Tensor) -> torch.Tensor:
        theta = torch.zeros_like(self.theta)
        theta[self.units] = point.float().view(-1, 2)
        return theta
