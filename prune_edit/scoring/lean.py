"""The weights of Llama-like layers as a lean forward pass wants them, and which models have such.

Supported is what this file spells: RMS norm, rotary positions over whole heads, separate
projections for queries, keys and values, full or sliding causal attention, a gated FFN. Whether a
model is of that kind is read off its modules (nothing may be left over), its configuration and its
hooks; `intervention.fast` then compares figures, for what no structure shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prune_edit.decoder import Decoder

Activation = Callable[..., torch.Tensor]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
_ROTARY = ("default", "linear", "llama3", "yarn")  # angles do not depend on the input's length
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Attention:
    """One layer's attention: `inputs` (q + k + v, D), `output` (D, q); biases or None."""

    queries: int  # rows of `inputs`: slots * E
    keys: int  # KV heads * E
    inputs: torch.Tensor
    input_bias: torch.Tensor | None
    output: torch.Tensor
    slots: list[int]  # base index of every head slot, -1 for a pad
    norm: torch.Tensor | None  # weight, unless it is folded into `inputs`
    epsilon: float
    sight: int | None  # positions seen, the own one included; None for all


@dataclass(frozen=True)
class Ffn:
    """One layer's FFN: `inputs` (2 n, D), gate above up, `output` (D, n); biases or None."""

    width: int
    inputs: torch.Tensor
    input_bias: torch.Tensor | None
    output: torch.Tensor
    norm: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One layer; an absent block is None, its constant output may be there all the same."""

    attention: Attention | None
    attention_bias: torch.Tensor | None  # (D,)
    ffn: Ffn | None
    ffn_bias: torch.Tensor | None


def supported(decoder: Decoder) -> bool:
    """Whether a lean forward pass can stand for the model's own, as far as its make-up tells."""
    model, family = decoder.model, decoder.family
    if family.rotary is None or not family.rms_norm or len(family.ffn_inputs) != 2:
        return False
    if family.transposed or family.fused_qkv or family.fused_ffn or family.norm_offset:
        return False
    if family.ffn_norm is None or family.ffn_output_norm or family.softcap_key:
        return False
    if model.training or activation(decoder) is None or _altered(model):
        return False
    tensors = [*model.parameters()]
    first = tensors[0]
    if first.dtype not in _DTYPES or any(
        (t.dtype, t.device) != (first.dtype, first.device) for t in tensors
    ):
        return False
    if decoder.rotary_kind not in _ROTARY:
        return False
    ends = [decoder.module(path) for path in (family.embedding, family.unembedding)]
    if [type(end) for end in ends] != [nn.Embedding, nn.Linear] or decoder.sights() is None:
        return False
    if getattr(ends[1], "bias", None) is not None:
        return False
    if decoder.rotary(1)[0].shape[-1] != decoder.head_dim:
        return False
    norms = {_attention_norm(decoder, i) for i in range(decoder.n_layers)}
    return len(norms) == 1 and None not in norms


def activation(decoder: Decoder) -> Activation | None:
    """The FFN's activation function, if it is a known one."""
    return _ACTIVATIONS.get(decoder.activation or "")


def _altered(model: nn.Module) -> bool:
    """Whether something watches or replaces a module's forward pass.

    transformers leaves hooks of its own on a model that was once asked for its attentions or
    hidden states; those change nothing.
    """
    return any(
        module._forward_pre_hooks
        or "forward" in vars(module)
        or not all(
            getattr(hook, "__module__", "").startswith("transformers.")
            for hook in module._forward_hooks.values()
        )
        for module in model.modules()
    )


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _attention_norm(decoder: Decoder, layer: int) -> str | None:
    """The one norm of a layer that the table of families does not name; None if more is there."""
    family, module = decoder.family, decoder.layers[layer]
    linear = [family.queries, family.keys, family.values, family.attention_output]
    linear += [*family.ffn_inputs, family.ffn_output]
    named = {f"{path}.{kind}" for path in linear for kind in ("weight", "bias")}
    named.add(f"{family.ffn_norm}.weight")
    left = [name for name, _ in module.named_parameters() if name not in named]
    parts = [part for path, part in module.named_modules() if path in linear]
    if len(left) != 1 or not all(map(_plain, parts)) or any(module.buffers()):
        return None
    return left[0].removesuffix(".weight")


def _plain(projection: nn.Module) -> bool:
    """Whether it is a linear map, or the bias that is left of one in a block without units."""
    names = [name for name, _ in projection.named_parameters()]
    return type(projection) is nn.Linear or names in ([], ["bias"])


def prepare(decoder: Decoder, layer: int) -> Layer:
    """A layer's weights joined, and in float32 with the norms' weights and rotary order folded in.

    A copy of one layer, to be dropped after use. Rotary order puts the two halves of a pair side
    by side, so that rotating is one complex product.
    """
    module, family = decoder.layers[layer], decoder.family
    exact = decoder.model.dtype in (torch.float32, torch.float64)

    def part(path: str) -> Any:
        return module.get_submodule(path)

    def norm(path: str) -> tuple[torch.Tensor, float]:
        found = part(path)
        epsilon = getattr(found, "variance_epsilon", None)
        return found.weight.detach(), float(found.eps if epsilon is None else epsilon)

    def join(paths: list[str], paired: int, scale: torch.Tensor) -> tuple[Any, Any]:
        weights, biases = [], []
        for i, path in enumerate(paths):
            weight, bias = part(path).weight.detach(), part(path).bias
            order = _paired(weight.shape[0], decoder.head_dim) if i < paired and exact else ...
            weights.append(weight[order])
            biases.append(None if bias is None else bias.detach()[order])
        joined = torch.cat(weights)
        if exact:
            joined.mul_(scale)
        if all(bias is None for bias in biases):
            return joined, None
        have = zip(weights, biases, strict=True)
        return joined, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in have])

    def constant(path: str) -> torch.Tensor | None:
        bias = getattr(part(path), "bias", None) if _has(module, path) else None
        return None if bias is None else bias.detach()

    attention = ffn = None
    if decoder.attention_output(layer) is not None:
        scale, epsilon = norm(_attention_norm(decoder, layer) or "")
        paths = [family.queries, family.keys, family.values]
        inputs, bias = join(paths, 2, scale)
        sights = decoder.sights()
        assert sights is not None
        attention = Attention(
            queries=part(family.queries).weight.shape[0],
            keys=part(family.keys).weight.shape[0],
            inputs=inputs,
            input_bias=bias,
            output=part(family.attention_output).weight.detach(),
            slots=decoder.head_slots[layer].tolist(),
            norm=None if exact else scale,
            epsilon=epsilon,
            sight=sights[layer],
        )
    if decoder.ffn_output(layer) is not None:
        assert family.ffn_norm is not None
        scale, epsilon = norm(family.ffn_norm)
        inputs, bias = join([*family.ffn_inputs], 0, scale)
        ffn = Ffn(
            width=inputs.shape[0] // 2,
            inputs=inputs,
            input_bias=bias,
            output=part(family.ffn_output).weight.detach(),
            norm=None if exact else scale,
            epsilon=epsilon,
        )
    return Layer(attention, constant(family.attention_output), ffn, constant(family.ffn_output))


def _paired(rows: int, size: int) -> torch.Tensor:
    """The order of a projection's rows in which the halves of every head alternate."""
    heads = torch.arange(rows).view(-1, 2, size // 2)
    return heads.transpose(1, 2).flatten()
