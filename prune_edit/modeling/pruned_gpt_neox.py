"""GPT-NeoX with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from .ragged import RaggedConfig, RaggedModel, base_heads, linear, resize


class PrunedGPTNeoXConfig(RaggedConfig, GPTNeoXConfig):
    """`GPTNeoXConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_gpt_neox"


def _fit_attention(attention: Any, own: Any, index: int) -> nn.Module:
    inner = own.num_attention_heads * attention.head_size
    attention.query_key_value = linear(attention.query_key_value, own.hidden_size, 3 * inner)
    attention.dense = linear(attention.dense, inner, own.hidden_size)
    return attention  # type: ignore[no-any-return]


class PrunedGPTNeoXModel(RaggedModel, GPTNeoXModel):
    """`GPTNeoXModel` with layers of unequal size."""

    config_class = PrunedGPTNeoXConfig

    def __init__(self, config: PrunedGPTNeoXConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        resize(
            self.layers,
            config,
            attention=("attention", "dense"),
            ffn=("mlp", "dense_4h_to_h"),
            fit_attention=_fit_attention,
            fit_ffn=lambda stock, own: type(stock)(own),
        )
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedGPTNeoXForCausalLM(RaggedModel, GPTNeoXForCausalLM):
    """`GPTNeoXForCausalLM` with layers of unequal size."""

    config_class = PrunedGPTNeoXConfig

    def __init__(self, config: PrunedGPTNeoXConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        self.gpt_neox = PrunedGPTNeoXModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
