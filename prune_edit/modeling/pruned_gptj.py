"""GPT-J with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM, GPTJModel

from .ragged import RaggedConfig, RaggedModel, base_heads, linear, resize


class PrunedGPTJConfig(RaggedConfig, GPTJConfig):
    """`GPTJConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_gptj"
    attribute_map = {**GPTJConfig.attribute_map, "intermediate_size": "n_inner"}  # noqa: RUF012


def _fit_attention(attention: Any, own: Any, index: int) -> nn.Module:
    inner = own.num_attention_heads * attention.head_dim
    attention.num_attention_heads = own.num_attention_heads
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, linear(getattr(attention, name), attention.embed_dim, inner))
    attention.out_proj = linear(attention.out_proj, inner, attention.embed_dim)
    return attention  # type: ignore[no-any-return]


class PrunedGPTJModel(RaggedModel, GPTJModel):
    """`GPTJModel` with layers of unequal size."""

    config_class = PrunedGPTJConfig

    def __init__(self, config: PrunedGPTJConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        resize(
            self.h,
            config,
            attention=("attn", "out_proj"),
            ffn=("mlp", "fc_out"),
            fit_attention=_fit_attention,
            fit_ffn=lambda stock, own: type(stock)(own.intermediate_size, own),
        )
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedGPTJForCausalLM(RaggedModel, GPTJForCausalLM):
    """`GPTJForCausalLM` with layers of unequal size."""

    config_class = PrunedGPTJConfig

    def __init__(self, config: PrunedGPTJConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        self.transformer = PrunedGPTJModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
