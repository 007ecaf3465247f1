"""First-order effects of changing units: on every pair's bias, and on what guards say.

An edit is a point of a Space: of each of U units (all heads, then all neurons) a change of factor,
and of a neuron a constant in units of what neurons usually are, theta (U, 2). Slopes are taken by
one backward pass for many rows, each of which has a point of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit, edit_of, named
from prune_edit.editing.guard import log_probs
from prune_edit.editing.probe import Probe
from prune_edit.hooks import capture, scale, shift
from prune_edit.tasks.prompts import Batch
from prune_edit.units import Units

_TOKENS = 8192  # padded, at once
_CHEAP = 10.0  # constants beside factors: on validation they do less harm for the same bias
_LEAST = 1e-9  # nats: a divergence too small to have a slope


@dataclass(frozen=True)
class Space:
    """What an edit of this model may be: with `heads` theirs, too, with `moved` constants.

    `unit` is what constants are counted in.
    """

    decoder: Decoder
    heads: bool
    moved: bool
    unit: float

    @property
    def n_heads(self) -> int:
        """L * H, the first units."""
        return math.prod(self.decoder.head_shape)

    @property
    def n_units(self) -> int:
        """U."""
        return self.n_heads + math.prod(self.decoder.neuron_shape)

    @cached_property
    def there(self) -> torch.Tensor:
        """Which units may change at all, (U,)."""
        heads = torch.zeros(self.decoder.head_shape, dtype=torch.bool)
        neurons = torch.zeros(self.decoder.neuron_shape, dtype=torch.bool)
        for layer in range(self.decoder.n_layers):
            heads[layer, list(self.decoder.layout.heads[layer])] = self.heads
            neurons[layer, list(self.decoder.layout.neurons[layer])] = True
        return torch.cat([heads.flatten(), neurons.flatten()])

    @contextmanager
    def at(self, theta: torch.Tensor) -> Iterator[None]:
        """The model edited as `theta` (U, 2) says, or each row of a batch as its (B, U, 2)."""
        many = theta.shape[:-2]
        factors, constants = 1 + theta[..., 0], theta[..., self.n_heads :, 1]
        heads = factors[..., : self.n_heads].reshape(*many, *self.decoder.head_shape)
        neurons = factors[..., self.n_heads :].reshape(*many, *self.decoder.neuron_shape)
        with ExitStack() as stack:
            units = Units(heads if self.heads else None, neurons)
            stack.enter_context(scale(self.decoder, units))
            if self.moved:
                by = constants.reshape(*many, *self.decoder.neuron_shape) * self.unit
                stack.enter_context(shift(self.decoder, by))
            yield

    def edit(self, theta: torch.Tensor) -> Edit:
        """The edit at theta, rounded to what a person can read."""
        changes = []
        shapes = self.decoder.head_shape, self.decoder.neuron_shape
        for at in theta.any(1).nonzero().flatten().tolist():
            head = at < self.n_heads
            layer, unit = divmod(at - (0 if head else self.n_heads), shapes[not head][1])
            factor, moved = 1 + float(theta[at, 0]), 0.0
            if not head and self.moved:
                moved = round(float(theta[at, 1]) * self.unit, 5)
            factor = round(factor, 4)
            kind = "head" if head else "neuron"
            changes.append(Change(kind, layer, unit, factor, moved, named(factor)))
        return edit_of(self.decoder, changes)


@torch.no_grad()
def space_of(decoder: Decoder, probe: Probe, heads: bool, moved: bool) -> Space:
    """The Space of a model; constants are counted in ten times the median neuron's size.

    That is its root mean square after the probe's texts.
    """
    inputs, last = probe.texts.inputs
    some = slice(max(1, _TOKENS // inputs["input_ids"].shape[1]))
    part = {name: each[some].to(decoder.device) for name, each in inputs.items()}
    ends = last[some].to(decoder.device)
    places = (torch.arange(len(ends), device=ends.device), ends)
    with capture(decoder, at=places, heads=False) as seen:
        decoder.final_states(**part)
    sizes = [each.float().pow(2).mean(0).sqrt().cpu() for each in seen.coefficients.values()]
    unit = float(torch.cat(sizes).median()) if sizes else 1.0
    return Space(decoder, heads, moved, max(_CHEAP * unit, 1e-6))


def pair_slopes(
    space: Space, theta: torch.Tensor, probe: Probe, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair's bias at theta, (P,) in nats, and its slopes in some units (C,), (P, C, 2)."""
    texts, decoder = probe.texts, space.decoder
    width = max(map(len, texts.ids))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pairs in _chunks(texts.row, texts.text, max(1, _TOKENS // width)):
        mine = ((texts.row >= pairs[0]) & (texts.row <= pairs[-1])).nonzero().flatten()
        rows: dict[tuple[int, int], int] = {}
        place = torch.tensor([
            rows.setdefault((int(texts.row[k]), int(texts.text[k])), len(rows)) for k in mine
        ])  # fmt: skip
        owners = torch.tensor([pair - pairs[0] for pair, _ in rows])
        chosen = torch.tensor([text for _, text in rows])
        inputs, last = texts.inputs
        part = {name: each[chosen].to(decoder.device) for name, each in inputs.items()}
        own = torch.zeros(len(pairs), *theta.shape, requires_grad=True)
        with space.at(theta + own[owners]):
            states = decoder.final_states(**part)
            ends = last[chosen].to(decoder.device)
            states = states[torch.arange(len(ends), device=ends.device), ends]
            logs = decoder.unembed(states).float().log_softmax(-1)
        said = logs[place, texts.token[mine]].cpu() * texts.weights[0, mine]
        gaps = torch.zeros(len(pairs)).index_add(0, texts.row[mine] - pairs[0], said)
        (slope,) = torch.autograd.grad(gaps.sum(), own)
        parts.append((gaps.detach(), slope[:, units]))
    return torch.cat([gaps for gaps, _ in parts]), torch.cat([each for _, each in parts])


def _chunks(row: torch.Tensor, text: torch.Tensor, most: int) -> Iterator[range]:
    """Runs of pairs whose texts are at most so many."""
    counts = torch.zeros(int(row.max()) + 1, dtype=torch.long)
    for pair, _ in {(int(r), int(t)) for r, t in zip(row, text, strict=True)}:
        counts[pair] += 1
    start, total = 0, 0
    for pair, count in enumerate(counts.tolist()):
        if total and total + count > most:
            yield range(start, pair)
            start, total = pair, 0
        total += count
    yield range(start, len(counts))


def guard_slopes(
    space: Space,
    theta: torch.Tensor,
    batch: Batch,
    dense: torch.Tensor,
    units: torch.Tensor,
    share: float,
    draws: int,
    generator: torch.Generator,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Of one guard's batch the damage, its slopes (C, 2), and rows (R, C, 2) of its curvature.

    Damage is the divergence from the dense model's log probabilities (A, V), a mean by `share` over
    answer tokens; the rows' outer products sum to its Gauss-Newton matrix, of which `draws` random
    directions of the vocabulary are taken: with z random signs, the slope of
    sum_v sqrt(p_v) z_v log p_v has Fisher's matrix for its mean outer product. Where a row strays,
    the curvature along its own slope g is that of a square root, g g' / 2 KL, at least.
    """
    decoder = space.decoder
    own = torch.zeros(len(batch.input_ids), *theta.shape, requires_grad=True)
    with space.at(theta + own):
        logs = log_probs(decoder, batch)
    strays = (dense.exp() * (dense - logs)).sum(-1) * share
    each = torch.zeros(len(own), device=logs.device).index_add(0, batch.rows, strays)
    (slope,) = torch.autograd.grad(each.sum(), own, retain_graph=True)
    slope = slope[:, units]
    size = (2 * each.detach().cpu()).clamp(min=_LEAST).sqrt()
    rows = [slope / size[:, None, None]]
    root = logs.detach().exp().sqrt()
    for draw in range(draws):
        z = torch.randint(0, 2, logs.shape, generator=generator).to(root) * 2 - 1
        (found,) = torch.autograd.grad((logs * root * z).sum(), own, retain_graph=draw + 1 < draws)
        rows.append(found[:, units] * math.sqrt(share / draws))
    return float(each.detach().sum()), slope.sum(0), torch.cat(rows)
