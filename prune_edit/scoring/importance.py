"""Importance of FFN neurons: what one neuron's output adds to the answer's log probability.

arXiv 2409.14144, section 4.1. Importance of neuron k at a position is
`log p(w | x + A + m_k fc2_k) - log p(w | x + A)`, both through the final norm with its scale
frozen at the value of the real final state, as in the authors' code. The logits are then linear in
the coefficient, and importance is its first order less a curvature (`curvature.py`):

    m (b_w - E_p[b]) - C,  C >= 0,  p the distribution of x + A, b = fc2_k through the unembedding.

Where logits are capped they are not linear, and every token is summed for every neuron.
Error: 5e-7 nats of truncation, and float32 rounding, about 1e-7 max |m b|.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import Captured, capture, scale
from prune_edit.scoring.curvature import block_size, curvature, expectations
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Batch
from prune_edit.units import Units


@dataclass(frozen=True)
class Traces:
    """What importance reads of a run, at the A positions that predict an answer token.

    `targets` (A,); `final` (A, D) are the states at which the final norm is frozen; per layer with
    neurons, `residual` (A, D) is x + A and `coefficients` (A, n) are m (`Captured.effective`).
    """

    targets: torch.Tensor
    final: torch.Tensor
    residual: dict[int, torch.Tensor]
    coefficients: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, places: slice | torch.Tensor) -> Traces:
        """Some of the positions."""
        return Traces(
            self.targets[places],
            self.final[places],
            {layer: part[places] for layer, part in self.residual.items()},
            {layer: part[places] for layer, part in self.coefficients.items()},
        )


def join(parts: Sequence[Traces]) -> Traces:
    """The positions of several traces, one after another."""
    if len(parts) == 1:
        return parts[0]
    layers = parts[0].coefficients
    return Traces(
        torch.cat([part.targets for part in parts]),
        torch.cat([part.final for part in parts]),
        {layer: torch.cat([part.residual[layer] for part in parts]) for layer in layers},
        {layer: torch.cat([part.coefficients[layer] for part in parts]) for layer in layers},
    )


def trace(
    decoder: Decoder,
    batch: Batch,
    units: Units | None = None,
    frozen: torch.Tensor | None = None,
) -> Traces:
    """Run a batch, of the model whose units are scaled so.

    `frozen` (A, D) gives the final states of another run, since the authors keep the original
    model's norm scale in the model without a head as well.
    """
    places = (batch.rows, batch.columns)
    with scale(decoder, units or Units()), capture(decoder, at=places, heads=False) as seen:
        decoder.final_states(**batch.inputs)
    assert seen.final is not None
    return traces_of(seen, batch, seen.final if frozen is None else frozen)


def trace_both(decoder: Decoder, batch: Batch, units: Units | None) -> list[Traces]:
    """A batch's traces; with `units` also those of the model scaled so, its norm frozen alike."""
    whole = trace(decoder, batch)
    return [whole] if units is None else [whole, trace(decoder, batch, units, frozen=whole.final)]


def traces_of(seen: Captured, batch: Batch, final: torch.Tensor) -> Traces:
    """What was captured at a batch's answers, of as many layers as ran."""
    return Traces(
        batch.targets,
        final,
        {layer: seen.residual[layer] for layer in seen.coefficients},
        {layer: seen.effective(layer) for layer in seen.coefficients},
    )


def room(decoder: Decoder) -> int:
    """How many positions may be scored at once: their states and coefficients in all layers, and
    their logits in one, take at most the decoder's `work`.
    """
    layers, width = decoder.neuron_shape
    tokens, size = decoder.unembedding.shape
    return max(1, decoder.work // 4 // (2 * tokens + layers * (width + size)))


@dataclass(frozen=True)
class Readout:
    """One layer's neurons and positions as the vocabulary sees them, float32.

    `values` (n, D) are fc2 through the norm's linear part, `moved` (A, n) the coefficients over
    the norm's divisor, `log_p` (A, V) the distribution of x + A (with a `cap` the logits before
    it), `expected` (A, D) the mean row of the unembedding under it.
    """

    values: torch.Tensor
    moved: torch.Tensor
    log_p: torch.Tensor
    expected: torch.Tensor
    targets: torch.Tensor
    unembedding: torch.Tensor
    cap: float | None

    @property
    def linear(self) -> bool:
        """Whether logits are linear in the coefficient: no cap."""
        return self.cap is None

    def first_order(self, neurons: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """`m (b_w - E_p[b])`, an upper bound of the importance where logits are linear, (A, n)."""
        pull = self.unembedding[self.targets].float() - self.expected
        return self.moved[:, neurons] * (pull @ self.values[neurons].T)

    def importances(self, neurons: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Importance of these of the layer's neurons for every position, (A, n)."""
        if not self.linear:
            return self._capped(neurons)
        found = self.first_order(neurons)
        return found - curvature(
            self.values[neurons],
            self.unembedding,
            self.log_p,
            self.expected,
            self.moved[:, neurons],
        )

    def _capped(self, neurons: torch.Tensor | slice) -> torch.Tensor:
        values, moved, cap = self.values[neurons], self.moved[:, neurons], self.cap
        assert cap is not None
        places, rows = (torch.ones_like(moved) > 0).nonzero().unbind(1)
        lse = expectations(
            values,
            self.unembedding,
            self.log_p,
            moved,
            (rows, places),
            None,
            cap,
            block_size(values.device),
        ).view_as(moved)
        own = self.log_p.gather(1, self.targets[:, None])  # (A, 1), before the cap
        after = own + moved * (self.unembedding[self.targets].float() @ values.T)
        base = (cap * torch.tanh(self.log_p / cap)).logsumexp(1, keepdim=True)
        return (cap * torch.tanh(after / cap) - lse) - (cap * torch.tanh(own / cap) - base)


def read_out(decoder: Decoder, traces: Traces, layer: int) -> Readout:
    """A layer's `Readout`. Costs 4 A V D operations, and 2 A V numbers of memory."""
    linear, divisor = decoder.frozen_norm(traces.final)
    unembedding, cap = decoder.unembedding, decoder.softcap
    constant = decoder.logit_constant()
    state = linear(traces.residual[layer]) / divisor
    log_p = torch.empty(len(traces), len(unembedding), device=state.device)
    for part, weight in vocabulary_rows(unembedding):
        log_p[:, part] = state @ weight.T
        if constant is not None:
            log_p[:, part] += constant[part]
    expected = torch.zeros_like(state)
    if cap is None:
        log_p -= log_p.logsumexp(1, keepdim=True)
        mass = torch.zeros(len(state), 1, device=state.device)
        for part, weight in vocabulary_rows(unembedding):
            p = log_p[:, part].exp()
            expected.addmm_(p, weight)
            mass += p.sum(1, keepdim=True)
        expected /= mass
    return Readout(
        linear(decoder.residual_values(layer)),
        traces.coefficients[layer].float() / divisor,
        log_p,
        expected,
        traces.targets,
        unembedding,
        cap,
    )


def vocabulary_rows(unembedding: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The unembedding in float32, some rows (tokens) at a time."""
    width = max(64, 2 * block_size(unembedding.device) // unembedding.shape[1])
    for start in range(0, len(unembedding), width):
        part = slice(start, start + width)
        yield part, unembedding[part].float()


def layer_importances(decoder: Decoder, traces: Traces, layer: int) -> torch.Tensor:
    """Importance of all of a layer's neurons for every position, (A, n)."""
    most = room(decoder)
    if not len(traces):
        return torch.zeros_like(traces.coefficients[layer], dtype=torch.float32)
    parts = [
        read_out(decoder, traces.take(slice(start, start + most)), layer).importances()
        for start in range(0, len(traces), most)
    ]
    return torch.cat(parts)


def importances(
    decoder: Decoder,
    batch: Batch,
    units: Units | None = None,
    frozen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of every neuron for every answer token, (A, L, N) in nats, NaN if absent.

    With `units`, of the model whose heads or neurons are scaled so. Also returns the final states
    (A, D) at which the norm was frozen; `frozen` gives those of another run (`trace`).
    """
    traces = trace(decoder, batch, units, frozen)
    found = torch.full((len(traces), *decoder.neuron_shape), float("nan"))
    for layer in traces.coefficients:
        found[:, layer, decoder.neuron_slots[layer]] = layer_importances(
            decoder, traces, layer
        ).cpu()
    return found, traces.final


def mean_importance(
    decoder: Decoder, runs: Iterable[Sequence[Traces]], options: Options
) -> torch.Tensor:
    """Mean importance over the answer tokens of all batches, (L, N) float64 in nats, NaN if absent.

    A batch is one run, or two of which the second is subtracted. Batches are scored together as far
    as `room` goes, since a neuron's image in the vocabulary does not depend on the prompt.
    """
    total = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    absent = torch.ones(decoder.neuron_shape, dtype=torch.bool)
    tokens = 0
    rank, count = options.share
    for pair in _gathered(runs, room(decoder)):
        tokens += len(pair[0])
        for number, layer in enumerate(pair[0].coefficients):
            slots = decoder.neuron_slots[layer]
            absent[layer, slots] = False
            if number % count == rank:
                total[layer, slots] += change(decoder, pair, layer).cpu()
    return (options.gather(total) / max(1, tokens)).masked_fill_(absent, torch.nan)


def _gathered(runs: Iterable[Sequence[Traces]], most: int) -> Iterator[list[Traces]]:
    """Runs of several batches joined, as long as they have at most `most` positions."""
    held: list[Sequence[Traces]] = []
    size = 0
    for run in runs:
        more = sum(map(len, run))
        if held and size + more > most:
            yield [join(parts) for parts in zip(*held, strict=True)]
            held, size = [], 0
        held.append(run)
        size += more
    if held:
        yield [join(parts) for parts in zip(*held, strict=True)]


def change(decoder: Decoder, pair: Sequence[Traces], layer: int) -> torch.Tensor:
    """Importance, or its change between two runs, summed over positions, (n,) float64."""
    pair = [part.take(changed(pair, layer)) for part in pair] if len(pair) == 2 else pair
    found = layer_importances(decoder, join(pair), layer).double()
    return less_second(found, len(pair))


def less_second(found: torch.Tensor, runs: int) -> torch.Tensor:
    """Summed over the positions of a run, the first run less the second: (n,) of (runs * A, n)."""
    if runs == 1:
        return found.sum(0)
    half = len(found) // 2
    return found[:half].sum(0) - found[half:].sum(0)


def changed(pair: Sequence[Traces], layer: int) -> torch.Tensor:
    """The positions at which two runs differ in a layer, (A',): below the ablated heads none."""
    differs = torch.zeros_like(pair[0].targets, dtype=torch.bool)
    for one, two in (
        (pair[0].residual, pair[1].residual),
        (pair[0].coefficients, pair[1].coefficients),
    ):
        differs |= (one[layer] != two[layer]).any(1)
    return differs.nonzero()[:, 0]
