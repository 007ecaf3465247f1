"""Scores of a model whose layers are on disk: layers outer, prompts inner.

A pass reads each layer once. For every batch of its prompts it holds the states of the whole model
and those of every head's ablated copy (arXiv 2409.14144, 3.2), which starts at its head's layer,
and brings all of them through the layer before it lets the layer go. The neurons (4.1) take a
second pass, since importance needs the final state's norm and CNA the heads' drops.

Memory: a state is T positions x D numbers; a pass holds (2 + heads) of them an example, and takes
as many prompts as fit beside the weights and a layer's neurons (`work`) into the decoder's
`max_memory`, or else part of the heads at a time. On top come the working tensors of `batch_tokens`
positions in one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune_edit.errors import ModelError, PlanError
from prune_edit.hooks import Call, capture, scale
from prune_edit.layerwise import groups
from prune_edit.running import answer_log_probs
from prune_edit.scoring.activation import score_activation
from prune_edit.scoring.baselines import mark_absent, score_magnitude, score_random
from prune_edit.scoring.flap import score_flap
from prune_edit.scoring.importance import Traces, change, join, traces_of
from prune_edit.scoring.intervention import without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.scoring.shards import Part, Score
from prune_edit.scoring.wanda import score_wanda
from prune_edit.streamed import StreamedDecoder, trace
from prune_edit.tasks.prompts import Batch, Encoded
from prune_edit.units import Units

_OWN = 2  # states an example besides those of its ablated copies: its own, and the layer's result
_LAYERWISE: dict[str, Score] = {
    "wanda": score_wanda,
    "flap": score_flap,
    "activation": score_activation,
    "magnitude": score_magnitude,
    "random": score_random,
}
"""What looks at one layer after the other anyway."""
_STOCK = {
    "ablation": "zero",
    "measure": "logprob",
    "norm": "frozen",
    "adapted": None,
    "top_neurons": 0,
}


def score_streamed(
    decoder: StreamedDecoder, prompts: Sequence[Encoded], method: str, options: Options
) -> Part:
    """Heads (L, H) and neurons (L, N) by every method but `intervention`, `query` and `taylor`.

    Raises PlanError for methods and options that need the whole model in memory, ModelError where
    one example's states do not fit.
    """
    check_streamed(method, options)
    if method in _LAYERWISE:
        return _LAYERWISE[method](decoder, prompts, options)
    return _Streamed(decoder, options, contrast=method == "cna").score(prompts)


def check_streamed(method: str, options: Options) -> None:
    """Raise PlanError for methods and options that need the whole model in memory."""
    if method in _LAYERWISE:
        return
    own = vars(options)
    unusual = [name for name, stock in _STOCK.items() if own.get(name, stock) != stock]
    unusual += ["contrast"] if options.contrast else []
    if method not in ("cna", "importance") or unusual:
        what = f"--score {method}" + "".join(f" with {name}" for name in unusual)
        raise PlanError(
            f"{what} needs the whole model in memory; raise --max-memory, or leave out "
            "--device-map, or take another --score, such as cna"
        )


def shard_size(decoder: StreamedDecoder, prompts: Sequence[Encoded], processes: int = 1) -> int:
    """Examples of one shard: as many as a pass holds, since every pass reads the whole model.

    At most a process's part of all. Unlike other shards these do depend on the memory and on the
    processes, and with them how examples share a batch: the scores agree to 1e-6, not to the bit.
    """
    plan = _plan(decoder, prompts)
    return max(1, min(plan.group_tokens // plan.longest, -(-len(prompts) // processes)))


@dataclass(frozen=True)
class _Plan:
    """How many heads a pass has, and how many tokens."""

    longest: int
    heads: int
    group_tokens: int


def _plan(decoder: StreamedDecoder, prompts: Sequence[Encoded]) -> _Plan:
    weight, room = decoder.unembedding, decoder.room - decoder.work
    position = weight.shape[1] * weight.element_size()  # bytes of one position's state
    longest = max(len(row.ids) for row in prompts)
    every = sum(map(len, decoder.layout.heads))
    heads = min(every, room // (longest * position) - _OWN)
    if every and heads < 1:
        # The work may take a quarter of the room.
        lacking = -(-4 * (_OWN + 1) * longest * position // 3) - decoder.room
        raise ModelError(
            f"--max-memory {decoder.max_memory} bytes leave no room for one example of {longest} "
            f"tokens; give at least {decoder.max_memory + lacking}"
        )
    return _Plan(longest, heads, max(longest, room // ((_OWN + heads) * position)))


@dataclass
class _Run:
    """One batch on its way through the layers."""

    decoder: StreamedDecoder
    batch: Batch
    states: torch.Tensor  # (B, T, D), the model's own
    copies: torch.Tensor  # (C, B, T, D), of which the first `live` have begun
    live: int
    calls: dict[int, list[Call]]  # the layers' other arguments, for as many copies at once

    @classmethod
    def start(cls, decoder: StreamedDecoder, batch: Batch, copies: int) -> _Run:
        states, calls = trace(decoder, batch.inputs)
        room = states.new_empty(copies, *states.shape)
        return cls(decoder, batch, states, room, 0, {1: calls})

    def through(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """A layer's result (C, B, T, D) for C copies of the batch."""
        count = states.shape[0]
        if count not in self.calls:
            inputs = {name: value.repeat(count, 1) for name, value in self.batch.inputs.items()}
            self.calls[count] = trace(self.decoder, inputs)[1]
        args, kwargs = self.calls[count][layer]
        found = self.decoder.layers[layer](states.flatten(0, 1), *args, **kwargs)
        found = found[0] if isinstance(found, tuple) else found
        after: torch.Tensor = found.view_as(states)
        return after

    def log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """Summed log probability of every example's answer, (C, B), from last states."""
        count, batch = states.shape[0], self.batch
        places = states[:, batch.rows, batch.columns]  # (C, A, D)
        normed = self.decoder.finish(places.flatten(0, 1))
        found = answer_log_probs(self.decoder, normed, batch.targets.repeat(count))
        sums = torch.zeros(states.shape[:2], device=found.device)
        return sums.index_add_(1, batch.rows, found.view(count, -1))


class _Streamed:
    def __init__(self, decoder: StreamedDecoder, options: Options, contrast: bool) -> None:
        self.decoder, self.options, self.contrast = decoder, options, contrast
        self.heads = [(i, head) for i, kept in enumerate(decoder.layout.heads) for head in kept]

    @torch.no_grad()
    def score(self, prompts: Sequence[Encoded]) -> Part:
        """Means over the examples (heads) and the answer tokens (neurons)."""
        plan = _plan(self.decoder, prompts)
        heads = torch.zeros(self.decoder.head_shape, dtype=torch.float64)
        neurons = torch.zeros(self.decoder.neuron_shape, dtype=torch.float64)
        done = 0
        tokens = min(self.options.batch_tokens, plan.group_tokens)
        for batched in groups(prompts, tokens, plan.group_tokens):
            group = [batch.to(self.decoder.device) for batch in batched]
            self.options.progress("layers from disk", done, len(prompts))
            drops, finals = self._drops(group, plan)
            heads += sum(drop.double().sum(0) for drop in drops)
            if self.options.neurons:
                self._neurons(group, drops, finals, neurons)
            done += sum(batch.input_ids.shape[0] for batch in group)
            self.options.progress("layers from disk", done, len(prompts))
        if not self.options.neurons:
            neurons += torch.nan
        answers = sum(len(row.answer) for row in prompts)
        means = (heads / len(prompts)).float(), (neurons / max(1, answers)).float()
        return mark_absent(self.decoder, *means)

    def _drops(
        self, group: list[Batch], plan: _Plan
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per batch, every head's drop (B, L, H), and the model's last states (A, D)."""
        shape = self.decoder.head_shape
        drops = [torch.full((len(b.input_ids), *shape), torch.nan) for b in group]
        finals: list[torch.Tensor] = []
        step = max(1, plan.heads)
        for start in range(0, max(1, len(self.heads)), step):
            some = self.heads[start : start + step]
            runs = [_Run.start(self.decoder, batch, len(some)) for batch in group]
            for layer in range(self.decoder.n_layers):
                with self.decoder.store.resident(layer):
                    for run in runs:
                        self._advance(run, layer, [head for i, head in some if i == layer])
            finals = [run.states[run.batch.rows, run.batch.columns] for run in runs]
            for run, drop in zip(runs, drops, strict=True):
                dense = run.log_probs(run.states[None])
                for first in range(0, len(some), self._room(run)):
                    part = run.copies[first : first + self._room(run)]
                    layers, units = zip(*some[first : first + len(part)], strict=True)
                    drop[:, list(layers), list(units)] = (dense - run.log_probs(part)).T.cpu()
        return drops, finals

    def _room(self, run: _Run) -> int:
        """Copies of a batch that run at once."""
        return max(1, self.options.batch_tokens // run.batch.input_ids.numel())

    def _advance(self, run: _Run, layer: int, heads: list[int]) -> None:
        """Everything the batch holds through one layer, and a new copy for each of its heads."""
        room = self._room(run)
        for start in range(0, run.live, room):
            part = slice(start, min(start + room, run.live))
            run.copies[part] = run.through(layer, run.copies[part])
        for start in range(0, len(heads), room):
            some = heads[start : start + room]
            states = run.states[None].expand(len(some), *run.states.shape)
            factors = torch.ones(len(some), *self.decoder.head_shape)
            factors[range(len(some)), layer, some] = 0.0
            each = factors.repeat_interleave(run.states.shape[0], 0)
            with scale(self.decoder, Units(heads=each)):
                run.copies[run.live : run.live + len(some)] = run.through(layer, states)
            run.live += len(some)
        run.states = run.through(layer, run.states[None])[0]

    def _neurons(
        self,
        group: list[Batch],
        drops: list[torch.Tensor],
        finals: list[torch.Tensor],
        sums: torch.Tensor,
    ) -> None:
        """Add every neuron's importance, or for CNA what it loses without the top heads."""
        decoder, count = self.decoder, int(self.contrast)
        runs = [_Run.start(decoder, batch, count) for batch in group]
        ablations = [
            without_top_heads(decoder, drop, self.options) if self.contrast else Units()
            for drop in drops
        ]
        for run in runs:
            run.copies[:] = run.states
            run.live = count

        def seen(run: _Run, layer: int, units: Units, final: torch.Tensor) -> Traces:
            places = (run.batch.rows, run.batch.columns)
            with scale(decoder, units), capture(decoder, at=places, heads=False) as there:
                states = run.copies if units.heads is not None else run.states[None]
                states[:] = run.through(layer, states)
            return traces_of(there, run.batch, final)

        for layer in range(decoder.n_layers):
            with decoder.store.resident(layer):
                pairs = [
                    [seen(run, layer, each, final) for each in (Units(), units)[: 1 + count]]
                    for run, units, final in zip(runs, ablations, finals, strict=True)
                ]
                if decoder.ffn_output(layer) is not None:
                    pair = [join(parts) for parts in zip(*pairs, strict=True)]
                    sums[layer, decoder.neuron_slots[layer]] += change(decoder, pair, layer).cpu()
