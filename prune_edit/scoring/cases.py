"""Neurons by cases: the union over examples of each one's own best neurons by CNA.

arXiv 2409.14144, section 6.1: a neuron stays if it is among the n best of at least one case,
however little it does on average over them. The smallest such n is the neuron's *entry*; the
neurons of the lowest entries are the union of the largest n that fits, filled up from the next. A
case is an example, its change the mean over its answer tokens. Neurons that change equally enter
together, once all of them are among the n best, so that no case brings more than n; no change is
told from rounding (1e-5 nats), or the batch would decide about neurons that do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.layout import Kept
from prune_edit.running import numbered
from prune_edit.scoring.contrast import contrast_sides, score_cna
from prune_edit.scoring.importance import importances
from prune_edit.scoring.intervention import head_drops, without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.scoring.true_norm import true_importances
from prune_edit.tasks.prompts import Batch, Encoded, collate
from prune_edit.units import Units

_ROUNDING = 1e-5  # nats below which a change is float32's, as of neurons below the top head


@dataclass(frozen=True)
class Cases:
    """What all cases say of the neurons.

    `entry` (L, N), int64, is the smallest n with which a neuron is in the union of the cases' n
    best, 0 for a neuron that is absent; `change` (L, N) its mean CNA score in nats, float64.
    """

    entry: torch.Tensor
    change: torch.Tensor

    def union(self, n: int) -> Kept:
        """The neurons that are among the `n` best of at least one case."""
        inside = (self.entry > 0) & (self.entry <= n)
        return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in inside)

    def largest(self, count: int, layers: Sequence[int] | None = None) -> int:
        """The greatest n whose union has at most `count` neurons (in `layers`, where given)."""
        rows = self.entry if layers is None else self.entry[list(layers)]
        entries = rows[rows > 0].sort().values
        return int(entries[count]) - 1 if count < len(entries) else self.entry.numel()

    def scores(self) -> torch.Tensor:
        """How many neurons come behind each and itself, (L, N) float32, exact; NaN if absent.

        In the order of their entries, among equals of their mean change, then of their numbers: the
        best of these scores are the union of the largest n that fits, and the next.
        """
        order = self.change.flatten().sort(descending=True, stable=True).indices
        order = order[self.entry.flatten()[order].sort(stable=True).indices]
        order = order[self.entry.flatten()[order] > 0]
        found = torch.full((self.entry.numel(),), torch.nan)
        found[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
        return found.view_as(self.entry)


@torch.no_grad()
def score_cases(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads as by `cna` (L, H); neurons by the order in which cases bring them (`Cases.scores`).

    Raises as `score_cna`.
    """
    if not options.neurons:
        return score_cna(decoder, prompts, options)
    heads, cases = find_cases(decoder, prompts, options)
    return heads, cases.scores()


@torch.no_grad()
def find_cases(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, Cases]:
    """Heads as by `cna` (L, H), and every neuron's entry. Raises as `score_cna`."""
    there = present_neurons(decoder)
    entry = torch.full(decoder.neuron_shape, there.numel() + 1)
    change = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    for _, drops, found in case_changes(decoder, prompts, options):
        entry = torch.minimum(entry, case_ranks(found, there).amin(0))
        change += found.double().sum(0)
        if drops is not None:
            heads += drops.double().sum(0)
    if _two_sided(options):
        mean_heads = score_cna(decoder, prompts, replace(options, neurons=False))[0]
    else:
        mean_heads = (heads / max(1, len(prompts))).float()
    change = (change / max(1, len(prompts))).masked_fill(~there, torch.nan)
    return mean_heads, Cases(entry.masked_fill(~there, 0), change)


@torch.no_grad()
def count_cases(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, n: int
) -> torch.Tensor:
    """In how many cases a neuron is among the `n` best, (L, N) int64. Raises as `score_cna`."""
    there = present_neurons(decoder)
    total = torch.zeros(decoder.neuron_shape, dtype=torch.long)
    for _, _, found in case_changes(decoder, prompts, options):
        total += (case_ranks(found, there) <= n).sum(0)
    return total


def present_neurons(decoder: Decoder) -> torch.Tensor:
    """Which neurons are there, (L, N)."""
    there = torch.zeros(decoder.neuron_shape, dtype=torch.bool)
    for layer, slots in enumerate(decoder.neuron_slots):
        there[layer, slots.cpu()] = True
    return there


def case_ranks(changes: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """How many neurons change at least as much, itself included, in each case: (B, L, N) int64.

    One more than there are for those that are not `there`.
    """
    values = changes[:, there].contiguous()  # (B, U)
    values = torch.where(values.abs() < _ROUNDING, 0.0, values)
    ascending = values.sort(1).values
    ranks = torch.full(changes.shape, there.numel() + 1)
    ranks[:, there] = values.shape[1] - torch.searchsorted(ascending, values)
    return ranks


def _two_sided(options: Options) -> bool:
    return options.adapted is not None or bool(options.contrast)


def case_changes(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> Iterator[tuple[list[int], torch.Tensor | None, torch.Tensor]]:
    """Each batch's prompts, head drops (B, L, H), where heads are ablated, and changes (B, L, N).

    A change is the CNA score, the mean over the example's answer tokens.
    """
    what = "neurons by cases"
    if _two_sided(options):
        (one, rows, _), (two, other_rows, _) = contrast_sides(decoder, prompts, options)
        for numbers, batch in numbered(one, rows, options, what):
            other = collate([other_rows[i] for i in numbers]).to(two.device)
            yield numbers, None, _gains(one, batch, options) - _gains(two, other, options)
        return
    for numbers, batch in numbered(decoder, prompts, options, what):
        drops = head_drops(decoder, batch, options)
        units = without_top_heads(decoder, drops, options)
        yield numbers, drops, _gains(decoder, batch, options, units)


def _gains(
    decoder: Decoder, batch: Batch, options: Options, without: Units | None = None
) -> torch.Tensor:
    """Each example's mean importance over its answer tokens, (B, L, N) float32.

    With `without`, less that of the model whose units are scaled so.
    """
    if options.norm == "true":
        found = true_importances(decoder, batch)
        if without is not None:
            found -= true_importances(decoder, batch, without)
    else:
        found, final = importances(decoder, batch)
        if without is not None:
            found -= importances(decoder, batch, without, frozen=final)[0]
    rows = batch.rows.cpu()
    total = torch.zeros(len(batch.input_ids), *decoder.neuron_shape)
    total.index_add_(0, rows, found)
    return total / rows.bincount(minlength=len(total))[:, None, None]
