"""GPT-2 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from .ragged import RaggedConfig, RaggedModel, base_heads, resize


class PrunedGPT2Config(RaggedConfig, GPT2Config):
    """`GPT2Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_gpt2"
    attribute_map = {**GPT2Config.attribute_map, "intermediate_size": "n_inner"}  # noqa: RUF012


def _fit_attention(attention: Any, own: Any, index: int) -> nn.Module:
    inner = own.num_attention_heads * attention.head_dim
    attention.num_heads = own.num_attention_heads
    attention.split_size = inner
    attention.c_attn = Conv1D(3 * inner, attention.embed_dim)
    attention.c_proj = Conv1D(attention.embed_dim, inner)
    return attention  # type: ignore[no-any-return]


def _fit_ffn(ffn: Any, own: Any) -> nn.Module:
    inner = own.n_inner if own.n_inner is not None else 4 * own.n_embd
    return type(ffn)(inner, own)  # type: ignore[no-any-return]


class PrunedGPT2Model(RaggedModel, GPT2Model):
    """`GPT2Model` with layers of unequal size."""

    config_class = PrunedGPT2Config

    def __init__(self, config: PrunedGPT2Config) -> None:
        with base_heads(config):
            super().__init__(config)
        resize(
            self.h,
            config,
            attention=("attn", "c_proj"),
            ffn=("mlp", "c_proj"),
            fit_attention=_fit_attention,
            fit_ffn=_fit_ffn,
        )
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedGPT2LMHeadModel(RaggedModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with layers of unequal size."""

    config_class = PrunedGPT2Config

    def __init__(self, config: PrunedGPT2Config) -> None:
        with base_heads(config):
            super().__init__(config)
        self.transformer = PrunedGPT2Model(config)
        self.post_init()  # type: ignore[no-untyped-call]
