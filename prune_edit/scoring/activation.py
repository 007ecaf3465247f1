"""Minitron: the size of what a unit hands on, arXiv 2407.14679, section 2.2.

At a token, a head's activation is the L2 norm of its output before the output projection, a
neuron's the size of its coefficient (of the activated, and for a gated FFN gated, value: what the
output projection reads). They are aggregated as the paper found best: the mean over an example's
tokens, then the L2 norm over the examples, here divided by the root of their number so that more
prompts do not mean larger scores; the ranking is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture
from prune_edit.running import stream
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import head_sums, scatter_heads
from prune_edit.tasks.prompts import Encoded


@torch.no_grad()
def score_activation(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square over examples of a unit's mean activation: (L, H) and (L, N)."""
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    for batch in stream(decoder, prompts, options, "activations"):
        with capture(decoder) as seen:
            decoder.final_states(**batch.inputs)
        real = batch.attention_mask.double()
        share = real / real.sum(1, keepdim=True)  # (B, T), each example's tokens alike
        for layer, values in seen.heads.items():
            norms = head_sums(decoder, values.double().pow(2)).sqrt()  # (B, T, slots)
            means = torch.einsum("bt,bts->bs", share, norms)
            found = torch.zeros(decoder.head_shape[1], dtype=torch.float64)
            scatter_heads(decoder, layer, means.pow(2).sum(0), found)
            heads[layer] += found
        for layer, coefficients in seen.coefficients.items():
            means = torch.einsum("bt,btn->bn", share, coefficients.double().abs())
            neurons[layer, decoder.neuron_slots[layer]] += means.pow(2).sum(0).cpu()
    count = len(prompts)
    return mark_absent(decoder, (heads / count).sqrt().float(), (neurons / count).sqrt().float())
