"""Least squares: refit what stays to what the dense model does, layer by layer, in closed form.

From the first layer to the last, the weights of the attention output projection and then of the FFN
output projection, with their biases, are changed by the least squares solution that brings the
residual stream after the block nearest to the dense model's. What a block reads is what the pruned
model gives it, so that each block also makes up for what those before it got wrong. As SparseGPT
(arXiv 2301.00774) and FLAP (arXiv 2312.11983) point to; nothing is tuned and no gradient is taken.

For a block with inputs X (tokens, n), a column of ones for the bias, what the dense stream has and
the pruned one lacks E (tokens, D) and token weights W, the change is
`(X^T W X + ridge) ^ -1 X^T W E`: of the smallest size, so that what the data do not ask for stays.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.hooks import Captured, capture
from prune_edit.running import Running
from prune_edit.streamed import Call, trace
from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Batch, Encoded, batches

EXAMPLES = 4096  # a layer's n + 1 unknowns an output ask for some times as many tokens
ANSWERS = 10.0
"""The weight of a position where an answer token is predicted; others have 1. What comes there is
what the task is measured by."""
RIDGE = 1e-4  # of the mean square of an input, times the tokens' weight
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e6)  # the last changes nothing
_PLENTY = 10  # tokens an unknown, with which the first will do
_FOURTH = 4  # example, held out to choose among them


@dataclass
class _Run:
    """A batch, and what both models have of it at the layer that is being refitted."""

    batch: Batch
    weights: torch.Tensor  # (B, T), zero where there is padding
    dense: torch.Tensor  # (B, T, D)
    small: torch.Tensor
    dense_calls: list[Call]
    small_calls: list[Call]


@torch.no_grad()
def refit(
    small: Decoder,
    dense: Decoder,
    prompts: Sequence[Encoded],
    running: Running,
    ridge: float | None = None,
) -> Decoder:
    """The pruned model with its blocks' output projections refitted to the dense model's states.

    Holds both models' states of all the prompts' tokens at one layer, 3 D numbers a token, and for
    each projection the (n + 1)^2 float64 numbers of its normal equations. The same prompts give the
    same weights; several tasks count by theirs. Where tokens are few, the ridge is chosen for each
    projection by what is left over in a quarter of the examples, held out for that. Raises
    PlanError for a family with norms behind its blocks, where what a block adds is not linear in
    its weights.
    """
    if small.family.attention_output_norm or small.family.ffn_output_norm:
        raise PlanError(
            f"{small.family.model_type} has norms behind its blocks, which least squares cannot "
            "refit; give another --recover"
        )
    small = small.with_model(copy.deepcopy(small.model))
    runs, sizes = [], _task_weights(prompts)
    for rows, cpu in batches(prompts, running.batch_tokens):
        batch = cpu.to(small.device)
        weights = batch.inputs["attention_mask"].float()
        weights[batch.rows, batch.columns] *= ANSWERS
        if len(sizes) > 1:
            weights *= weights.new_tensor([sizes[prompts[row].part] for row in rows])[:, None]
        first, calls = trace(dense, batch.inputs)
        own, own_calls = trace(small, batch.inputs)
        runs.append(_Run(batch, weights, first, own, calls, own_calls))
    running.progress("least squares", 0, small.n_layers)
    for layer in range(small.n_layers):
        wanted = []
        for run in runs:
            run.dense, seen = _through(dense, layer, run.dense, run.dense_calls)
            wanted.append((seen.residual[layer], run.dense))
        _refit_attention(small, layer, runs, [between for between, _ in wanted], ridge)
        _refit_ffn(small, layer, runs, [after for _, after in wanted], ridge)
        for run in runs:
            run.small, _ = _through(small, layer, run.small, run.small_calls)
        running.progress("least squares", layer + 1, small.n_layers)
    return small


def _task_weights(prompts: Sequence[Encoded]) -> dict[str, float]:
    """What a token of each task weighs, so that all of its tokens have its share; 1 on average."""
    sizes = {
        name: (share, sum(len(row.ids) - 1 + (ANSWERS - 1) * len(row.answer) for row in rows))
        for name, share, rows in by_part(prompts)
    }
    total = sum(size for _, size in sizes.values())
    return {name: share * total / size for name, (share, size) in sizes.items()}


def _refit_attention(
    small: Decoder, layer: int, runs: list[_Run], wanted: list[torch.Tensor], ridge: float | None
) -> None:
    path, present = small.family.attention_output, small.attention_output(layer) is not None
    fit = _Fit.of(small, layer, path, present)
    if fit is None:
        return
    real = (small.head_slots[layer] >= 0).repeat_interleave(small.head_dim).to(small.device)
    for run, want in zip(runs, wanted, strict=True):
        _, seen = _through(small, layer, run.small, run.small_calls)
        inputs = None
        if present:  # pads' columns are zero and stay so
            inputs = seen.heads[layer] * real
        fit.add(inputs, want - seen.residual[layer], run.weights)
    fit.apply(ridge)


def _refit_ffn(
    small: Decoder, layer: int, runs: list[_Run], wanted: list[torch.Tensor], ridge: float | None
) -> None:
    path, present = small.family.ffn_output, small.ffn_output(layer) is not None
    fit = _Fit.of(small, layer, path, present)
    if fit is None:
        return
    for run, want in zip(runs, wanted, strict=True):
        after, seen = _through(small, layer, run.small, run.small_calls)
        fit.add(seen.coefficients.get(layer), want - after, run.weights)
    fit.apply(ridge)


def _through(
    decoder: Decoder, layer: int, states: torch.Tensor, calls: list[Call]
) -> tuple[torch.Tensor, Captured]:
    """A layer's result (B, T, D) and what passed inside it."""
    args, kwargs = calls[layer]
    with capture(decoder) as seen:
        found = decoder.layers[layer](states, *args, **kwargs)
    return found[0] if isinstance(found, tuple) else found, seen


@dataclass
class _Sums:
    """Products of inputs (n, n), of inputs and what lacks (n, D), the latter's square, tokens."""

    square: torch.Tensor | float = 0.0
    product: torch.Tensor | float = 0.0
    lacking: float = 0.0
    tokens: int = 0

    def add(self, x: torch.Tensor, lacking: torch.Tensor, weights: torch.Tensor) -> None:
        weighed = (x * weights[:, None]).T
        # Products of some thousand tokens in float32, their sums in float64.
        self.square = self.square + (weighed @ x).double().cpu()
        self.product = self.product + (weighed @ lacking).double().cpu()
        self.lacking += float((weights[:, None] * lacking.square()).sum())
        self.tokens += len(x)

    def left_over(self, change: torch.Tensor) -> float:
        """What still lacks after a change (n, D), squared and weighed."""
        assert isinstance(self.square, torch.Tensor) and isinstance(self.product, torch.Tensor)
        moved = change * (self.square @ change - 2 * self.product)
        return self.lacking + float(moved.sum())


class _Fit:
    """The normal equations of one projection, of which `weight` (n, D) and `bias` (D,) may lack."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.most, self.rest = _Sums(), _Sums()

    @classmethod
    def of(cls, decoder: Decoder, layer: int, path: str, present: bool) -> _Fit | None:
        """The equations of a layer's projection, or of the constant that is left of it."""
        module: nn.Module | None = dict(decoder.layers[layer].named_modules()).get(path)
        if module is None:
            return None
        weight = decoder.output_weight(module).detach() if present else None
        bias = getattr(module, "bias", None)
        return None if weight is None and bias is None else cls(weight, bias)

    def add(
        self, inputs: torch.Tensor | None, lacking: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """A batch: inputs (B, T, n), what the stream lacks (B, T, D), weights (B, T)."""
        real = weights > 0
        columns = [] if self.weight is None or inputs is None else [inputs.float()]
        if self.bias is not None:
            columns.append(torch.ones(*weights.shape, 1, device=weights.device))
        x = torch.cat(columns, -1)
        held = (torch.arange(len(weights), device=weights.device) % _FOURTH == _FOURTH - 1)[:, None]
        for sums, which in ((self.most, real & ~held), (self.rest, real & held)):
            if bool(which.any()):
                sums.add(x[which], lacking[which].float(), weights[which])

    def apply(self, ridge: float | None) -> None:
        """Change weight and bias; without a `ridge`, by the one that serves best."""
        if ridge is None:
            ridge = self._best_ridge()
        change = self._solve(
            self.most.square + self.rest.square, self.most.product + self.rest.product, ridge
        )
        if self.bias is not None:
            self.bias += change[-1].to(self.bias)
            change = change[:-1]
        if self.weight is not None:
            self.weight += change.to(self.weight)

    def _best_ridge(self) -> float:
        most, rest = self.most, self.rest
        assert isinstance(most.square, torch.Tensor)
        if most.tokens + rest.tokens >= _PLENTY * len(most.square):
            return RIDGE
        if not rest.tokens:
            return _RIDGES[-1]
        return min(
            _RIDGES,
            key=lambda each: rest.left_over(self._solve(most.square, most.product, each)),
        )

    def _solve(self, square: Any, product: Any, ridge: float) -> torch.Tensor:
        size = square.diagonal().mean().clamp(min=1e-30)
        penalty = torch.full((len(square),), float(ridge * size), dtype=torch.float64)
        if self.bias is not None:
            penalty[-1] = 1e-8 * size  # a constant is not shrunk
        found: torch.Tensor = torch.linalg.solve(square + penalty.diag(), product)
        return found
