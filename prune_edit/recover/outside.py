"""Mean compensation in a whole model: hooks stand for its heads, so its layers may be on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from prune_edit.checkpoint.compensation import Compensation
from prune_edit.decoder import Decoder
from prune_edit.hooks import scale
from prune_edit.layout import Kept
from prune_edit.recover.shrink import mean_compensation
from prune_edit.running import Running
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units


def compensation_in_place(
    decoder: Decoder, heads: Kept, neurons: Kept, prompts: Sequence[Encoded], options: Running
) -> Compensation:
    """What `shrink` puts in the place of the removed units: (D,) per layer and block.

    As there, the heads go first, and the neurons' means are those of the model without them.
    """
    have = decoder.layout
    first = mean_compensation(decoder, heads, have.neurons, prompts, options)
    with _without(decoder, heads, first.attention):
        second = mean_compensation(decoder, have.heads, neurons, prompts, options)
    return Compensation(first.attention, second.ffn)


@contextmanager
def _without(
    decoder: Decoder, heads: Kept, constants: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """Run the model with only these heads, and each layer's constant added to its attention."""
    factors = torch.zeros(decoder.head_shape)
    for layer, kept in enumerate(heads):
        factors[layer, list(kept)] = 1.0

    def add(constant: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output + constant.to(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(scale(decoder, Units(heads=factors)))
        for layer, constant in enumerate(constants):
            module = decoder.attention_output(layer)
            if module is not None and constant is not None:
                stack.callback(module.register_forward_hook(add(constant)).remove)
        yield
