"""Where each stock architecture keeps its parts and what it computes there, for the oracle.

Written from the architectures' own code and apart from the package's table, so that a wrong row
there does not agree with a wrong row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Norm = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""`(x, at, module)`: x through the norm, its statistics taken at another vector `at`."""


def rms(x: torch.Tensor, at: torch.Tensor, module: Any) -> torch.Tensor:
    """arXiv 1910.07467, eq. 4."""
    scale = (at.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return x / scale * module.weight


def rms_plus_one(x: torch.Tensor, at: torch.Tensor, module: Any) -> torch.Tensor:
    """Gemma's, whose weight is stored less one."""
    return x / (at.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * (1 + module.weight)


def layer_norm(x: torch.Tensor, at: torch.Tensor, module: Any) -> torch.Tensor:
    """arXiv 1607.06450, eq. 4."""
    centred = at - at.mean(-1, keepdim=True)
    normed = (x - x.mean(-1, keepdim=True)) / (
        centred.pow(2).mean(-1, keepdim=True) + module.eps
    ).sqrt()
    return normed if module.weight is None else normed * module.weight + module.bias


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Anatomy:
    """Modules by path; `ffn_norm` reads the stream before the FFN, or x itself if `parallel`."""

    layers: str = "model.layers"
    attention: str = "self_attn.o_proj"
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    ffn_post: str | None = None  # a norm between the FFN and the stream
    attention_norm: str | None = "input_layernorm"  # reads the stream before attention
    attention_post: str | None = None  # a norm between attention and the stream
    value: str = "self_attn.v_proj"  # rows: `values_of` knows which
    final: str = "model.norm"
    norm: Norm = rms
    act: Callable[[torch.Tensor], torch.Tensor] = functional.silu
    parallel: bool = False
    conv: bool = False  # weights are (in, out)


_GEMMA = Anatomy(
    ffn_norm="pre_feedforward_layernorm",
    ffn_post="post_feedforward_layernorm",
    attention_post="post_attention_layernorm",
    norm=rms_plus_one,
    act=tanh_gelu,
)
_TABLE = {
    "gpt2": Anatomy(
        layers="transformer.h",
        attention="attn.c_proj",
        ffn_norm="ln_2",
        attention_norm="ln_1",
        value="attn.c_attn",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        final="transformer.ln_f",
        norm=layer_norm,
        act=tanh_gelu,
        conv=True,
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Anatomy(ffn_in=("mlp.gate_up_proj",), value="self_attn.qkv_proj"),
    "olmo2": Anatomy(
        ffn_norm=None,
        ffn_post="post_feedforward_layernorm",
        attention_norm=None,
        attention_post="post_attention_layernorm",
    ),
    "gptj": Anatomy(
        layers="transformer.h",
        attention="attn.out_proj",
        ffn_norm="ln_1",
        attention_norm="ln_1",
        value="attn.v_proj",
        ffn_in=("mlp.fc_in",),
        ffn_out="mlp.fc_out",
        final="transformer.ln_f",
        norm=layer_norm,
        act=tanh_gelu,
        parallel=True,
    ),
    "gpt_neox": Anatomy(
        layers="gpt_neox.layers",
        attention="attention.dense",
        value="attention.query_key_value",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        final="gpt_neox.final_layer_norm",
        norm=layer_norm,
        act=functional.gelu,
        parallel=True,
    ),
    "opt": Anatomy(
        layers="model.decoder.layers",
        attention="self_attn.out_proj",
        ffn_norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        ffn_in=("fc1",),
        ffn_out="fc2",
        final="model.decoder.final_layer_norm",
        norm=layer_norm,
        act=functional.relu,
    ),
    "falcon": Anatomy(
        layers="transformer.h",
        attention="self_attention.dense",
        value="self_attention.query_key_value",
        ffn_norm="input_layernorm",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        final="transformer.ln_f",
        norm=layer_norm,
        act=functional.gelu,
        parallel=True,
    ),
}


def anatomy(model: Any) -> Anatomy:
    """The stock architecture's parts; the Llama-like ones share theirs."""
    config = model.config
    own = _TABLE.get(config.model_type, Anatomy())
    sequential = {**vars(own), "parallel": False, "ffn_norm": "post_attention_layernorm"}
    if config.model_type == "gpt_neox" and not config.use_parallel_residual:
        return Anatomy(**sequential)
    if config.model_type == "falcon" and config.new_decoder_architecture:
        both = ("ln_attn", "ln_mlp") if config.num_ln_in_parallel_attn == 2 else (
            "input_layernorm",
            "input_layernorm",
        )  # fmt: skip
        return Anatomy(**{**vars(own), "attention_norm": both[0], "ffn_norm": both[1]})
    if config.model_type == "falcon" and not config.parallel_attn:
        return Anatomy(**sequential)
    return own


def values_of(model: Any, block: Any) -> torch.Tensor:
    """The value projection of a layer, (D, heads * E): each query head's own rows side by side."""
    config, weight = model.config, block.get_submodule(anatomy(model).value).weight
    heads = config.num_attention_heads
    kind = config.model_type
    if kind == "gpt2":
        return weight[:, 2 * weight.shape[0] :]  # (in, out): queries, keys, values
    groups = getattr(config, "num_key_value_heads", None) or heads
    if kind == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else heads
        groups = 1 if config.multi_query and not config.new_decoder_architecture else groups
    if kind in ("falcon", "gpt_neox"):  # for each group its queries, key and value
        weight = weight.unflatten(0, (groups, heads // groups + 2, -1))[:, -1].flatten(0, 1)
    elif kind == "phi3":
        weight = weight[-groups * config.hidden_size // heads :]
    each = weight.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0)
    return each.flatten(0, 1).T


def ffn_keys(model: Any, block: Any, neuron: int) -> list[torch.Tensor]:
    """A neuron's keys, (D,) each: gate and up, or the only one."""
    own = anatomy(model)
    weights = [block.get_submodule(path).weight for path in own.ffn_in]
    weights = [weight.T if own.conv else weight for weight in weights]
    if model.config.model_type == "phi3":
        weights = list(weights[0].chunk(2))
    return [weight[neuron] for weight in weights]


def through(model: Any, block: Any, path: str | None, x: torch.Tensor, at: torch.Tensor) -> Any:
    """The linear part of a layer's norm, frozen at `at`, of x; x itself without a norm."""
    if path is None:
        return x
    norm, module = anatomy(model).norm, block.get_submodule(path)
    return norm(x, at, module) - norm(torch.zeros_like(x), at, module)


def ffn_coefficients(model: Any, block: Any, x: torch.Tensor) -> torch.Tensor:
    """Coefficients (..., N) of the FFN of a layer whose FFN branch reads the stream x (..., D)."""
    own = anatomy(model)
    if own.ffn_norm is not None:
        x = own.norm(x, x, block.get_submodule(own.ffn_norm))
    parts = [block.get_submodule(path)(x) for path in own.ffn_in]
    if len(parts) == 1 and model.config.model_type == "phi3":
        parts = list(parts[0].chunk(2, -1))
    gate, *up = parts
    return own.act(gate) * up[0] if up else own.act(gate)


def logits(model: Any, x: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Logits (V,) of the stream x (D,), the final norm's statistics taken at `final` (D,)."""
    own = anatomy(model)
    normed = own.norm(x, final, model.get_submodule(own.final))
    if model.config.model_type == "opt" and model.model.decoder.project_out is not None:
        normed = model.model.decoder.project_out.weight @ normed
    found = model.lm_head.weight @ normed
    if model.lm_head.bias is not None:
        found = found + model.lm_head.bias
    cap = getattr(model.config, "final_logit_softcapping", None)
    return found if cap is None else cap * (found / cap).tanh()
