"""OLMo 2 with layers of unequal size; travels inside a ragged checkpoint.

Its queries and keys are normed over all heads together, so a layer that attends projects them all
and goes on with those of its own heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model

from .ragged import GatedForCausalLM, RaggedConfig, RaggedModel, linear, resize


class PrunedOlmo2Config(RaggedConfig, Olmo2Config):
    """`Olmo2Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_olmo2"


class Narrowing(nn.Module):
    """A stock norm over all heads, then only some of them: `norm.weight` stays `weight`."""

    def __init__(self, norm: Any, heads: list[int], head_dim: int) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm = (type(norm), norm.variance_epsilon)
        self.ranges = [(head * head_dim, (head + 1) * head_dim) for head in heads]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., all heads * E) -> (..., heads * E)."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm[1])
        normed = (self.weight * wide).to(states.dtype)
        return torch.cat([normed[..., start:end] for start, end in self.ranges], -1)


def _fit_attention(stock: Any, own: Any, index: int) -> nn.Module:
    base = own.prune_edit["base"]
    slots = own.prune_edit["slots"][index]
    group = base["num_attention_heads"] // base["num_key_value_heads"]
    heads_per_kv = own.num_attention_heads // own.num_key_value_heads
    fitted: Any = type(stock)(own, index)
    size = fitted.head_dim
    for part, count, heads in (
        ("q", base["num_attention_heads"], slots),
        ("k", base["num_key_value_heads"], [slot // group for slot in slots[::heads_per_kv]]),
    ):
        setattr(
            fitted,
            f"{part}_proj",
            linear(getattr(stock, f"{part}_proj"), own.hidden_size, count * size),
        )
        norm = getattr(fitted, f"{part}_norm")
        whole = type(norm)(count * size, norm.variance_epsilon)
        setattr(fitted, f"{part}_norm", Narrowing(whole, heads, size))
    return fitted  # type: ignore[no-any-return]


class PrunedOlmo2Model(RaggedModel, Olmo2Model):
    """`Olmo2Model` with layers of unequal size."""

    config_class = PrunedOlmo2Config

    def __init__(self, config: PrunedOlmo2Config) -> None:
        super().__init__(config)
        resize(
            self.layers,
            config,
            attention=("self_attn", "o_proj"),
            ffn=("mlp", "down_proj"),
            fit_attention=_fit_attention,
            fit_ffn=lambda stock, own: type(stock)(own),
        )
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedOlmo2ForCausalLM(GatedForCausalLM, Olmo2ForCausalLM):
    """`Olmo2ForCausalLM` with layers of unequal size."""

    config_class = PrunedOlmo2Config
    base_class = PrunedOlmo2Model
