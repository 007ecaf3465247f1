"""Qwen2 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedQwen2Config(RaggedConfig, Qwen2Config):
    """`Qwen2Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_qwen2"


class PrunedQwen2Model(GatedModel, Qwen2Model):
    """`Qwen2Model` with layers of unequal size."""

    config_class = PrunedQwen2Config


class PrunedQwen2ForCausalLM(GatedForCausalLM, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with layers of unequal size."""

    config_class = PrunedQwen2Config
    base_class = PrunedQwen2Model
