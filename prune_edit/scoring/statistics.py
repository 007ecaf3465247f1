"""Statistics of what the units' output projections read, over all real tokens of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from prune_edit.decoder import Decoder
from prune_edit.layerwise import each_layer
from prune_edit.running import Running
from prune_edit.streamed import resident
from prune_edit.tasks.prompts import Encoded


@dataclass
class Sums:
    """Per layer, sums over tokens of a projection's input channels and of their squares, float64.

    Heads have (slots * E,) channels, neurons (n,); a layer without any has no entry.
    """

    first: dict[int, torch.Tensor] = field(default_factory=dict)
    second: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, values: torch.Tensor) -> None:
        """Take in tokens (P, channels)."""
        # Sums in float64 do not depend on the order, to far below what scores are compared at.
        values = values.double()
        for store, added in ((self.first, values.sum(0)), (self.second, values.pow(2).sum(0))):
            added = added.cpu()
            store[layer] = store[layer] + added if layer in store else added


@dataclass
class Moments:
    """The inputs of the attention (`heads`) and FFN (`neurons`) output projections."""

    tokens: int = 0
    heads: Sums = field(default_factory=Sums)
    neurons: Sums = field(default_factory=Sums)

    def mean(self, part: str, layer: int) -> torch.Tensor:
        """Mean of every channel over the tokens, float64."""
        sums: Sums = getattr(self, part)
        return sums.first[layer] / self.tokens

    def variance(self, part: str, layer: int) -> torch.Tensor:
        """Unbiased variance of every channel over the tokens, float64."""
        sums: Sums = getattr(self, part)
        centred = sums.second[layer] - sums.first[layer].pow(2) / self.tokens
        return centred.clamp(min=0) / max(1, self.tokens - 1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All numbers by name, each a sum over tokens."""
        found = {"tokens": torch.tensor(self.tokens)}
        for part in ("heads", "neurons"):
            for power in ("first", "second"):
                sums = getattr(getattr(self, part), power)
                found |= {f"{part} {power} {layer}": each for layer, each in sums.items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Moments:
        """The inverse of `tensors`."""
        found = cls(int(tensors["tokens"]))
        for name, each in tensors.items():
            if name != "tokens":
                part, power, layer = name.split()
                getattr(getattr(found, part), power)[int(layer)] = each
        return found


@torch.no_grad()
def moments(
    decoder: Decoder, prompts: Sequence[Encoded], running: Running, what: str = "activations"
) -> Moments:
    """Run the prompts once; padding is left out."""
    found = Moments()
    for layer, batch, seen in each_layer(decoder, prompts, running, what):
        real = batch.attention_mask.bool()
        if layer == 0:
            found.tokens += int(real.sum())
        for store, sums in ((seen.heads, found.heads), (seen.coefficients, found.neurons)):
            if layer in store:
                sums.add(layer, store[layer][real])
    return found


Score = Callable[[str, int, torch.Tensor], torch.Tensor]
"""`("heads" or "neurons", layer, output weights (channels, D) in float64) -> (channels,)`."""


def unit_scores(decoder: Decoder, score: Score) -> tuple[torch.Tensor, torch.Tensor]:
    """A score of every channel, summed to its unit: (L, H) and (L, N), float32, 0 where absent."""
    heads = torch.zeros(decoder.head_shape)
    neurons = torch.zeros(decoder.neuron_shape)
    for layer in range(decoder.n_layers):
        attention, ffn = decoder.attention_output(layer), decoder.ffn_output(layer)
        with resident(decoder, layer):
            if attention is not None:
                found = score("heads", layer, decoder.output_weight(attention).detach().double())
                scatter_heads(decoder, layer, head_sums(decoder, found), heads[layer])
            if ffn is not None:
                found = score("neurons", layer, decoder.output_weight(ffn).detach().double())
                neurons[layer, decoder.neuron_slots[layer]] = found.to(neurons)
    return heads, neurons


def head_sums(decoder: Decoder, channels: torch.Tensor) -> torch.Tensor:
    """Sums over each physical head's channels: (..., slots * E) to (..., slots)."""
    slots: torch.Tensor = channels.unflatten(-1, (-1, decoder.head_dim))
    return slots.sum(-1)


def scatter_heads(decoder: Decoder, layer: int, slots: torch.Tensor, into: torch.Tensor) -> None:
    """Write numbers (..., slots) of a layer's physical heads to their places in `into` (..., H)."""
    numbers = decoder.head_slots[layer]
    there = numbers >= 0
    into[..., numbers[there]] = slots.to(into)[..., there]
