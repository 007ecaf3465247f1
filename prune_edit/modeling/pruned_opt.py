"""OPT with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel

from .ragged import (
    Constant,
    Nothing,
    RaggedConfig,
    RaggedModel,
    Removed,
    base_heads,
    linear,
    number_cache,
)


class PrunedOPTConfig(RaggedConfig, OPTConfig):
    """`OPTConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_opt"
    attribute_map = {**OPTConfig.attribute_map, "intermediate_size": "ffn_dim"}  # noqa: RUF012


def _resize(layers: nn.ModuleList, config: Any) -> None:
    """As `ragged.resize`; OPT's FFN is no module of its own."""
    width = config.hidden_size
    for index, module in enumerate(layers):
        layer: Any = module
        own = config.of_layer(index)
        skip = getattr(own, "skip", None) or ()
        attention: Any = layer.self_attn
        if "attention" in skip:
            biased = attention.out_proj.bias is not None or config.attention_output_bias
            layer.self_attn = Removed("out_proj", width, biased, pair=True)
        else:
            inner = own.num_attention_heads * attention.head_dim
            attention.num_heads, attention.config = own.num_attention_heads, own
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, linear(getattr(attention, name), width, inner))
            attention.out_proj = _output(attention.out_proj, inner, config.attention_output_bias)
        if "ffn" in skip:
            biased = getattr(layer.fc2, "bias", None) is not None or config.ffn_output_bias
            layer.fc1 = nn.Identity()
            layer.fc2 = Constant(width) if biased else Nothing()
        else:
            layer.fc1 = linear(layer.fc1, width, own.intermediate_size)
            layer.fc2 = _output(layer.fc2, own.intermediate_size, config.ffn_output_bias)
    modules: list[Any] = list(layers)
    number_cache([layer.self_attn for layer in modules], config)


def _output(stock: Any, inputs: int, biased: bool) -> nn.Linear:
    return nn.Linear(inputs, stock.out_features, bias=biased or stock.bias is not None)


class PrunedOPTModel(RaggedModel, OPTModel):
    """`OPTModel` with layers of unequal size."""

    config_class = PrunedOPTConfig

    def __init__(self, config: PrunedOPTConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        _resize(self.decoder.layers, config)
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedOPTForCausalLM(RaggedModel, OPTForCausalLM):
    """`OPTForCausalLM` with layers of unequal size."""

    config_class = PrunedOPTConfig

    def __init__(self, config: PrunedOPTConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        self.model = PrunedOPTModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
