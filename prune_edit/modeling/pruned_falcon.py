"""Falcon with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, FalconModel
from transformers.models.falcon.modeling_falcon import FalconAttention

from .ragged import RaggedConfig, RaggedModel, Removed, base_heads, linear, resize


class PrunedFalconConfig(RaggedConfig, FalconConfig):
    """`FalconConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_falcon"
    attribute_map = {  # noqa: RUF012
        **FalconConfig.attribute_map,
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_size",
    }

    @property
    def head_dim(self) -> int:
        """E, by the base model's head count."""
        return int(self.hidden_size // self.prune_edit["base"]["num_attention_heads"])


class PrunedFalconAttention(FalconAttention):
    """`FalconAttention` of some of the base model's heads, each with its own ALiBi slope."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *, alibi: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        """As stock; `alibi` (B * H, 1, T) and a mask of H heads are the base model's."""
        if alibi is not None:
            alibi = alibi.view(hidden_states.shape[0], -1, 1, alibi.shape[-1])[:, self.slots]
            if attention_mask is not None:
                attention_mask = attention_mask[:, self.slots]
        return super().forward(hidden_states, alibi=alibi, attention_mask=attention_mask, **kwargs)


def _fit_attention(attention: Any, own: Any, index: int) -> nn.Module:
    heads, size = own.num_attention_heads, attention.head_dim
    kv_heads = own.num_key_value_heads
    if type(attention) is FalconAttention:  # flash attention knows no ALiBi
        attention.__class__ = PrunedFalconAttention
        attention.slots = own.prune_edit["slots"][index]
    attention.num_heads, attention.num_kv_heads = heads, kv_heads
    rows = (heads + 2 * kv_heads) * size
    attention.query_key_value = linear(attention.query_key_value, own.hidden_size, rows)
    attention.dense = linear(attention.dense, heads * size, own.hidden_size)
    return attention  # type: ignore[no-any-return]


class PrunedFalconModel(RaggedModel, FalconModel):
    """`FalconModel` with layers of unequal size."""

    config_class = PrunedFalconConfig

    def __init__(self, config: PrunedFalconConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        resize(
            self.h,
            config,
            attention=("self_attention", "dense"),
            ffn=("mlp", "dense_4h_to_h"),
            fit_attention=_fit_attention,
            fit_ffn=lambda stock, own: type(stock)(own),
        )
        for layer in self.h:
            if isinstance(layer.mlp, Removed):
                layer.mlp.fresh = True  # a layer adds attention's output to it in place
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedFalconForCausalLM(RaggedModel, FalconForCausalLM):
    """`FalconForCausalLM` with layers of unequal size."""

    config_class = PrunedFalconConfig

    def __init__(self, config: PrunedFalconConfig) -> None:
        with base_heads(config):
            super().__init__(config)
        self.transformer = PrunedFalconModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
