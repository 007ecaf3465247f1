"""Put a model into shapes that a stock architecture can have, zeros where units were removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from prune_edit.arrange import (
    Canonical,
    Place,
    Role,
    arrange,
    axis_owners,
    place,
    roles,
    tensor_name,
)
from prune_edit.checkpoint.slim import flagged, like_output, output_biases
from prune_edit.errors import PlanError
from prune_edit.families import Family, family_of
from prune_edit.layout import Layout, Physical, head_dim, hidden_size

_RAGGED_ONLY = (
    "auto_map",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "attention_output_bias",
    "ffn_output_bias",
)
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class Stock:
    """A stock architecture for a model: its row, and its configuration but for sizes."""

    family: Family
    fields: dict[str, Any]
    head_dim: int

    def accepts(self, heads: int) -> bool:
        """Whether a layer may have so many query heads."""
        return not self.family.heads_divide or hidden_size(self.fields) % heads == 0

    def sized(self, heads: int, kv_heads: int, neurons: int) -> dict[str, Any]:
        """The configuration with these sizes in every layer."""
        sizes = {self.family.heads_key: heads, self.family.width_key: neurons}
        if self.family.kv_heads_key:
            sizes[self.family.kv_heads_key] = kv_heads
        return {**self.fields, **sizes}


def stocks(config: Mapping[str, Any], family: Family) -> list[Stock]:
    """The stock architectures that can hold a model, its own first.

    `config` is a ragged or a stock model's. Another architecture is taken only where it computes
    the same. Raises PlanError where there is none: output biases that none has room for.
    """
    own = family_of(family.base_type)
    names = (own.model_type, *own.same_as)
    size = head_dim(config, family)
    found = [_as_stock(config, own, family_of(name), size) for name in names]
    if not (fitting := [stock for stock in found if stock is not None]):
        parts = [
            part
            for part, needed, flag in zip(
                ("attention", "FFN"), output_biases(config, own), own.biases[1:], strict=True
            )
            if needed and flag is False
        ]
        raise PlanError(
            f"a {own.model_type} has no output biases on its {' and '.join(parts)}, so no stock "
            "checkpoint can hold the compensation; use --format ragged, or --recover none"
        )
    return fitting


def _as_stock(config: Mapping[str, Any], own: Family, other: Family, size: int) -> Stock | None:
    needed = (flagged(own.biases[0], config, own), *output_biases(config, own))
    flags = {flag for flag, need in zip(other.biases, needed, strict=True) if need}
    if False in flags:
        return None
    fields = {key: value for key, value in config.items() if key not in _RAGGED_ONLY}
    if other is not own:
        kinds = config.get("layer_types") or []
        slides = config.get("sliding_window") is not None and own.all_sliding
        if slides or "sliding_attention" in kinds:
            return None
        fields = {key: value for key, value in fields.items() if key not in _WINDOWS}
        if other.all_sliding:
            fields["sliding_window"] = None
    for flag in (*own.biases, *other.biases):
        if isinstance(flag, str):
            fields.pop(flag, None)
    fields |= {flag: flag in flags for flag in other.biases if isinstance(flag, str)}
    if other.own_head_dim:
        fields["head_dim"] = size
    else:
        fields.pop("head_dim", None)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields |= {
        "model_type": other.model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[other.model_type]],
    }
    return Stock(other, fields, size)


def stock_tensors(
    stock: Stock, source: Mapping[str, torch.Tensor], have: Layout, want: Physical
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the stock model, from `source`, which holds `have`, arranged as `want`.

    What is not there is zero. Sorted by name, one at a time.
    """
    family = stock.family
    source = Canonical(family, source)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(have.n_layers):
        for role in roles(family).values():
            weight, bias = _shapes(role, layer, stock, want)
            expected[tensor_name(family, layer, role.path, "weight")] = weight
            if _has_bias(role, stock):
                expected[tensor_name(family, layer, role.path, "bias")] = bias
        for path, units in zip(family.qk_norms or (), ("n_heads", "n_kv_heads"), strict=False):
            count = getattr(have, units) if family.joint_qk_norms else 1
            expected[tensor_name(family, layer, path, "weight")] = (count * stock.head_dim,)
    like = like_output(family, source)  # what is created has its dtype and device
    for name in sorted({*source, *expected}):
        if name not in source:
            yield name, like.new_zeros(expected[name])
            continue
        tensor = source[name]
        if (where := place(family, name)) is not None:
            tensor = arrange(tensor, where, family, have, want)
        yield name, tensor


def _has_bias(role: Role, stock: Stock) -> bool:
    inputs, output, ffn = stock.family.biases
    flag = ffn if role.part == "ffn" else output if role.is_input else inputs
    return flagged(flag, stock.fields, stock.family)


def _shapes(
    role: Role, layer: int, stock: Stock, want: Physical
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a projection's weight and bias."""
    family = stock.family
    per_unit = 1 if role.units == "neurons" else stock.head_dim
    units = per_unit * len(axis_owners(want, family, Place(layer, role, "weight")))
    width = hidden_size(stock.fields)
    shape = (width, units) if role.is_input != family.transposed else (units, width)
    return shape, (width if role.is_input else units,)


def whole(layout: Layout) -> Layout:
    """The layout of the base model."""
    return replace(
        layout,
        heads=(tuple(range(layout.n_heads)),) * layout.n_layers,
        neurons=(tuple(range(layout.n_neurons)),) * layout.n_layers,
        kv="pad",
    )
