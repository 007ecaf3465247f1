"""Heads: what the answer loses without each, by log probability and by accuracy, per operation.

arXiv 2409.14144, section 3.2 (interventions) and 3.3 (sums that need a carry and those that do
not). Everything is exact: the model runs without each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.answers import answers_with
from prune_edit.explain.values import Grid, Shown, best_of, grid_of
from prune_edit.hooks import Pattern, attention_pattern
from prune_edit.replay import record
from prune_edit.scoring.intervention import all_head_drops
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Batch, Encoded

ALL = "all"


@dataclass(frozen=True)
class HeadMap(Shown):
    """One group of prompts: mean log probability of the answer (nats) and accuracy (a share) of the
    whole model, and what each falls by without every head, (L, H).
    """

    kind: ClassVar[str] = "head map"

    group: str
    examples: int
    log_prob: float
    accuracy: float
    log_prob_drops: Grid
    accuracy_drops: Grid

    def best(self, count: int = 10, by: str = "log_prob") -> list[tuple[int, int]]:
        """Layers and numbers of the heads that cost most, by `log_prob` or `accuracy`.

        Of equal accuracy those first that cost more log probability.
        """
        falls = self.drops
        if by == "log_prob":
            return best_of(falls, count)
        shares = _tensor(self.accuracy_drops)
        # A share of examples has gaps of 1 / examples: less than that only parts the equal.
        largest = falls.abs().nan_to_num(nan=0.0).max().clamp(min=1e-12)
        return best_of(shares + falls / largest / (4.0 * self.examples), count)

    @property
    def drops(self) -> torch.Tensor:
        """What log probability falls by, (L, H), NaN for heads that are not there."""
        return _tensor(self.log_prob_drops)


@dataclass(frozen=True)
class HeadMaps(Shown):
    """A map of all prompts together, then one of every group where there are several."""

    kind: ClassVar[str] = "heads"

    maps: tuple[HeadMap, ...]

    def of(self, group: str = ALL) -> HeadMap:
        """The map of one group."""
        return next(each for each in self.maps if each.group == group)


@torch.no_grad()
def explain_heads(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> HeadMaps:
    """Ablate every head, alone, over the prompts; per group of theirs (an operation, for sums)."""
    plain = answers_with(decoder, prompts, options, "answers")
    drops = {
        measure: all_head_drops(
            decoder, prompts, replace(options, measure=measure, ablation="zero")
        ).double()
        for measure in ("logprob", "accuracy")
    }
    groups = sorted({row.example.group for row in prompts})
    members = {ALL: list(range(len(prompts)))}
    if len(groups) > 1:
        for name in groups:
            own = [i for i, row in enumerate(prompts) if row.example.group == name]
            members[name or "no group"] = own
    return HeadMaps(
        tuple(
            HeadMap(
                group=name,
                examples=len(own),
                log_prob=float(plain.log_probs[own].mean()),
                accuracy=float(plain.right[own].double().mean()),
                log_prob_drops=grid_of(drops["logprob"][own].mean(0)),
                accuracy_drops=grid_of(drops["accuracy"][own].mean(0)),
            )
            for name, own in members.items()
        )
    )


@dataclass(frozen=True)
class AttentionRow(Shown):
    """What a head looks at from the last position: a weight for every token, 1 in all."""

    kind: ClassVar[str] = "attention row"

    name: str
    layer: int
    head: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Attention(Shown):
    """The attention of some heads over a prompt's tokens."""

    kind: ClassVar[str] = "attention"

    tokens: tuple[str, ...]
    rows: tuple[AttentionRow, ...]


@torch.no_grad()
def patterns_of(decoder: Decoder, batch: Batch, layers: Sequence[int]) -> dict[int, Pattern]:
    """The attention patterns of those of the layers that have heads."""
    with decoder.eager():
        _, replay = record(decoder, batch.inputs)
        return {
            layer: attention_pattern(decoder, layer, replay.states[layer], replay.calls[layer])
            for layer in layers
            if decoder.layout.slots[layer]
        }


def attention_of(
    decoder: Decoder, batch: Batch, tokens: Sequence[str], heads: Sequence[tuple[int, int]]
) -> Attention:
    """Where heads (layer, head) look from the position that predicts a batch's first answer."""
    found = patterns_of(decoder, batch, sorted({layer for layer, _ in heads}))
    rows = []
    for layer, head in heads:
        slot = decoder.layout.slots[layer].index(head)
        weights = found[layer].weights[batch.rows[0], slot, batch.columns[0], : len(tokens)]
        rows.append(AttentionRow(f"{layer}^{head}", layer, head, tuple(weights.double().tolist())))
    return Attention(tuple(tokens), tuple(rows))


def _tensor(grid: Grid) -> torch.Tensor:
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in grid])
