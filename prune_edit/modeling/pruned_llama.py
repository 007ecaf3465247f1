"""Llama with layers of unequal size; travels inside a ragged checkpoint."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .ragged import RaggedConfig, RaggedModel, resize_gated


class PrunedLlamaConfig(RaggedConfig, LlamaConfig):
    """`LlamaConfig` whose `per_layer_config` holds each layer's sizes."""

    model_type = "pruned_llama"


class PrunedLlamaModel(RaggedModel, LlamaModel):
    """`LlamaModel` with layers of unequal size."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        resize_gated(self.layers, config)
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedLlamaForCausalLM(RaggedModel, LlamaForCausalLM):
    """`LlamaForCausalLM` with layers of unequal size."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        self.model = PrunedLlamaModel(config)
        self.post_init()  # type: ignore[no-untyped-call]
