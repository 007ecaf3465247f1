"""SmolLM3 with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model

from .ragged import GatedForCausalLM, GatedModel, RaggedConfig


class PrunedSmolLM3Config(RaggedConfig, SmolLM3Config):
    """`SmolLM3Config` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_smollm3"


class PrunedSmolLM3Model(GatedModel, SmolLM3Model):
    """`SmolLM3Model` with layers of unequal size."""

    config_class = PrunedSmolLM3Config


class PrunedSmolLM3ForCausalLM(GatedForCausalLM, SmolLM3ForCausalLM):
    """`SmolLM3ForCausalLM` with layers of unequal size."""

    config_class = PrunedSmolLM3Config
    base_class = PrunedSmolLM3Model
