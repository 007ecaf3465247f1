"""Wanda, structured: weight times activation norm, arXiv 2306.11695.

The metric of a weight is `|W_dj| * ||x_j||_2` (section 3), the norm over all tokens of the
prompts. A unit's score is the sum over its weights in the output projection, as in the structured
form that arXiv 2312.11983 compares with (Wanda-sp); a mean over d instead of the sum, as in its
code, ranks the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import Moments, Sums, moments, unit_scores
from prune_edit.tasks.prompts import Encoded


@torch.no_grad()
def score_wanda(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of `|W| * ||x||_2` over a unit's output weights: (L, H) and (L, N)."""
    return wanda_of(decoder, moments(decoder, prompts, options))


@torch.no_grad()
def wanda_of(decoder: Decoder, seen: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from what was seen of all prompts."""

    def score(part: str, layer: int, weight: torch.Tensor) -> torch.Tensor:
        sums: Sums = getattr(seen, part)
        return weight.abs().sum(1).cpu() * sums.second[layer].sqrt()  # (channels,)

    return mark_absent(decoder, *unit_scores(decoder, score))
