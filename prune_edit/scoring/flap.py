"""FLAP: fluctuation of what a unit hands on, arXiv 2312.11983.

The metric of channel j of an output projection's input is its variance over the prompts' tokens
times the squared norm of the weights that read it, `var(x_j) * ||W_:j||^2` (section 3.2, WIFV):
what is lost when x_j is replaced by its mean, as `mean` recovery does. So that layers compare, the
channels of a layer are standardised to mean 0 and deviation 1, heads' and neurons' apart (section
3.3); a head's score is the mean over its channels. The released code also squares the attention's
metric first, of which the paper does not speak; it is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import Moments, moments, unit_scores
from prune_edit.tasks.prompts import Encoded


@torch.no_grad()
def score_flap(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised fluctuation, (L, H) and (L, N); below 0 is less than its layer's mean."""
    return flap_of(decoder, moments(decoder, prompts, options))


@torch.no_grad()
def flap_of(decoder: Decoder, seen: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from what was seen of all prompts."""

    def score(part: str, layer: int, weight: torch.Tensor) -> torch.Tensor:
        metric = seen.variance(part, layer) * weight.pow(2).sum(1).cpu()  # (channels,)
        there = torch.ones(len(metric), dtype=torch.bool)
        if part == "heads":  # pads, which stand for no head, say nothing of the layer
            there = (decoder.head_slots[layer] >= 0).repeat_interleave(decoder.head_dim)
        known = metric[there]
        spread = known.std() if len(known) > 1 else known.new_zeros(())
        # Where all are alike, none stands out.
        standard = (metric - known.mean()) / spread if spread > 0 else torch.zeros_like(metric)
        return standard / decoder.head_dim if part == "heads" else standard

    return mark_absent(decoder, *unit_scores(decoder, score))
