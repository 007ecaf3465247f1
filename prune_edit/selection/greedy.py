"""Greedy heads: taken away or added one by one, each judged by what least squares makes of it.

A head is worth what it does beside the heads that are there, once what stays has been refitted. So
every candidate is tried: all layers from its own on are refitted by least squares, and the answers
of examples that were not fitted to are scored. States below a candidate's layer are those of the
model so far, and are kept. Candidates are taken in the order of what they last cost or brought,
and most are not looked at again (lazy greedy, Minoux 1978): costs mostly grow as others go.

Backward is the better way: alone, a head that fetches one operand is worth nothing without the one
that fetches the other, so forward goes astray at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from prune_edit.decoder import Decoder
from prune_edit.planning import split_layers
from prune_edit.recover.least_squares import (
    LayerFit,
    Run,
    Wanted,
    check_refittable,
    dense_walk,
    task_weights,
)
from prune_edit.recover.shrink import hollow
from prune_edit.running import Running
from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Batch, Encoded, batches

EXAMPLES = 1024  # each candidate is fitted to four fifths of them
_JUDGED = 5  # example that answers are scored on and nothing is fitted to
_TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
_AGAIN = 8  # candidates that are looked at again for every head, at the least


@dataclass(frozen=True)
class _Group:
    """A batch; what an answer token of each example counts in the loss, and its weight in fits."""

    batch: Batch
    judged: torch.Tensor
    fitted: torch.Tensor


@dataclass
class _State:
    """A model with some heads, refitted, and the runs before each layer."""

    heads: frozenset[int]
    small: Decoder
    fit: LayerFit
    before: list[list[Run]]
    loss: float


def _uses(prompts: Sequence[Encoded]) -> tuple[dict[int, float], dict[int, float]]:
    """What an answer token of each judged example counts, and what tokens of the others weigh.

    By the prompts' ids. A task of one example is judged by what it is fitted to.
    """
    sizes = task_weights(prompts)
    judged: dict[int, float] = {}
    fitted: dict[int, float] = {}
    for name, share, rows in by_part(prompts):
        own = rows[::_JUDGED]
        judged |= dict.fromkeys(map(id, own), share / sum(len(row.answer) for row in own))
        others = [row for row in rows if id(row) not in judged] or own
        fitted |= dict.fromkeys(map(id, others), sizes[name])
    return judged, fitted


class Greedy:
    """The search over one model's heads, numbered flat over the layers.

    Holds the dense model's states of all prompts after every block: 2 L D numbers a token.
    """

    def __init__(self, dense: Decoder, prompts: Sequence[Encoded], running: Running) -> None:
        check_refittable(dense)
        self.dense, self.running = dense, running
        self.layers, self.width = dense.head_shape
        judged, fitted = _uses(prompts)

        def of(uses: Mapping[int, float], rows: Sequence[int]) -> torch.Tensor:
            found = [uses.get(id(prompts[row]), 0.0) for row in rows]
            return torch.tensor(found, device=dense.device)

        self.groups = [
            _Group(batch.to(dense.device), of(judged, rows), of(fitted, rows))
            for rows, batch in batches(prompts, running.batch_tokens)
        ]
        self.wanted: list[list[Wanted]] = [[] for _ in range(self.layers)]
        for group in self.groups:
            for layer, found in enumerate(dense_walk(dense, group.batch)):
                self.wanted[layer].append(found)

    @torch.no_grad()
    def start(self, heads: frozenset[int]) -> _State:
        """The refitted model with these heads, of which there is at least one."""
        fit = LayerFit(self._hollow(heads), self.dense)
        runs: list[Run] = []
        for group in self.groups:
            run = fit.run(group.batch, eager=True)
            run.weights *= group.fitted[:, None]
            runs.append(run)
        return self._finish(fit, heads, [runs], 0)

    def _hollow(self, heads: frozenset[int]) -> Decoder:
        kept = split_layers(sorted(heads), self.layers, self.width)
        return hollow(self.dense, kept)

    def _finish(
        self, fit: LayerFit, heads: frozenset[int], before: list[list[Run]], first: int
    ) -> _State:
        """Refit the layers from `first` on."""
        runs = before[first]
        for layer in range(first, self.layers):
            runs = fit.layer(layer, runs, self.wanted[layer])
            before.append(runs)
        loss = self._loss(fit.small, before.pop())
        return _State(heads, fit.small, fit, before, loss)

    def _loss(self, small: Decoder, runs: list[Run]) -> float:
        """Mean cross-entropy of the judged answer tokens, tasks by weight, cooled as is best.

        A model that was refitted and not tuned is far too sure of its errors, which says nothing of
        what it could still tell apart: logits are divided by the best of a few temperatures.
        """
        sums = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
        for run, group in zip(runs, self.groups, strict=True):
            counts = group.judged[group.batch.rows]
            which = counts > 0
            states = run.narrowed().states[0][which]
            if not len(states):
                continue
            logits = small.unembed(small.finish(states[None])[0]).float()
            targets = group.batch.targets[which]
            for place, temperature in enumerate(_TEMPERATURES):
                found = functional.cross_entropy(logits / temperature, targets, reduction="none")
                sums[place] += float((found.double() * counts[which]).sum())
        return float(sums.min())

    @torch.no_grad()
    def changed(self, state: _State, heads: frozenset[int]) -> _State:
        """The refitted model with other heads, from the lowest layer that differs on."""
        differing = heads ^ state.heads
        if not differing:
            return state
        small = self._hollow(heads)
        fit = LayerFit(small, self.dense)
        first = min(differing) // self.width
        was = state.fit
        if fit.narrow_from != was.narrow_from:  # from there on it matters what is fitted to
            first = min(first, fit.narrow_from, was.narrow_from)
        for mine, its in zip(small.layers[:first], state.small.layers[:first], strict=True):
            mine.load_state_dict(its.state_dict())
        return self._finish(fit, heads, state.before[: first + 1], first)

    def backward(self, heads: Collection[int], count: int) -> list[int]:
        """The order in which heads of a model with these are taken away until `count` stay."""
        state, order = self.start(frozenset(heads)), []
        costs = dict.fromkeys(sorted(heads), 0.0)
        for done in range(1, len(heads) - count + 1):
            best = self._best(state, {unit: state.heads - {unit} for unit in costs}, costs)
            (gone,) = state.heads - best.heads
            del costs[gone]
            order.append(gone)
            state = best
            self.running.progress("greedy heads", done, len(heads) - count)
        return order

    def forward(self, count: int) -> list[int]:
        """The order in which heads are added until there are `count`."""
        costs = {
            layer * self.width + head: 0.0
            for layer, heads in enumerate(self.dense.layout.heads)
            for head in heads
        }
        # A model has at least one head: the first ones take the place of one at the very end.
        state = self.start(frozenset({max(costs)}))
        order: list[int] = []
        while len(order) < count:
            chosen = frozenset(order)
            state = self._best(state, {unit: chosen | {unit} for unit in costs}, costs, not order)
            (added,) = state.heads - chosen
            del costs[added]
            order.append(added)
            self.running.progress("greedy heads", len(order), count)
        return order

    def _best(
        self,
        state: _State,
        tries: Mapping[int, frozenset[int]],
        costs: dict[int, float],
        every: bool = False,
    ) -> _State:
        """The model of least loss among the `tries`, the cheapest first; updates their `costs`.

        Unless `every` one is looked at, it ends where the next one last cost more than the best.
        """
        best: _State | None = None
        for number, unit in enumerate(sorted(costs, key=lambda unit: (costs[unit], unit))):
            settled = best is not None and costs[unit] >= best.loss - state.loss
            if settled and number >= _AGAIN and not every:
                break
            found = self.changed(state, tries[unit])
            costs[unit] = found.loss - state.loss
            if best is None or found.loss < best.loss:
                best = found
        assert best is not None
        return best
