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
    the FFN's; `residual` (B, T, D) is x + A, what the FFN's output is added to; `final` (B, T, D)
    the final norm's input. Where a norm stands between the FFN's output and the residual stream,
    `divisors` (B, T, 1) is what it divided by.
    """

    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    coefficients: dict[int, torch.Tensor] = field(default_factory=dict)
    residual: dict[int, torch.Tensor] = field(default_factory=dict)
    divisors: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None

    def effective(self, layer: int) -> torch.Tensor:
        """Coefficients (B, T, n) of `Decoder.residual_values`: the FFN's output norm divided out.

        The norm's scale is that of this pass's real FFN output, so that the neurons' shares sum to
        what the block adds to the stream.
        """
        coefficients = self.coefficients[layer]
        divisor = self.divisors.get(layer)
        return coefficients if divisor is None else coefficients.float() / divisor


@contextmanager
def capture(decoder: Decoder) -> Iterator[Captured]:
    """Keep what passes the units' doors, after any scaling by an enclosing `scale`."""
    seen = Captured()

    def into(store: dict[int, torch.Tensor], layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            store[layer] = args[0].detach()

        return hook

    def entering(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.residual[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    def attended(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            added = output[0] if isinstance(output, tuple) else output
            seen.residual[layer] = seen.residual[layer] + added.detach()

        return hook

    def divided(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.divisors[layer] = decoder.norm_divisor(module, args[0].detach())

        return hook

    def final(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.final = args[0].detach()
        for store in (seen.coefficients, seen.residual):
            for layer, value in store.items():
                if value.dim() == 2:  # OPT hands its FFN all tokens in a row, (B * T, ...)
                    store[layer] = value.unflatten(0, seen.final.shape[:2])

    with ExitStack() as stack:

        def on(module: nn.Module | None, hook: Any, **options: Any) -> None:
            if module is not None:
                handle = module.register_forward_pre_hook(hook, **options)
                stack.callback(handle.remove)

        for layer in range(decoder.n_layers):
            on(decoder.attention_output(layer), into(seen.heads, layer))
            on(decoder.ffn_output(layer), into(seen.coefficients, layer))
            on(decoder.ffn_output_norm(layer), divided(layer))
            if (reads := decoder.ffn_norm(layer)) is not None:
                on(reads, into(seen.residual, layer))
            else:
                on(decoder.layers[layer], entering(layer), with_kwargs=True)
                handle = decoder.attention(layer).register_forward_hook(attended(layer))
                stack.callback(handle.remove)
        on(decoder.final_norm, final)
        yield seen


@contextmanager
def scale(decoder: Decoder, units: Units) -> Iterator[None]:
    """Multiply every head and neuron by its factor at all positions; pads always by zero."""

    def multiply(factors: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            values, by = args[0], factors.to(args[0])
            if by.dim() > values.dim():  # a factor an example, and all tokens in a row (OPT)
                values = (values.unflatten(0, (len(by), -1)) * by).flatten(0, 1)
            else:
                values = values * by
            return (values, *args[1:])

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


@contextmanager
def blend(
    projection: nn.Module, factors: torch.Tensor, constant: torch.Tensor | float
) -> Iterator[None]:
    """Let a projection read `factors * x + (1 - factors) * constant` instead of its input x.

    `factors` (channels,) or (B, 1, channels), `constant` (channels,): with factors of 0, a unit is
    replaced by a constant such as its mean.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gates = factors.to(args[0].device)
        shift = (1 - gates) * constant
        return (args[0] * gates.to(args[0]) + shift.to(args[0]), *args[1:])

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
