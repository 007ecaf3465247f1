"""Layers of unequal size: what every pruned architecture shares.

This file travels inside a ragged checkpoint, so it imports torch and transformers only. The stock
model is built first, then each layer's attention and FFN are replaced by stock ones of that
layer's size, or, where nothing is left, by the constant that is left of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

if not hasattr(PretrainedConfig, "per_layer_config"):
    raise ImportError(
        "ragged checkpoints need transformers 5.14 or newer: pip install -U transformers"
    )

PER_LAYER = frozenset({"num_attention_heads", "num_key_value_heads", "intermediate_size"})


class RaggedConfig:
    """Mixin of a pruned configuration: sizes differ by layer, the global ones are maxima."""

    def __getattribute__(self, key: str) -> Any:
        # Stock code reads the global sizes while the skeleton is built; they are maxima and valid
        # here, so transformers' warning about reading them would only be noise.
        if key in PER_LAYER:
            names = object.__getattribute__(self, "attribute_map")
            return object.__getattribute__(self, names.get(key, key))
        return super().__getattribute__(key)

    def validate(self) -> None:
        """Run the configuration's rules by name, so that those overridden here count.

        Stock code collects the functions themselves when the stock class is made.
        """
        for rule in getattr(type(self), "__class_validators__", ()):
            getattr(self, rule.__name__)()

    def validate_architecture(self) -> None:
        """Stock rules tie the head count to the hidden size; here `head_dim` is explicit."""


class RaggedModel:
    """Mixin of a pruned model: loading is strict, and caches are sized as keys arrive."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As stock, but raises OSError when the checkpoint lacks tensors.

        Stock code fills them with random numbers and only logs it.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise OSError(
                f"the checkpoint lacks {', '.join(missing[:3])}{more}; it is damaged or "
                "was edited after pruning: write it again"
            )
        return (model, info) if output_loading_info else model

    def _get_static_cache_init_shape(self) -> None:
        # Cache layers are numbered over the layers that have attention, so their sizes cannot be
        # told from the layer's place in the configuration: let them be made when keys arrive.
        return None


class Removed(nn.Module):
    """What is left of an attention or FFN without units: its output bias, or nothing.

    The bias keeps its stock name, `{output}.bias`, (D,).
    """

    def __init__(self, output: str, width: int, bias: bool, pair: bool) -> None:
        super().__init__()
        self.output, self.pair = output, pair
        if bias:
            holder = nn.Module()
            holder.bias = nn.Parameter(torch.zeros(width))
            self.add_module(output, holder)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, T, D) -> (B, T, D), for attention with the weights it has not: (output, None)."""
        holder = getattr(self, self.output, None)
        constant = hidden_states.new_zeros(()) if holder is None else holder.bias
        output = constant.expand_as(hidden_states)
        return (output, None) if self.pair else output


def resize(
    layers: nn.ModuleList,
    config: Any,
    *,
    attention: tuple[str, str],
    ffn: tuple[str, str],
    fit_attention: Callable[[nn.Module, Any, int], nn.Module],
    fit_ffn: Callable[[nn.Module, Any], nn.Module],
) -> None:
    """Give every stock layer its own sizes, in place.

    `attention` and `ffn` name the module and its output projection; the `fit_` functions make a
    module of the size that a layer's own configuration asks for.
    """
    attending = 0
    for index, layer in enumerate(layers):
        own = config.per_layer_config[index]
        skip = getattr(own, "skip", None) or ()
        for part, (name, output) in (("attention", attention), ("ffn", ffn)):
            stock = getattr(layer, name)
            biased = getattr(stock, output).bias is not None
            biased = biased or bool(getattr(config, f"{part}_output_bias", False))
            module: Any
            if part in skip:
                module = Removed(output, config.hidden_size, biased, pair=part == "attention")
            elif part == "attention":
                module = fit_attention(stock, own, index)
                # set_attn_implementation writes to the model's configuration, not to a copy of it.
                module.config = config
                # The cache asks its layer 0 how long it is, so layer 0 must be one that attends.
                module.layer_idx = attending
                attending += 1
            else:
                module = fit_ffn(stock, own)
            projection = getattr(module, output, None)
            if biased and projection is not None and projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros(config.hidden_size))
            setattr(layer, name, module)


def resize_gated(layers: nn.ModuleList, config: Any) -> None:
    """`resize` for the families whose modules take all their sizes from a configuration."""
    resize(
        layers,
        config,
        attention=("self_attn", "o_proj"),
        ffn=("mlp", "down_proj"),
        fit_attention=lambda stock, own, index: type(stock)(own, index),
        fit_ffn=lambda stock, own: type(stock)(own),
    )
