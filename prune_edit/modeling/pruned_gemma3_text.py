"""Gemma 3 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedGemma3Config(RaggedConfig, Gemma3TextConfig):
    """`Gemma3TextConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_gemma3_text"


class PrunedGemma3Model(GatedModel, Gemma3TextModel):
    """`Gemma3TextModel` with layers of unequal size."""

    config_class = PrunedGemma3Config


class PrunedGemma3ForCausalLM(GatedForCausalLM, Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` with layers of unequal size."""

    config_class = PrunedGemma3Config
    base_class = PrunedGemma3Model
