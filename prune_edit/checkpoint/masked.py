"""Put a ragged checkpoint back into the base model's shapes, zeros where units were removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prune_edit.arrange import (
    Canonical,
    Role,
    arrange,
    order,
    place,
    roles,
    tensor_name,
)
from prune_edit.checkpoint.slim import output_biases
from prune_edit.errors import PlanError
from prune_edit.families import Family
from prune_edit.layout import SCHEMA_VERSION, Layout, head_dim, hidden_size
from prune_edit.support import check_prunable

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_RAGGED_ONLY = (
    "auto_map",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "attention_output_bias",
    "ffn_output_bias",
)


def masked_tensors(
    family: Family, config: Mapping[str, Any], source: Mapping[str, torch.Tensor], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a ragged model at its base shape; sorted by name, one at a time.

    `config` is the ragged (or stock) model's, `layout` what `source` holds. Raises PlanError as
    `masked_config`.
    """
    source = Canonical(family, source)
    full = layout.keep(
        (tuple(range(layout.n_heads)),) * layout.n_layers,
        (tuple(range(layout.n_neurons)),) * layout.n_layers,
    )
    biased = _biased_parts(config, family)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(layout.n_layers):
        for role in roles(family).values():
            weight, bias = _shapes(role, family, config, full)
            expected[tensor_name(family, layer, role.path, "weight")] = weight
            if biased[role.part]:
                expected[tensor_name(family, layer, role.path, "bias")] = bias
    like = source[f"{family.final_norm}.weight"]  # what is created has its dtype and device
    for name in sorted({*source, *expected}):
        if name not in source:
            yield name, like.new_zeros(expected[name])
            continue
        tensor = source[name]
        if (where := place(family, name)) is not None:
            tensor = arrange(
                tensor,
                where,
                family,
                order(layout, where.role, where.layer),
                order(full, where.role, where.layer),
            )
        yield name, tensor


def masked_config(
    config: Mapping[str, Any], family: Family, layout: Layout, *, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The stock configuration for `masked_tensors`, with a `prune_edit` block that says whence.

    Raises PlanError where the model has output biases that the stock architecture cannot have,
    UnsupportedFamilyError for a family that can only be scored.
    """
    check_prunable(family)
    biased = _biased_parts(config, family)
    block = {
        **config.get("prune_edit", {}),
        **provenance,
        "schema": SCHEMA_VERSION,
        "format": "masked",
        "heads": [list(kept) for kept in layout.heads],
        "neurons": [list(kept) for kept in layout.neurons],
    }
    fields = {key: value for key, value in config.items() if key not in _RAGGED_ONLY}
    fields |= {
        "model_type": family.base_type,
        "architectures": [_ARCHITECTURES[family.base_type]],
        family.heads_key: layout.n_heads,
        family.width_key: layout.n_neurons,
        "prune_edit": block,
    }
    if family.kv_heads_key:
        fields[family.kv_heads_key] = layout.n_kv_heads
    else:
        fields.pop("head_dim", None)  # GPT-2 has no such key; it divides by the head count
    if family.output_bias_keys:
        for key, part in zip(family.output_bias_keys, ("attention", "ffn"), strict=True):
            fields[key] = biased[part]
    return fields


def _biased_parts(config: Mapping[str, Any], family: Family) -> dict[str, bool]:
    biases = output_biases(config, family)
    if any(biases) and family.rms_norm and family.output_bias_keys is None:
        raise PlanError(
            f"a {family.base_type} has no output biases, so a masked checkpoint cannot hold the "
            "compensation; use --format ragged, or --recover none"
        )
    return dict(zip(("attention", "ffn"), biases, strict=True))


def _shapes(
    role: Role, family: Family, config: Mapping[str, Any], full: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The base shapes of a projection's weight and bias."""
    per_unit = 1 if role.units == "neurons" else head_dim(config, family)
    units = role.blocks * per_unit * len(order(full, role, 0))
    width = hidden_size(config)
    shape = (width, units) if role.is_input != family.transposed else (units, width)
    return shape, (width if role.is_input else units,)
