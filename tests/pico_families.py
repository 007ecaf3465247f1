"""Pico models of every family that can be scored, with what sets the family apart switched on.

Two layers, D = 32, four heads (grouped where the family can), seeds fixed, no downloads.
Every parameter is moved away from its initial value, so that norms and biases matter.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

V, D, N = 40, 32, 12
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_PLAIN: dict[str, Any] = {
    **_IDS,
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED: dict[str, Any] = {**_PLAIN, "intermediate_size": N, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {
    **_GATED,
    "head_dim": 16,  # not D / H
    "query_pre_attn_scalar": 16,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GPT: dict[str, Any] = {
    **_IDS,
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": N,
}
_FALCON: dict[str, Any] = {**_PLAIN, "ffn_hidden_size": N}
_OPT: dict[str, Any] = {**_PLAIN, "ffn_dim": N}

# Name -> stock class stem, configuration. Before the first hyphen stands the model_type.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_GATED, "sliding_window": 3}),
    "gpt2": ("GPT2", _GPT),
    "qwen2": (
        "Qwen2",
        {**_GATED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_GATED, "head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 4.0}),
    "gemma2-uncapped": ("Gemma2", {**_GEMMA, "final_logit_softcapping": None}),
    "gemma3_text": ("Gemma3", _GEMMA),
    "phi3": ("Phi3", {**_GATED, "sliding_window": 4}),
    "olmo2": ("Olmo2", _GATED),
    "smollm3": (
        "SmolLM3",
        {**_GATED, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 3},
    ),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", {**_PLAIN, "intermediate_size": N}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {**_PLAIN, "intermediate_size": N, "use_parallel_residual": False},
    ),
    "opt": ("OPT", _OPT),
    "opt-projected": ("OPT", {**_OPT, "word_embed_proj_dim": 20}),
    "opt-bare": ("OPT", {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "falcon": ("Falcon", _FALCON),  # one KV head, FFN beside attention
    "falcon-sequential": (
        "Falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon-alibi": ("Falcon", {**_FALCON, "alibi": True, "bias": True}),
    "falcon-new": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-one-norm": (
        "Falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon-eager": (
        "Falcon",
        {**_FALCON, "alibi": True, "multi_query": False, "attn_implementation": "eager"},
    ),
}
NAMES = tuple(CONFIGS)


def family_model(name: str, layers: int = 2) -> PreTrainedModel:
    """A stock model whose every parameter matters, in evaluation mode."""
    stem, fields = CONFIGS[name]
    if layers != 2:
        fields = {**fields, "n_layer" if "n_layer" in fields else "num_hidden_layers": layers}
        for key, value in fields.items():  # a value a layer
            if isinstance(value, list):
                fields[key] = [value[layer % len(value)] for layer in range(layers)]
    kind = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    config = "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config"
    torch.manual_seed(NAMES.index(name))
    model: PreTrainedModel = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()
