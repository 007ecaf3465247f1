"""Find a concept's neurons: CNA input against input (arXiv 2409.14144, sections 4.1 and 6.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.contrast import mean_importances
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Example


@torch.no_grad()
def concept_scores(decoder: Decoder, pairs: Sequence[Example], options: Options) -> torch.Tensor:
    """Mean importance for the answer after the prompt minus after the contrast, (L, N) in nats.

    Signed: a high score raises the answer more after the stereotyped prompt. Each side's norm is
    frozen at its own final state, since they are two inputs of one model.
    """
    sides = []
    for rows in (pairs, [replace(pair, prompt=str(pair.contrast)) for pair in pairs]):
        encoded = encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
        sides.append(mean_importances(decoder, encoded, options, "concept neurons"))
    return (sides[0] - sides[1]).float()
