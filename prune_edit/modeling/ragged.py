"""Layers of unequal size: what every pruned architecture shares.

This file travels inside a ragged checkpoint, so it imports torch and transformers only. The stock
model is built first, then each layer's attention and FFN are replaced by stock ones of that
layer's size, or, where nothing is left, by the constant that is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

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

    @property
    def _attn_implementation(self) -> Any:
        # A layer's copy of the configuration asks the model's, which set_attn_implementation sets.
        whole = self.__dict__.get("_whole", self)
        return whole.__dict__.get("_attn_implementation_internal")

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PretrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]

    def of_layer(self, index: int) -> Any:
        """A layer's own sizes; what attention runs on stays the model's."""
        own = self.per_layer_config[index]
        own.__dict__["_whole"] = self
        return own

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


class Constant(nn.Module):
    """An output projection of nothing: its bias, (D,), under its stock name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.bias.expand_as(hidden_states)


class Removed(nn.Module):
    """What is left of an attention or FFN without units: its output bias, or nothing.

    The bias keeps its stock name, `{output}.bias`. An attention with a `slot` tells the cache how
    many tokens it has seen, with a number for each.
    """

    slot: int | None = None
    fresh = False  # whether the output must be no view, since something is added to it in place

    def __init__(self, output: str, width: int, bias: bool, pair: bool) -> None:
        super().__init__()
        self.output, self.pair = output, pair
        if bias:
            self.add_module(output, Constant(width))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, T, D) -> (B, T, D), for attention with the weights it has not: (output, None)."""
        # Called, not read: what keeps weights on disk fetches them for a module that is called.
        left = getattr(self, self.output, None)
        output = (
            hidden_states.new_zeros(()).expand_as(hidden_states)
            if left is None
            else left(hidden_states)
        )
        output = output.clone() if self.fresh else output
        if self.slot is not None:
            names = ("cache", "layer_past", "past_key_values")
            cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
            if cache is not None:
                seen = hidden_states[:, None, :, :1]  # (B, 1, T, 1)
                cache.update(seen, seen, self.slot)
        return (output, None) if self.pair else output


class Nothing(nn.Module):
    """An output projection of nothing, without a bias."""

    bias = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return hidden_states.new_zeros(()).expand_as(hidden_states)


def resize(
    layers: nn.ModuleList,
    config: Any,
    *,
    attention: tuple[str, str],
    ffn: tuple[str, str],
    fit_attention: Callable[[Any, Any, int], nn.Module],
    fit_ffn: Callable[[Any, Any], nn.Module],
) -> None:
    """Give every stock layer its own sizes, in place.

    `attention` and `ffn` name the module and its output projection; the `fit_` functions make a
    module of the size that a layer's own configuration asks for.
    """
    for index, layer in enumerate(layers):
        own = config.of_layer(index)
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
                module.config = own
            else:
                module = fit_ffn(stock, own)
            projection = getattr(module, output, None)
            if biased and projection is not None and projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros(config.hidden_size))
            setattr(layer, name, module)
    number_cache([getattr(layer, attention[0]) for layer in layers], config)


def number_cache(attentions: list[Any], config: Any) -> None:
    """Give the layers that attend the first cache entries of their kind, full or sliding.

    The cache asks its entry 0 how long it is, and masks the first entry of a kind, so these must
    be in use. Where no layer of entry 0's kind attends, one without attention fills it.
    """
    kinds = getattr(config, "layer_types", None) or [""] * len(attentions)
    attending = [index for index, module in enumerate(attentions) if not _is_removed(module)]
    for kind in set(kinds):
        free = iter(index for index, each in enumerate(kinds) if each == kind)
        for index in attending:
            if kinds[index] == kind:
                attentions[index].layer_idx = next(free)
    if kinds[0] not in {kinds[index] for index in attending}:
        attentions[0].slot = 0


def _is_removed(module: nn.Module) -> bool:
    return isinstance(module, Removed)


@contextmanager
def base_heads(config: Any) -> Iterator[None]:
    """The base model's head count meanwhile.

    Some stock code takes E from it and refuses counts that do not divide D; the skeleton is built
    so, before `resize`.
    """
    heads = config.num_attention_heads
    config.num_attention_heads = config.prune_edit["base"]["num_attention_heads"]
    try:
        yield
    finally:
        config.num_attention_heads = heads


def linear(stock: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    """A projection of the same kind with other sizes."""
    return type(stock)(inputs, outputs, bias=stock.bias is not None)


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


class GatedModel(RaggedModel):
    """Mixin of a base model whose modules take all their sizes from a configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        resize_gated(self.layers, config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]


class GatedForCausalLM(RaggedModel):
    """Mixin of a causal language model on a `GatedModel`."""

    base_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.base_class(config)
        self.post_init()  # type: ignore[attr-defined]
