"""Llama with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedLlamaConfig(RaggedConfig, LlamaConfig):
    """`LlamaConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_llama"


class PrunedLlamaModel(GatedModel, LlamaModel):
    """`LlamaModel` with layers of unequal size."""

    config_class = PrunedLlamaConfig


class PrunedLlamaForCausalLM(GatedForCausalLM, LlamaForCausalLM):
    """`LlamaForCausalLM` with layers of unequal size."""

    config_class = PrunedLlamaConfig
    base_class = PrunedLlamaModel
