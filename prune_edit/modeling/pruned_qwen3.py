"""Qwen3 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedQwen3Config(RaggedConfig, Qwen3Config):
    """`Qwen3Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_qwen3"


class PrunedQwen3Model(GatedModel, Qwen3Model):
    """`Qwen3Model` with layers of unequal size."""

    config_class = PrunedQwen3Config


class PrunedQwen3ForCausalLM(GatedForCausalLM, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with layers of unequal size."""

    config_class = PrunedQwen3Config
    base_class = PrunedQwen3Model
