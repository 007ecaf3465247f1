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
from prune_edit.layerwise import each_layer
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import head_sums, scatter_heads
from prune_edit.tasks.prompts import Encoded


@torch.no_grad()
def score_activation(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square over examples of a unit's mean activation: (L, H) and (L, N)."""
    return activation_of(decoder, activation_sums(decoder, prompts, options))


@torch.no_grad()
def activation_sums(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> dict[str, torch.Tensor]:
    """Sums over examples of the squares of mean activations, and their number."""
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    for layer, batch, seen in each_layer(decoder, prompts, options, "activations"):
        real = batch.attention_mask.double()
        share = real / real.sum(1, keepdim=True)  # (B, T), each example's tokens alike
        if layer in seen.heads:
            norms = head_sums(decoder, seen.heads[layer].double().pow(2)).sqrt()  # (B, T, slots)
            means = torch.einsum("bt,bts->bs", share, norms)
            found = torch.zeros(decoder.head_shape[1], dtype=torch.float64)
            scatter_heads(decoder, layer, means.pow(2).sum(0), found)
            heads[layer] += found
        if layer in seen.coefficients:
            sizes = seen.coefficients[layer].double().abs()
            means = torch.einsum("bt,btn->bn", share, sizes)
            neurons[layer, decoder.neuron_slots[layer]] += means.pow(2).sum(0).cpu()
    return {"heads": heads, "neurons": neurons, "examples": torch.tensor(len(prompts))}


def activation_of(
    decoder: Decoder, sums: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores from the sums of all prompts."""
    heads, neurons = (
        (sums[kind] / sums["examples"]).sqrt().float() for kind in ("heads", "neurons")
    )
    return mark_absent(decoder, heads, neurons)
