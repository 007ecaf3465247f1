"""Watch a tuning on validation: keep the best weights, and stop when there is nothing to gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.running import Running, silent
from prune_edit.tasks.prompts import Encoded

EXAMPLES = 256  # of validation, at most: a check is to cost little beside the steps between two
_CHECKS = 20
_BETWEEN = 25  # steps, at least


@dataclass(frozen=True)
class Watch:
    """What a tuning is measured on, and the accuracy, a share, at which it may stop, if any.

    It stops only where it has that on the `rest`, too: the best of many checks on a few prompts is
    better than the model is.
    """

    prompts: Sequence[Encoded] = field(repr=False)
    enough: float | None = None
    rest: Sequence[Encoded] = field(default=(), repr=False)


class Watching:
    """One tuning under watch: the best of what was measured so far.

    Every 20th of the steps, but no more often than every 25, and at the end. Of equals the later
    one is better: its learning rate is lower. `patience` checks in turn that bring nothing end it.
    """

    def __init__(self, watch: Watch, steps: int, patience: int) -> None:
        self.watch, self.steps, self.patience = watch, steps, patience
        self.every = max(_BETWEEN, steps // _CHECKS)
        self.best: dict[str, torch.Tensor] = {}
        self.accuracy, self.misses, self.last = -1.0, 0, -1.0

    def due(self, done: int) -> bool:
        """Whether to measure after so many steps; at the end, where there is another to beat."""
        return done % self.every == 0 or (done == self.steps and bool(self.best))

    def check(self, decoder: Decoder, weights: dict[str, nn.Parameter], options: Running) -> bool:
        """Measure, keep the weights if they are the best; whether tuning may stop."""
        quiet = replace(options, progress=silent)
        self.last = measure_accuracy(decoder, self.watch.prompts, quiet).value
        if self.last >= self.accuracy:
            self.misses = 0 if self.last > self.accuracy else self.misses + 1
            self.accuracy = self.last
            self.best = {name: value.detach().clone() for name, value in weights.items()}
        else:
            self.misses += 1
        return self._reached(decoder, quiet) or (self.patience > 0 and self.misses >= self.patience)

    def _reached(self, decoder: Decoder, options: Running) -> bool:
        enough, rest = self.watch.enough, self.watch.rest
        if enough is None or self.last < enough:
            return False
        return not rest or measure_accuracy(decoder, rest, options).value >= enough

    @torch.no_grad()
    def take_best(self, weights: dict[str, nn.Parameter]) -> None:
        """Put the best weights back."""
        for name, value in self.best.items():
            weights[name].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """What a killed run needs to go on: the best so far, and how it was found."""
        numbers = torch.tensor([self.accuracy, self.misses, self.last], dtype=torch.float64)
        return {"watch": numbers, **{f"best.{name}": value for name, value in self.best.items()}}

    def restore(self, found: dict[str, torch.Tensor], weights: dict[str, nn.Parameter]) -> None:
        """The inverse of `state`; the best are put where the weights are."""
        self.accuracy, misses, self.last = found["watch"].tolist()
        self.misses = int(misses)
        self.best = {
            name: found[f"best.{name}"].to(value.device)
            for name, value in weights.items()
            if f"best.{name}" in found
        }
