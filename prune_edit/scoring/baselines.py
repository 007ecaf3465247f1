"""The baselines that need no prompts: weight magnitude, and chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from prune_edit.arrange import owners, place
from prune_edit.decoder import Decoder
from prune_edit.scoring.options import Options
from prune_edit.streamed import resident
from prune_edit.tasks.prompts import Encoded


@torch.no_grad()
def score_magnitude(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norm of a unit's own weights: (L, H) and (L, N).

    A head's are its rows of the query, key and value projections (those of its group, with grouped
    queries) and its columns of the output projection; a neuron's its rows of the input projections
    and its column of the output projection. Biases, and norms of queries and keys, are left out.
    """
    layout = decoder.layout
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    for name, tensor in _layer_tensors(decoder):
        where = place(decoder.family, name)
        if where is None or where.kind == "bias":
            continue
        axis = int(where.role.is_input != decoder.family.transposed)
        units = owners(layout, decoder.family, where)
        target = neurons if where.role.part == "ffn" else heads
        squares = tensor.double().cpu().movedim(axis, 0).reshape(len(units), -1).pow(2).sum(1)
        for (kind, unit), square in zip(units, squares, strict=True):
            if unit is None:
                continue
            if kind == "kv_heads":
                group = layout.n_heads // layout.n_kv_heads
                target[where.layer, unit * group : (unit + 1) * group] += square
            else:
                target[where.layer, unit] += square
    return mark_absent(decoder, heads.sqrt().float(), neurons.sqrt().float())


def _layer_tensors(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Every layer's tensors under their full names."""
    for number, layer in enumerate(decoder.layers):
        with resident(decoder, number):
            for name, tensor in layer.state_dict().items():
                yield f"{decoder.family.layers}.{number}.{name}", tensor


def score_random(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers from the seed, the same for a unit whatever else the model still has."""
    generator = torch.Generator().manual_seed(options.seed)
    heads = torch.rand(decoder.head_shape, generator=generator)
    neurons = torch.rand(decoder.neuron_shape, generator=generator)
    return mark_absent(decoder, heads, neurons)


def mark_absent(
    decoder: Decoder, heads: torch.Tensor, neurons: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN for the units a pruned model no longer has."""
    for scores, kept in ((heads, decoder.layout.heads), (neurons, decoder.layout.neurons)):
        for layer, units in enumerate(kept):
            absent = torch.ones(scores.shape[1], dtype=torch.bool)
            absent[list(units)] = False
            scores[layer, absent] = float("nan")
    return heads, neurons
