"""The smallest model that keeps an accuracy: down in rounds, half the way back where one fails.

The heads may cost half of what may be lost, the neurons after them the rest: heads down to the last
one that can be spared would leave every neuron necessary.

Tuned models go down in rounds. Every round starts from the last model that was good enough, so that
nothing is tuned twice from the start. A round that is not good enough at once is tuned longer,
twice, before it is given up. Least squares starts from the dense weights anyway: its models are
made in one step each, and the heads are found by fits to few examples, which err on the safe side;
the neurons' search ends exactly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, TaskError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.recover.gradual import Rounds
from prune_edit.recover.shrink import shrink
from prune_edit.recovery import Recovery
from prune_edit.search import fewest

_NARROW = 0.1  # of the heads, between the fewest that are enough and the most that are not
_PATIENCE = 150, 450  # steps of a round that a brief tuning does not bring back, in turn


def parse_share(text: str | float, flag: str = "--keep-accuracy") -> float:
    """Read `99%` of the dense model's accuracy. Raises BudgetError."""
    value = str(text).strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise BudgetError(
            f"{flag} {text!r} is not a share of the dense model's accuracy; give one above 0% and "
            "at most 100%, such as 99%"
        )
    return share


@dataclass(frozen=True)
class Try:
    """One model that was measured on validation: what it had left, percent right, 95 % interval."""

    heads: int
    neurons: int
    accuracy: float
    interval: tuple[float, float]
    enough: bool


@dataclass
class Smallest:
    """The search; `tries` are all models it measured, in turn.

    The accuracy to keep is a `share` of the dense model's on validation.
    """

    recovery: Recovery
    share: float
    tries: list[Try] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense = self.recovery.accuracy(self.recovery.dense)
        if not self.dense:
            raise TaskError(
                f"task {self.recovery.data.task.name!r}: the dense model answers none of the "
                "validation examples, so there is no accuracy to keep; give a task it can do"
            )
        self.recovery.judge(self.dense)
        self.floor = self.share * self.dense
        self.head_floor = (self.floor + self.dense) / 2

    def heads(self, scores: torch.Tensor) -> Decoder:
        """The model with the fewest heads that cost at most half of the loss, all neurons kept.

        `scores` (L, H) are the dense model's.
        """
        return self._fitted(scores) if self.recovery.fitted else self._in_rounds()

    def _fitted(self, scores: torch.Tensor) -> Decoder:
        recovery, dense = self.recovery, self.recovery.dense
        total, counts = sum(map(len, dense.layout.heads)), [recovery.rules.fewest_heads]
        while counts[-1] < total:
            counts.append(min(total, max(counts[-1] + 1, math.floor((1 + _NARROW) * counts[-1]))))
        good = {len(counts) - 1: dense}

        def enough(index: int) -> bool:
            name = f"keep-{counts[index]}-heads"
            found = recovery.workspace.load_model(name, dense)
            if found is None:
                kept = recovery.rules.heads(scores, counts[index])
                every = dense.layout.neurons
                small = shrink(dense, kept, every, recovery.means, recovery.options)
                found = recovery.roughly(small)
                recovery.workspace.save_model(name, found)
            if self._enough(found, self.head_floor):
                good[index] = found
            return index in good

        return good[fewest(len(counts), enough, None)]

    def _in_rounds(self) -> Decoder:
        decoder, rounds = self.recovery.dense, self.recovery.in_rounds()
        fewest = self.recovery.rules.fewest_heads
        good, bad, number = sum(map(len, decoder.layout.heads)), fewest - 1, 0
        while good - bad > max(1.0, _NARROW * good):
            wanted = math.floor(good * rounds.schedule.keep_share)
            if bad >= fewest:
                wanted = round(math.sqrt(good * bad))
            wanted = min(good - 1, max(bad + 1, wanted))
            number += 1
            found = self._round(decoder, rounds, wanted, number)
            if found is None:
                bad = wanted
            else:
                decoder, good = found, wanted
        return decoder

    def _round(self, decoder: Decoder, rounds: Rounds, wanted: int, number: int) -> Decoder | None:
        """`decoder` with so many heads, if that is enough, after longer tuning if need be."""
        name = f"keep-{number}"
        small = rounds.step(decoder, wanted, None, name, number)
        if self._enough(small, self.head_floor):
            return small
        if not rounds.tuned:
            return None
        final = rounds.schedule.final_tuning
        for steps in dict.fromkeys(min(steps, final.steps) for steps in _PATIENCE):
            more = replace(final, steps=steps)
            longer = f"{name}-{more.steps}"
            found = self.recovery.workspace.load_model(longer, small)
            if found is None:
                found = rounds.recover(small, more, longer, number)
                self.recovery.workspace.save_model(longer, found)
            if self._enough(found, self.head_floor):
                return found
        return None

    def _enough(self, small: Decoder, floor: float) -> bool:
        recovery = self.recovery
        found = measure_accuracy(small, recovery.validation, recovery.options, "validation")
        heads, neurons = (sum(map(len, u)) for u in (small.layout.heads, small.layout.neurons))
        low, high = found.interval
        enough = 100 * found.value >= floor - 1e-9
        self.tries.append(Try(heads, neurons, 100 * found.value, (100 * low, 100 * high), enough))
        return enough

    def report(self, small: Decoder) -> dict[str, Any]:
        """What was asked, found and tried, as JSON; says in a note what was found."""
        self._enough(small, self.floor)
        last = self.tries[-1]
        low, high = last.interval
        self.recovery.note(
            f"{last.heads} heads and {last.neurons} neurons keep {last.accuracy:.1f} % on "
            f"validation (95 % interval {low:.1f} to {high:.1f}); {100 * self.share:g} % of the "
            f"dense model's {self.dense:.1f} are {self.floor:.1f}"
        )
        return {
            "share": self.share,
            "dense": self.dense,
            "floor": self.floor,
            "tries": [asdict(each) for each in self.tries],
        }
