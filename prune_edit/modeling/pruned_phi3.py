"""Phi-3 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedPhi3Config(RaggedConfig, Phi3Config):
    """`Phi3Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_phi3"


class PrunedPhi3Model(GatedModel, Phi3Model):
    """`Phi3Model` with layers of unequal size."""

    config_class = PrunedPhi3Config


class PrunedPhi3ForCausalLM(GatedForCausalLM, Phi3ForCausalLM):
    """`Phi3ForCausalLM` with layers of unequal size."""

    config_class = PrunedPhi3Config
    base_class = PrunedPhi3Model
