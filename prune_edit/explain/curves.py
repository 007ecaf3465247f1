"""Sufficiency and necessity: keep, or zero, only the neurons that CNA ranks first; and the lowest.

arXiv 2409.14144, section 4.2 and 4.3 (tables 5 and 6). Each prompt has its own ranking. *Zeroed*:
the top n of the deep layers are zero, all else stays. *Kept*: all others of the deep layers are
zero. Beside both stand as many random neurons of these layers. *Lowest*: only the lowest of the top
n is zero, and what is told is by how much the coefficients of the others fall, beside their fall
without the top head and without a random neuron of the same layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.answers import Answers, answers_with
from prune_edit.explain.question import token_rows
from prune_edit.explain.values import Shown, deep_layers
from prune_edit.scoring.cases import case_changes, present_neurons
from prune_edit.scoring.importance import Traces, trace
from prune_edit.scoring.intervention import without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Batch, Encoded, collate
from prune_edit.units import Units

COUNTS = (10, 20, 30, 50, 99)
"""The paper's."""


@dataclass(frozen=True)
class CurvePoint(Shown):
    """Accuracy (a share) and mean log probability of the answer (nats) with the top `neurons` of
    each prompt zeroed, or alone kept; `random` ones are means over the draws.
    """

    kind: ClassVar[str] = "curve point"

    neurons: int
    zeroed_accuracy: float
    zeroed_log_prob: float
    kept_accuracy: float
    kept_log_prob: float
    random_zeroed_accuracy: float
    random_zeroed_log_prob: float
    random_kept_accuracy: float
    random_kept_log_prob: float


@dataclass(frozen=True)
class Curves(Shown):
    """The whole model's figures, and a point for every number of neurons.

    `layers` are those that the neurons are of, `of` how many there are; `draws` random choices.
    """

    kind: ClassVar[str] = "curves"

    layers: tuple[int, ...]
    of: int
    examples: int
    draws: int
    accuracy: float
    log_prob: float
    points: tuple[CurvePoint, ...]


@torch.no_grad()
def explain_curves(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    counts: Sequence[int] = COUNTS,
    layers: Sequence[int] | None = None,
    draws: int = 3,
    changes: torch.Tensor | None = None,
) -> Curves:
    """Zero or keep only the top neurons (table 5). Raises as `score_cna`.

    `layers` default to the upper half's, 17 to 31 of 32; `changes` (P, L, N) are the prompts' CNA
    scores, where they are known.
    """
    chosen = tuple(deep_layers(decoder.n_layers) if layers is None else layers)
    pool = _pool(decoder, chosen)
    most = min(max(counts), int(pool.sum()))
    best = torch.empty(len(prompts), most, dtype=torch.long)  # flat numbers, best first
    if changes is not None:
        best = ranked(changes, pool)[:, :most]
    else:
        for numbers, _, found in case_changes(decoder, prompts, options):
            best[numbers] = ranked(found, pool)[:, :most]
    whole = answers_with(decoder, prompts, options)
    generator = torch.Generator().manual_seed(options.seed)
    flat = pool.flatten().nonzero()[:, 0]
    orders = [flat[torch.randperm(len(flat), generator=generator)] for _ in range(draws)]
    points = []
    for count in sorted({min(count, most) for count in counts} - {0}):
        sides = _both(decoder, prompts, options, pool, best[:, :count])
        drawn = [
            _both(decoder, prompts, options, pool, order[:count].expand(len(prompts), -1))
            for order in orders
        ]
        figures = [number for side in sides for number in (side.accuracy, side.log_prob)]
        for side in range(2):
            parts = [pair[side] for pair in drawn]
            figures.append(sum(each.accuracy for each in parts) / max(1, draws))
            figures.append(sum(each.log_prob for each in parts) / max(1, draws))
        points.append(CurvePoint(count, *figures))
    return Curves(
        layers=chosen,
        of=int(pool.sum()),
        examples=len(prompts),
        draws=draws,
        accuracy=whole.accuracy,
        log_prob=whole.log_prob,
        points=tuple(points),
    )


def ranked(changes: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Flat numbers of `pool`'s (L, N) neurons by their change (B, L, N), best first: (B, P)."""
    flat = changes.flatten(1).masked_fill(~pool.flatten(), -torch.inf).nan_to_num(nan=-torch.inf)
    return flat.argsort(dim=1, descending=True, stable=True)[:, : int(pool.sum())]


def _pool(decoder: Decoder, layers: Sequence[int]) -> torch.Tensor:
    """The neurons that are there in these layers, (L, N)."""
    inside = torch.zeros(decoder.n_layers, 1, dtype=torch.bool)
    inside[list(layers)] = True
    return present_neurons(decoder) & inside


def _both(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    pool: torch.Tensor,
    chosen: torch.Tensor,
) -> tuple[Answers, Answers]:
    """The answers with the chosen (P, n) zeroed, and with all others of the pool zeroed."""

    def units(numbers: list[int], keep: bool) -> Units:
        some = chosen[numbers]
        factors = torch.zeros(len(some), pool.numel()).scatter_(1, some, 1.0)
        factors = factors + (~pool.flatten()).float() if keep else 1 - factors
        return Units(neurons=factors.view(-1, *pool.shape))

    zeroed, kept = (
        answers_with(decoder, prompts, options, what, partial(units, keep=keep))
        for what, keep in (("zeroed", False), ("kept", True))
    )
    return zeroed, kept


@dataclass(frozen=True)
class LowestRow(Shown):
    """By which share the coefficients of the top `neurons` of a case fall, mean over cases.

    `without_head`: of all of them, where the case's top head is zero; of the others, where only the
    lowest is (`without_lowest`), or a random neuron of its layer (`without_random`).
    """

    kind: ClassVar[str] = "lowest row"

    neurons: int
    without_head: float
    without_lowest: float
    without_random: float


@dataclass(frozen=True)
class Lowest(Shown):
    """The lowest-neuron intervention: a row for every number of top neurons."""

    kind: ClassVar[str] = "lowest"

    layers: tuple[int, ...]
    examples: int
    rows: tuple[LowestRow, ...]


@torch.no_grad()
def explain_lowest(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    counts: Sequence[int] = COUNTS,
    layers: Sequence[int] | None = None,
) -> Lowest:
    """Zero only the lowest top neuron (table 6); every answer token is a case."""
    chosen = tuple(deep_layers(decoder.n_layers) if layers is None else layers)
    pool = _pool(decoder, chosen)
    rows = token_rows(prompts)
    generator = torch.Generator().manual_seed(options.seed)
    wanted = sorted({min(count, int(pool.sum())) for count in counts} - {0})
    if not wanted:  # pruning has left no neuron there
        return Lowest(chosen, len(rows), ())
    sums = torch.zeros(len(wanted), 3, dtype=torch.float64)
    for batch, best, headless in _token_cases(decoder, rows, options, pool):
        usual = coefficients(decoder, trace(decoder, batch))
        without = coefficients(decoder, trace(decoder, batch, headless))
        for place, count in enumerate(wanted):
            some = best[:, :count]  # (B, n)
            lowest = some.gather(1, (some // pool.shape[1]).argmin(1)[:, None])  # first of equals
            drawn = _same_layer(lowest, pool, some, generator)
            sums[place, 0] += _falls(usual, without, some).sum()
            for column, gone in ((1, lowest), (2, drawn)):
                after = coefficients(decoder, trace(decoder, batch, _less(gone, pool.shape)))
                others = torch.where(some == lowest, -1, some)
                sums[place, column] += _falls(usual, after, others).sum()
    means = (sums / max(1, len(rows))).tolist()
    found = tuple(LowestRow(count, *row) for count, row in zip(wanted, means, strict=True))
    return Lowest(chosen, len(rows), found)


def _token_cases(
    decoder: Decoder, rows: Sequence[Encoded], options: Options, pool: torch.Tensor
) -> Iterator[tuple[Batch, torch.Tensor, Units]]:
    """Batches of single answer tokens, their ranked neurons, and the model without the top head."""
    for numbers, drops, found in case_changes(decoder, rows, options):
        assert drops is not None
        batch = collate([rows[i] for i in numbers]).to(decoder.device)
        yield batch, ranked(found, pool), without_top_heads(decoder, drops, options)


def coefficients(decoder: Decoder, traces: Traces) -> torch.Tensor:
    """Coefficients at the answers, (A, L * N) float32, 0 where absent."""
    found = torch.zeros(len(traces), *decoder.neuron_shape)
    for layer, part in traces.coefficients.items():
        found[:, layer, decoder.neuron_slots[layer]] = part.float().cpu()
    return found.flatten(1)


def _less(gone: torch.Tensor, shape: torch.Size) -> Units:
    factors = torch.ones(len(gone), shape.numel()).scatter_(1, gone, 0.0)
    return Units(neurons=factors.view(-1, *shape))


def _same_layer(
    lowest: torch.Tensor, pool: torch.Tensor, some: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A random neuron of each lowest one's layer that is not among `some`, (B, 1)."""
    width = pool.shape[1]
    found = []
    for (flat,), own in zip(lowest.tolist(), some.tolist(), strict=True):
        layer = flat // width
        free = [layer * width + i for i in pool[layer].nonzero()[:, 0].tolist()]
        free = sorted(set(free) - set(own)) or [flat]
        found.append([free[int(torch.randint(len(free), (1,), generator=generator))]])
    return torch.tensor(found)


def _falls(before: torch.Tensor, after: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """The share by which these (B, n; -1 for none) coefficients fall, towards zero and past it."""
    there = some >= 0
    places = some.clamp(min=0)
    usual = before.gather(1, places)
    moved = after.gather(1, places) * usual.sign()
    size = (usual.abs() * there).sum(1)
    fall = ((usual.abs() - moved) * there).sum(1)
    return torch.where(size > 0, fall / size.clamp(min=1e-12), 0.0).double()
