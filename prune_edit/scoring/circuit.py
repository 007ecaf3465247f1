"""Neurons by what they say and by what they bring: CNA and the query side in one score.

CNA (arXiv 2409.14144, section 4.1) finds the neurons that act on the answer themselves, most of
them deep; a shallow one that only finds what a deep one needs has next to no score. The query side
(stages 1 to 3) is what units bring the keys of the deep neurons. The two are in different units,
and each is taken as a share of its own sum over the model:

    score = |change of importance| / sum  +  |brought to the deep neurons| / sum

Heads are scored by intervention, which counts all that they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.contrast import score_cna
from prune_edit.scoring.options import Options
from prune_edit.scoring.query import score_query
from prune_edit.tasks.prompts import Encoded


def score_circuit(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention (L, H), in nats; neurons by both shares, (L, N), 2 in all."""
    heads, direct = score_cna(decoder, prompts, options)
    if not options.neurons:
        return heads, direct
    _, brought = score_query(decoder, prompts, options)
    return heads, (_share(direct) + _share(brought)).float()


def _share(scores: torch.Tensor) -> torch.Tensor:
    """Each unit's part of the summed sizes; 0 where all are 0, NaN where absent."""
    sizes = scores.double().abs()
    total = sizes.nansum()
    return sizes / total if total > 0 else sizes
