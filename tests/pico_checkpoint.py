"""Pico models, hard plans and a slow oracle for the tests of `checkpoint/` and `modeling/`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from prune_edit.checkpoint.compensation import Compensation
from prune_edit.checkpoint.slim import slim_config, slim_tensors
from prune_edit.checkpoint.write import build_model
from prune_edit.families import Family, family_of
from prune_edit.layout import Layout

V, D, N = 40, 32, 12
_LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": N,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Layer 0 without attention, a layer without FFN, one whole, pads where groups are unequal.
_KEPT: dict[str, tuple[Any, Any]] = {
    "llama": (
        ((), (1, 3), (0, 1, 2, 3), (2,)),
        ((0, 5, 11), (), tuple(range(N)), (7,)),
    ),
    "llama-gqa": (((), (0, 1, 2, 5), (7,)), ((1, 2), (3,), ())),  # layer 1 needs a pad
    "llama-biased": (((0,), ()), ((), (4, 5))),
    "mistral": (((), (0, 2, 3)), ((0, 1, 2), ())),
    "gpt2": (((), (0, 2, 3), (1,)), ((0, 40, 127), (), (5, 6))),
}
NAMES = tuple(_KEPT)


def dense(name: str) -> PreTrainedModel:
    """A stock model whose every parameter matters."""
    torch.manual_seed(NAMES.index(name))
    layers = len(_KEPT[name][0])
    model: PreTrainedModel
    if name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V,
                n_embd=D,
                n_layer=layers,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
                scale_attn_by_inverse_layer_idx=True,
            )
        )
    elif name == "mistral":
        model = MistralForCausalLM(
            MistralConfig(
                **_LLAMA, num_hidden_layers=layers, num_key_value_heads=2, sliding_window=4
            )
        )
    else:
        own = dict(_LLAMA)
        if name == "llama-gqa":
            own |= {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}
        if name == "llama-biased":
            own |= {"attention_bias": True, "mlp_bias": True}
        model = LlamaForCausalLM(LlamaConfig(**own, num_hidden_layers=layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def family(name: str) -> Family:
    return family_of(name.partition("-")[0])


def hard_layout(name: str, model: PreTrainedModel) -> Layout:
    return Layout.of_config(model.config).keep(*_KEPT[name])


def constants(layout: Layout) -> Compensation:
    """Something to add everywhere but to the last layer's FFN."""
    torch.manual_seed(0)
    n = layout.n_layers
    ffn = [torch.randn(D) for _ in range(n - 1)]
    return Compensation(tuple(torch.randn(D) for _ in range(n)), (*ffn, None))


def ragged(
    name: str, model: PreTrainedModel, layout: Layout, compensation: Compensation | None = None
) -> PreTrainedModel:
    """What the code under test makes of a model in memory."""
    have = Layout.of_config(model.config)
    config = slim_config(
        model.config.to_dict(),
        family(name),
        have,
        layout,
        output_bias=compensation is not None,
        provenance={"tool_version": "0"},
    )
    tensors = dict(slim_tensors(family(name), model.state_dict(), have, layout, compensation))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return build_model(config, tensors)


def oracle(name: str, layout: Layout, compensation: Compensation | None = None) -> PreTrainedModel:
    """The dense model with the removed units' outputs zeroed, spelled out per architecture."""
    model: Any = dense(name)
    heads = layout.n_heads
    head_dim = D // heads
    for index in range(layout.n_layers):
        if name == "gpt2":
            block = model.transformer.h[index]
            attention, ffn = block.attn.c_proj, block.mlp.c_proj
            heads_in, neurons_in = attention.weight, ffn.weight  # (in, D)
        else:
            block = model.model.layers[index]
            attention, ffn = block.self_attn.o_proj, block.mlp.down_proj
            heads_in, neurons_in = attention.weight.T, ffn.weight.T  # (in, D)
        with torch.no_grad():
            for head in set(range(heads)) - set(layout.heads[index]):
                heads_in[head * head_dim : (head + 1) * head_dim] = 0
            for neuron in set(range(layout.n_neurons)) - set(layout.neurons[index]):
                neurons_in[neuron] = 0
            if compensation is not None:
                for module, constant in (
                    (attention, compensation.attention[index]),
                    (ffn, compensation.ffn[index]),
                ):
                    if constant is not None:
                        bias = torch.zeros(D) if module.bias is None else module.bias
                        module.bias = torch.nn.Parameter(bias + constant)
    return model


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal to float rounding, relative to the scale."""
    return bool((got - want).abs().max() <= 2e-5 * want.abs().max())
