"""Gemma 2 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedGemma2Config(RaggedConfig, Gemma2Config):
    """`Gemma2Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_gemma2"


class PrunedGemma2Model(GatedModel, Gemma2Model):
    """`Gemma2Model` with layers of unequal size."""

    config_class = PrunedGemma2Config


class PrunedGemma2ForCausalLM(GatedForCausalLM, Gemma2ForCausalLM):
    """`Gemma2ForCausalLM` with layers of unequal size."""

    config_class = PrunedGemma2Config
    base_class = PrunedGemma2Model
