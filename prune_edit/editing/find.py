"""Find a concept's units: neurons by CNA input against input, heads by intervention on the bias.

arXiv 2409.14144, sections 3.2, 4.1 and 6.2. All scores are signed: a unit with a high score makes
the answer likelier after the stereotyped prompt, one with a low score works against that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.probe import sides
from prune_edit.scoring.contrast import mean_importances
from prune_edit.scoring.intervention import all_head_drops
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded, encode_all
from prune_edit.tasks.task import Example


def _encoded(decoder: Decoder, pairs: Sequence[Example]) -> list[list[Encoded]]:
    return [
        encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
        for rows in sides(pairs)
    ]


@torch.no_grad()
def concept_scores(decoder: Decoder, pairs: Sequence[Example], options: Options) -> torch.Tensor:
    """Mean importance for the answer after the prompt minus after the contrast, (L, N) in nats.

    Signed: a high score raises the answer more after the stereotyped prompt. Each side's norm is
    frozen at its own final state, since they are two inputs of one model.
    """
    found = [
        mean_importances(decoder, rows, options, "concept neurons")
        for rows in _encoded(decoder, pairs)
    ]
    return (found[0] - found[1]).float()


@torch.no_grad()
def head_scores(decoder: Decoder, pairs: Sequence[Example], options: Options) -> torch.Tensor:
    """By how much the bias falls when a head is zeroed at all positions, (L, H) in nats."""
    plain = replace(options, measure="logprob")
    found = [
        all_head_drops(decoder, rows, plain, None).double().mean(0)
        for rows in _encoded(decoder, pairs)
    ]
    return (found[0] - found[1]).float()


@torch.no_grad()
def guard_scores(
    decoder: Decoder,
    factual: Sequence[Example],
    guards: dict[str, list[Encoded]],
    options: Options,
) -> torch.Tensor:
    """How much a neuron carries of what must stay, (L, N): 0 for nothing, 1 for the most of it.

    The greatest of its shares in the factual contrast (by CNA, as the concept's own) and in each
    guard task or text (by mean importance), whatever the sign.
    """
    found = []
    if factual:
        found.append(concept_scores(decoder, factual, options).abs())
    for name, rows in guards.items():
        found.append(mean_importances(decoder, rows, options, f"guard: {name}").float().abs())
    shares = [each / each.nan_to_num(0.0).max().clamp(min=1e-12) for each in found]
    return torch.stack(shares).amax(0) if shares else torch.zeros(decoder.neuron_shape)
