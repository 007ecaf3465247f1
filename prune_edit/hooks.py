"""Context managers that watch and scale units; no hook survives them, also not after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.units import Units


@dataclass
class Captured:
    """What the last forward pass inside `capture` showed, per layer; absent blocks have no entry.

    `heads` (B, T, slots * E) is the attention output projection's input, `coefficients` (B, T, n)
    the FFN's; `residual` (B, T, D) is x + A, the FFN norm's input; `final` (B, T, D) the final
    norm's input.
    """

    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    coefficients: dict[int, torch.Tensor] = field(default_factory=dict)
    residual: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None


@contextmanager
def capture(decoder: Decoder) -> Iterator[Captured]:
    """Keep what passes the units' doors, after any scaling by an enclosing `scale`."""
    seen = Captured()

    def into(store: dict[int, torch.Tensor], layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            store[layer] = args[0].detach()

        return hook

    def final(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.final = args[0].detach()

    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            doors = (
                (decoder.attention_output(layer), seen.heads),
                (decoder.ffn_output(layer), seen.coefficients),
                (decoder.ffn_norm(layer), seen.residual),
            )
            for module, store in doors:
                if module is not None:
                    handle = module.register_forward_pre_hook(into(store, layer))
                    stack.callback(handle.remove)
        stack.callback(decoder.final_norm.register_forward_pre_hook(final).remove)
        yield seen


@contextmanager
def scale(decoder: Decoder, units: Units) -> Iterator[None]:
    """Multiply every head and neuron by its factor at all positions; pads always by zero."""

    def multiply(factors: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * factors.to(args[0]), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            for module, factors in (
                (decoder.attention_output(layer), head_factors(decoder, units, layer)),
                (decoder.ffn_output(layer), neuron_factors(decoder, units, layer)),
            ):
                if module is not None and factors is not None:
                    handle = module.register_forward_pre_hook(multiply(factors))
                    stack.callback(handle.remove)
        yield


def head_factors(decoder: Decoder, units: Units, layer: int) -> torch.Tensor | None:
    """A layer's factors as its output projection meets them: (slots * E,) or (B, 1, ...)."""
    if units.heads is None:
        return None
    slots = decoder.head_slots[layer]
    factors = units.heads[..., layer, :][..., slots.clamp(min=0)]
    factors = torch.where(slots >= 0, factors, 0.0).repeat_interleave(decoder.head_dim, -1)
    return factors.unsqueeze(-2) if factors.dim() > 1 else factors


def neuron_factors(decoder: Decoder, units: Units, layer: int) -> torch.Tensor | None:
    """A layer's factors as the coefficients meet them: (n,) or (B, 1, n)."""
    if units.neurons is None:
        return None
    factors = units.neurons[..., layer, :][..., decoder.neuron_slots[layer]]
    return factors.unsqueeze(-2) if factors.dim() > 1 else factors
