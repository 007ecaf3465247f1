"""Run a model once and keep what each layer was given, so that any layer can run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder


@dataclass(frozen=True)
class Replay:
    """What a forward pass gave each layer, so that any layer and those after it can run again."""

    decoder: Decoder
    states: list[torch.Tensor]  # per layer, its input (B, T, D)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # the layer's other arguments

    def run(self, layer: int, copies: int) -> torch.Tensor:
        """Final states (B * copies, T, D) from `layer` on, every example `copies` times."""
        batch = self.states[layer].shape[0]

        def repeat(value: Any) -> Any:
            # Masks, positions and biases have the batch in front; vectors number tokens or heads.
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch:
                if batch == 1:
                    return value.expand(copies, *value.shape[1:])
                return value.repeat_interleave(copies, 0)
            if isinstance(value, tuple):
                return tuple(map(repeat, value))
            return value

        states = self.states[layer].repeat_interleave(copies, 0)
        for module, (args, kwargs) in zip(
            self.decoder.layers[layer:], self.calls[layer:], strict=True
        ):
            states = module(states, *map(repeat, args), **{k: repeat(v) for k, v in kwargs.items()})
            states = states[0] if isinstance(states, tuple) else states
        return self.decoder.finish(states)


def record(decoder: Decoder, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Replay]:
    """Run the model once; its final states (B, T, D) and what is needed to replay it."""
    states: list[torch.Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        first = args[0] if args else rest.pop("hidden_states")
        states.append(first)
        calls.append((args[1:], rest))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers]
    try:
        final = decoder.final_states(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return final, Replay(decoder, states, calls)
