"""Mistral with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .ragged import RaggedConfig, RaggedModel, resize_gated


class PrunedMistralConfig(RaggedConfig, MistralConfig):
    """`MistralConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_mistral"


class PrunedMistralModel(RaggedModel, MistralModel):
    """`MistralModel` with layers of unequal size."""

    config_class = PrunedMistralConfig

    def __init__(self, config: PrunedMistralConfig) -> None:
        super().__init__(config)
        resize_gated(self.layers, config)
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedMistralForCausalLM(RaggedModel, MistralForCausalLM):
    """`MistralForCausalLM` with layers of unequal size."""

    config_class = PrunedMistralConfig

    def __init__(self, config: PrunedMistralConfig) -> None:
        super().__init__(config)
        self.model = PrunedMistralModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
