"""Least squares: refit what stays to what the dense model does, layer by layer, in closed form.

From the first layer to the last, a block's input projections are first changed so that they read
the nearest thing to what the dense model's read that is linear in what they are given. Then the
weights of the attention output projection, the values of its heads (where some went) and the
FFN output projection, with their biases, are changed by the least squares solution that brings
the residual stream after the block nearest to the dense model's. What a block reads is what the
pruned model gives it, so that each block also makes up for what those before it got wrong. As
SparseGPT (arXiv 2301.00774) and FLAP (arXiv 2312.11983) point to; nothing is tuned and no gradient
is taken.

For a block with inputs X (tokens, n), a column of ones for the bias, what the dense stream has and
the pruned one lacks E (tokens, D) and token weights W, the change is
`(X^T W X + ridge) ^ -1 X^T W E`: of the smallest size, so that what the data do not ask for stays.
What a head reads and hands on is refitted as a whole, by `values.py`. Above the last layer with
heads, only the positions where answer tokens are predicted are of any use, and the others go.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.hooks import Call, Captured, attention_pattern, before_ffn, capture
from prune_edit.recover.normal_equations import NormalEquations
from prune_edit.recover.values import Attended, refit_values, values_alone
from prune_edit.running import Running
from prune_edit.streamed import trace
from prune_edit.tasks.combine import balanced, by_part
from prune_edit.tasks.prompts import Batch, Encoded, batches

EXAMPLES = 16384  # more are better still, a little: what is fitted to few is fitted to their noise
_NUMBERS = 1 << 27  # of the dense states of one layer, at most: 512 MiB, and as many again twice
ANSWERS = 10.0
"""The weight of a position where an answer token is predicted; others have 1. What comes there is
what the task is measured by."""
_FOURTH = 4  # example, held out to choose a ridge by where tokens are few

Wanted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The dense stream before a layer, after its attention and after its FFN, (B, T, D) each."""


@dataclass
class Run:
    """A batch on its way through the layers.

    `states` (B, T, D) is what the pruned model gives the layer that is next; `weights` (B, T) count
    its tokens, none where there is padding, and `held` (B, T) says which are held out to choose a
    ridge by. Once it is `narrow`, only answer positions are left, (1, A, ...).
    """

    batch: Batch
    weights: torch.Tensor
    held: torch.Tensor
    states: torch.Tensor
    calls: list[Call]
    eager_calls: list[Call]  # those whose masks are whole, where values are refitted
    narrow: bool = False

    def cut(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) as this run goes on with it."""
        return states[self.batch.rows, self.batch.columns][None] if self.narrow else states

    def narrowed(self) -> Run:
        """The run with answer positions alone."""
        if self.narrow:
            return self
        found = Run(**{**vars(self), "narrow": True})
        found.weights, found.held, found.states = map(
            found.cut, (self.weights, self.held, self.states)
        )
        return found


@torch.no_grad()
def refit(
    small: Decoder,
    dense: Decoder,
    prompts: Sequence[Encoded],
    running: Running,
    ridge: float | None = None,
    values: bool = True,
    known: Known | None = None,
) -> Decoder:
    """The pruned model with its blocks' projections refitted to the dense model's states.

    With `values`, those of the heads of a layer that lost some are refitted, too, where no two
    share them. Holds both models' states of all the prompts' tokens at one layer, 3 D numbers a
    token, and for each projection the (n + 1)^2 float64 numbers of its normal equations. The same
    prompts give the same weights; several tasks count by theirs. Where tokens are few, the ridge is
    chosen for each projection by what is left over in a quarter of the examples, held out for that.
    What the dense model does is taken from `known`, which is of the same prompts, or put there.
    Raises PlanError for a family with norms behind its blocks, where what a block adds is not
    linear in its weights.
    """
    check_refittable(small)
    small = small.with_model(copy.deepcopy(small.model))
    fit = LayerFit(small, dense, ridge, values)
    sizes = task_weights(prompts)
    runs = []
    for rows, batch in batches(prompts, running.batch_tokens):
        run = fit.run(batch.to(small.device))
        if len(sizes) > 1:
            run.weights *= run.weights.new_tensor([sizes[prompts[i].part] for i in rows])[:, None]
        runs.append(run)
    walks = (known or Known()).walks(dense, [run.batch for run in runs])
    running.progress("least squares", 0, small.n_layers)
    for layer in range(small.n_layers):
        runs = fit.layer(layer, runs, [next(walk) for walk in walks])
        running.progress("least squares", layer + 1, small.n_layers)
    return small


@dataclass
class Known:
    """The dense model's states for several fits to the same prompts, where they take little room.

    At most as many numbers as those of one layer may be.
    """

    states: list[list[Wanted]] = field(default_factory=list)

    def walks(self, dense: Decoder, batches: Sequence[Batch]) -> list[Iterator[Wanted]]:
        """What the dense model does with each batch, layer by layer."""
        if not self.states:
            walks = [dense_walk(dense, batch) for batch in batches]
            tokens = sum(batch.input_ids.numel() for batch in batches)
            if 3 * tokens * dense.n_layers * dense.unembedding.shape[1] > _NUMBERS:
                return walks
            self.states = [list(walk) for walk in walks]
        return [iter(each) for each in self.states]


def task_weights(prompts: Sequence[Encoded]) -> dict[str, float]:
    """What a token of each task weighs, so that all of its tokens have its share; 1 on average."""
    sizes = {
        name: (share, sum(len(row.ids) - 1 + (ANSWERS - 1) * len(row.answer) for row in rows))
        for name, share, rows in by_part(prompts)
    }
    total = sum(size for _, size in sizes.values())
    return {name: share * total / size for name, (share, size) in sizes.items()}


def enough(prompts: Sequence[Encoded], decoder: Decoder, most: int = EXAMPLES) -> list[Encoded]:
    """At most so many prompts of each task, evenly over its groups; fewer where states are large.

    What is fitted is measured by groups that count alike, whatever their shares of the train split.
    """
    chosen = balanced(prompts, most)
    room = _NUMBERS // decoder.unembedding.shape[1]
    most = min(most, len(chosen))
    while most > 1 and sum(len(row.ids) for row in chosen) > room:
        most //= 2
        chosen = balanced(chosen, most)
    return chosen


def check_refittable(decoder: Decoder) -> None:
    """Raise PlanError for a family with norms behind its blocks."""
    if decoder.family.attention_output_norm or decoder.family.ffn_output_norm:
        raise PlanError(
            f"{decoder.family.model_type} has norms behind its blocks, which least squares cannot "
            "refit; give another --recover"
        )


def dense_walk(dense: Decoder, batch: Batch) -> Iterator[Wanted]:
    """What the dense model's stream is around each block, layer by layer."""
    states, calls = trace(dense, batch.inputs)
    for layer in range(dense.n_layers):
        after, seen = through(dense, layer, states, calls)
        yield states, seen.residual[layer], after
        states = after


class LayerFit:
    """The refitting of one pruned model, whose weights it changes, layer by layer."""

    def __init__(
        self, small: Decoder, dense: Decoder, ridge: float | None = None, values: bool = True
    ) -> None:
        self.small, self.dense, self.ridge = small, dense, ridge
        layers = range(small.n_layers)
        # Where no head went, there is nothing for the values of the others to take over.
        self.with_values = {
            layer
            for layer in layers
            if values
            and small.layout.heads[layer] != dense.layout.heads[layer]
            and values_alone(small, layer)
        }
        attending = [layer for layer in layers if small.layout.slots[layer]]
        self.narrow_from = attending[-1] + 1 if attending else 0

    def run(self, batch: Batch, eager: bool = False) -> Run:
        """A batch before the first layer; `eager` for models with more heads to come."""
        weights = batch.inputs["attention_mask"].float()
        weights[batch.rows, batch.columns] *= ANSWERS
        held = torch.arange(len(weights), device=weights.device) % _FOURTH == _FOURTH - 1
        states, calls = trace(self.small, batch.inputs)
        eager_calls: list[Call] = []
        if self.with_values or eager:
            with self.small.eager():
                eager_calls = trace(self.small, batch.inputs)[1]
        return Run(batch, weights, held[:, None].expand_as(weights), states, calls, eager_calls)

    def layer(self, layer: int, runs: Sequence[Run], wanted: Sequence[Wanted]) -> list[Run]:
        """Refit a layer; the runs before the next one."""
        if layer >= self.narrow_from:
            runs = [run.narrowed() for run in runs]
        before, between, after = (
            [run.cut(states[place]) for run, states in zip(runs, wanted, strict=True)]
            for place in range(3)
        )
        family = self.small.family
        if layer and self.small.layout.slots[layer]:  # before the first there is no difference
            norms = [decoder.attention_norm(layer) for decoder in (self.small, self.dense)]
            given = [run.states for run in runs]
            paths = (family.queries, family.keys, family.values)
            self._inputs(layer, runs, given, before, norms, paths)
        self._attention(layer, runs, between)
        if layer in self.with_values:
            self._values(layer, runs, between)
            self._attention(layer, runs, between)
        norms = [decoder.ffn_norm(layer) for decoder in (self.small, self.dense)]
        if self.small.layout.neurons[layer] and norms[0] is not None:  # it waits for attention
            given = [
                attended(self.small, layer, run.states, run.calls).residual[layer] for run in runs
            ]
            self._inputs(layer, runs, given, between, norms, family.ffn_inputs)
        self._ffn(layer, runs, after)
        found = []
        for run in runs:
            states, _ = through(self.small, layer, run.states, run.calls)
            found.append(Run(**{**vars(run), "states": states}))
        return found

    def _inputs(
        self,
        layer: int,
        runs: Sequence[Run],
        given: list[torch.Tensor],
        wanted: list[torch.Tensor],
        norms: list[nn.Module | None],
        paths: Sequence[str],
    ) -> None:
        """Let projections read the best linear guess of what those of the dense model read.

        One map (D, D) of the normed stream serves all the projections that read it, whatever they
        make of it, since the least squares solution for `X W` is that for X, times W.
        """
        equations = NormalEquations(constant=False)
        for run, states, dense in zip(runs, given, wanted, strict=True):
            reads, read = (
                x if norm is None else norm(x)
                for norm, x in zip(norms, (states, dense), strict=True)
            )
            equations.add(reads, read.float() - reads.float(), run.weights, run.held)
        change = equations.solve(self.ridge)
        for path in dict.fromkeys(paths):
            weight = self.small.output_weight(self.small.layers[layer].get_submodule(path)).detach()
            weight += (change.to(weight.device) @ weight.double()).to(weight)

    def _attention(self, layer: int, runs: Sequence[Run], wanted: list[torch.Tensor]) -> None:
        small = self.small
        path, present = small.family.attention_output, small.attention_output(layer) is not None
        projection = _Projection.of(small, layer, path, present)
        if projection is None:
            return
        real = (small.head_slots[layer] >= 0).repeat_interleave(small.head_dim).to(small.device)
        for run, want in zip(runs, wanted, strict=True):
            seen = attended(small, layer, run.states, run.calls)
            # Pads' columns are zero and stay so.
            inputs = seen.heads[layer] * real if present else None
            lacking = want - seen.residual[layer]
            projection.equations.add(inputs, lacking, run.weights, run.held)
        projection.apply(self.ridge)

    def _values(self, layer: int, runs: Sequence[Run], wanted: list[torch.Tensor]) -> None:
        found = []
        for run, want in zip(runs, wanted, strict=True):
            seen = attended(self.small, layer, run.states, run.calls)
            pattern = attention_pattern(self.small, layer, run.states, run.eager_calls[layer])
            lacking = want - seen.residual[layer]
            found.append(Attended(pattern, lacking, run.weights, run.held))
        refit_values(self.small, layer, found, self.ridge)

    def _ffn(self, layer: int, runs: Sequence[Run], wanted: list[torch.Tensor]) -> None:
        small = self.small
        path, present = small.family.ffn_output, small.ffn_output(layer) is not None
        projection = _Projection.of(small, layer, path, present)
        if projection is None:
            return
        for run, want in zip(runs, wanted, strict=True):
            after, seen = through(small, layer, run.states, run.calls)
            inputs = seen.coefficients.get(layer)
            projection.equations.add(inputs, want - after, run.weights, run.held)
        projection.apply(self.ridge)


def through(
    decoder: Decoder, layer: int, states: torch.Tensor, calls: list[Call]
) -> tuple[torch.Tensor, Captured]:
    """A layer's result (B, T, D) and what passed inside it."""
    args, kwargs = calls[layer]
    with capture(decoder) as seen:
        found = decoder.layers[layer](states, *args, **kwargs)
    return found[0] if isinstance(found, tuple) else found, seen


def attended(decoder: Decoder, layer: int, states: torch.Tensor, calls: list[Call]) -> Captured:
    """What passes inside a layer up to the stream after its attention; the FFN does not run."""
    args, kwargs = calls[layer]
    with capture(decoder) as seen, before_ffn(decoder, layer):
        decoder.layers[layer](states, *args, **kwargs)
    return seen


@dataclass
class _Projection:
    """One projection, of which `weight` (n, D) and `bias` (D,) may lack, and its equations."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    equations: NormalEquations

    @classmethod
    def of(cls, decoder: Decoder, layer: int, path: str, present: bool) -> _Projection | None:
        """A layer's projection, or the constant that is left of it."""
        module: nn.Module | None = dict(decoder.layers[layer].named_modules()).get(path)
        if module is None:
            return None
        weight = decoder.output_weight(module).detach() if present else None
        bias = getattr(module, "bias", None)
        if weight is None and bias is None:
            return None
        return cls(weight, bias, NormalEquations(constant=bias is not None))

    def apply(self, ridge: float | None) -> None:
        """Change weight and bias; without a `ridge`, by the one that serves best."""
        change = self.equations.solve(ridge)
        if self.bias is not None:
            self.bias += change[-1].to(self.bias)
            change = change[:-1]
        if self.weight is not None:
            self.weight += change.to(self.weight)
