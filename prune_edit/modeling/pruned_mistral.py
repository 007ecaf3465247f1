"""Mistral with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedMistralConfig(RaggedConfig, MistralConfig):
    """`MistralConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_mistral"


class PrunedMistralModel(GatedModel, MistralModel):
    """`MistralModel` with layers of unequal size."""

    config_class = PrunedMistralConfig


class PrunedMistralForCausalLM(GatedForCausalLM, MistralForCausalLM):
    """`MistralForCausalLM` with layers of unequal size."""

    config_class = PrunedMistralConfig
    base_class = PrunedMistralModel
