"""LoRA's mechanism: which neurons a tuned model uses more than its base, where, and by how much.

arXiv 2409.14144, section 5 (tables 9 and 10): tuning raises the coefficients of neurons that the
prediction rests on. Neurons are ranked by CNA between base and tuned model, and, since that ranking
picks what rose, by their importance in the base as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.answers import answers_with
from prune_edit.explain.curves import coefficients, ranked
from prune_edit.explain.heads import ALL
from prune_edit.explain.neurons import Neurons, explain_neurons
from prune_edit.explain.question import token_rows
from prune_edit.explain.values import Grid, Shown, grid_of
from prune_edit.running import numbered
from prune_edit.scoring.cases import present_neurons
from prune_edit.scoring.importance import importances, trace
from prune_edit.scoring.intervention import all_head_drops
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded

COUNTS = (10, 20, 30, 50)
"""The paper's."""


@dataclass(frozen=True)
class Amplification(Shown):
    """The share by which the coefficients of each case's top `neurons` grow, mean over cases.

    Of their sizes, summed over the neurons, which are ranked by the change of importance or by the
    base's importance. A case is an answer token.
    """

    kind: ClassVar[str] = "amplification"

    neurons: int
    by_change: float
    by_importance: float


@dataclass(frozen=True)
class LayerChange(Shown):
    """What tuning changes in a layer, over answer tokens.

    `importance`: the sum of its neurons' changes in nats; `coefficients`: the share by which the
    mean size of its coefficients changes; `weights`: the size of its weights' difference, as a
    share of theirs.
    """

    kind: ClassVar[str] = "layer change"

    layer: int
    importance: float
    coefficients: float
    weights: float


@dataclass(frozen=True)
class Lora(Shown):
    """Base against tuned model: answers, neurons, layers, heads (tuned less base, nats)."""

    kind: ClassVar[str] = "lora"

    examples: int
    base_accuracy: float
    tuned_accuracy: float
    base_log_prob: float
    tuned_log_prob: float
    amplification: tuple[Amplification, ...]
    layers: tuple[LayerChange, ...]
    neurons: Neurons
    heads: Grid
    head_group: str = ALL


@torch.no_grad()
def explain_lora(
    decoder: Decoder,
    adapted: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    counts: Sequence[int] = COUNTS,
    top: int = 10,
) -> Lora:
    """Compare a model with itself tuned (`scoring.load_adapter`). Raises ModelError for another."""
    against = replace(options, adapted=adapted)
    neurons = explain_neurons(decoder, prompts, against, top)
    base = answers_with(decoder, prompts, options, "base")
    tuned = answers_with(adapted, prompts, options, "tuned")
    plain = replace(options, measure="logprob", ablation="zero")
    heads = all_head_drops(adapted, prompts, plain) - all_head_drops(decoder, prompts, plain)
    sizes, rises = _coefficients(decoder, adapted, token_rows(prompts), options, counts)
    layers = tuple(
        LayerChange(layer, change, size, _weights(decoder, adapted, layer))
        for layer, (change, size) in enumerate(zip(neurons.changes, sizes, strict=True))
    )
    return Lora(
        examples=len(prompts),
        base_accuracy=base.accuracy,
        tuned_accuracy=tuned.accuracy,
        base_log_prob=base.log_prob,
        tuned_log_prob=tuned.log_prob,
        amplification=rises,
        layers=layers,
        neurons=neurons,
        heads=grid_of(heads.double().mean(0)),
    )


def _coefficients(
    decoder: Decoder,
    adapted: Decoder,
    rows: Sequence[Encoded],
    options: Options,
    counts: Sequence[int],
) -> tuple[list[float], tuple[Amplification, ...]]:
    """Per layer the change of the coefficients' mean size, and the rises of the top neurons."""
    pool = present_neurons(decoder)
    wanted = sorted({min(count, int(pool.sum())) for count in counts})
    sums = torch.zeros(len(wanted), 2, dtype=torch.float64)
    sizes = torch.zeros(2, decoder.n_layers, dtype=torch.float64)
    for _, batch in numbered(decoder, rows, options, "coefficients"):
        before, after = (
            coefficients(side, trace(side, batch.to(side.device))) for side in (decoder, adapted)
        )
        own = importances(decoder, batch)[0]
        gained = importances(adapted, batch.to(adapted.device))[0] - own
        for column, ranking in enumerate((gained, own)):
            best = ranked(ranking, pool)
            for place, count in enumerate(wanted):
                some = best[:, :count]
                usual, new = (each.gather(1, some).abs().sum(1) for each in (before, after))
                sums[place, column] += (new / usual.clamp(min=1e-12) - 1).double().sum()
        for side, found in enumerate((before, after)):
            sizes[side] += found.abs().double().view(len(found), *pool.shape).sum((0, 2))
    means = (sums / max(1, len(rows))).tolist()
    changes = [after / before - 1 if before else 0.0 for before, after in sizes.T.tolist()]
    return changes, tuple(Amplification(n, *row) for n, row in zip(wanted, means, strict=True))


def _weights(decoder: Decoder, adapted: Decoder, layer: int) -> float:
    """Size of the difference of a layer's weights over the size of its weights."""
    moved = total = 0.0
    both = zip(decoder.layers[layer].parameters(), adapted.layers[layer].parameters(), strict=True)
    for one, two in both:
        moved += float((two.detach() - one.detach()).double().pow(2).sum())
        total += float(one.detach().double().pow(2).sum())
    return float((moved / total) ** 0.5) if total else 0.0
