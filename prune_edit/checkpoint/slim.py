"""Slice a checkpoint down to fewer units: each layer its own sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prune_edit.arrange import Canonical, arrange, is_gone, place, roles, tensor_name
from prune_edit.checkpoint.compensation import Compensation
from prune_edit.errors import PlanError
from prune_edit.families import Family, Flag
from prune_edit.layout import SCHEMA_VERSION, Layout, head_dim, origin
from prune_edit.modeling import AUTO_CLASSES, AUTO_MAP


def slim_tensors(
    family: Family,
    source: Mapping[str, torch.Tensor],
    have: Layout,
    want: Layout,
    compensation: Compensation | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `source`, which holds `have`, cut to `want`; sorted by name, one at a time.

    With a compensation every layer gets both output biases; it is added to those that exist.
    Raises PlanError where `want` keeps units that `have` lacks.
    """
    want.check_within(have)
    source = Canonical(family, source)
    outputs = {role.path: role.part for role in roles(family).values() if role.is_input}
    constants: dict[str, torch.Tensor | None] = {}
    if compensation is not None:
        for path, part in outputs.items():
            for layer, constant in enumerate(getattr(compensation, part)):
                constants[tensor_name(family, layer, path, "bias")] = constant
    like = like_output(family, source)
    for name in sorted({*source, *constants}):
        where = place(family, name)
        if name not in source:  # an output bias that only the compensation asks for
            constant = constants[name]
            yield name, torch.zeros_like(like) if constant is None else constant.to(like).clone()
            continue
        if is_gone(family, name, want):
            continue
        tensor = source[name]
        if where is not None:
            tensor = arrange(tensor, where, family, have, want)
        if (constant := constants.get(name)) is not None:
            tensor = (tensor.float() + constant.to(tensor.device).float()).to(tensor.dtype)
        yield name, tensor


def like_output(family: Family, source: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor (D,) of the model's number format and device: what created biases look like."""
    if (norm := f"{family.final_norm}.weight") in source:
        return source[norm]
    outputs = {role.path for role in roles(family).values() if role.is_input}
    for name in source:  # a norm without weights (some OPT)
        where = place(family, name)
        if where is not None and where.role.path in outputs and where.kind == "weight":
            return source[name].select(int(not family.transposed), 0)
    raise PlanError("no attention and no FFN is left in any layer; keep more of the model")


def slim_config(
    config: Mapping[str, Any],
    family: Family,
    have: Layout,
    want: Layout,
    *,
    output_bias: bool,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of the ragged checkpoint `slim_tensors` makes.

    `provenance` (tool version, base model, plan digest, ...) goes into the `prune_edit` block.
    Raises PlanError where `want` keeps units that `have` lacks, or no head in the whole model.
    """
    want.check_within(have)
    if not any(want.slots):
        raise PlanError(
            "the plan keeps no attention head in any layer; a ragged checkpoint needs at least "
            "one, keep more heads or use --format masked"
        )
    base = family.base_type
    fields = dict(config)
    attention_bias, ffn_bias = output_biases(config, family)
    sizes = {
        family.heads_key: max(map(len, want.slots)),
        family.width_key: max(1, *map(len, want.neurons)),
    }
    if family.kv_heads_key:
        sizes[family.kv_heads_key] = max(map(len, want.kv_heads))
    return {
        **fields,
        **sizes,
        "model_type": f"pruned_{base}",
        "architectures": [AUTO_MAP[base][2].split(".")[1]],
        "auto_map": dict(zip(AUTO_CLASSES, AUTO_MAP[base], strict=True)),
        **({"head_dim": head_dim(config, family)} if family.own_head_dim else {}),
        "attention_output_bias": attention_bias or output_bias,
        "ffn_output_bias": ffn_bias or output_bias,
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {
            str(layer): _layer_sizes(want, layer, family) for layer in range(want.n_layers)
        },
        "prune_edit": {
            **origin(fields),
            **provenance,
            "schema": SCHEMA_VERSION,
            "base": {
                "num_attention_heads": want.n_heads,
                "num_key_value_heads": want.n_kv_heads,
                "intermediate_size": want.n_neurons,
            },
            "heads": [list(kept) for kept in want.heads],
            "neurons": [list(kept) for kept in want.neurons],
            "kv": want.kv,
            "slots": [[slot or 0 for slot in slots] for slots in want.slots],
        },
    }


def output_biases(config: Mapping[str, Any], family: Family) -> tuple[bool, bool]:
    """Whether the attention and FFN outputs have biases in this configuration."""
    _, attention, ffn = family.biases
    return (
        bool(config.get("attention_output_bias")) or flagged(attention, config, family),
        bool(config.get("ffn_output_bias")) or flagged(ffn, config, family),
    )


def flagged(flag: Flag, config: Mapping[str, Any], family: Family) -> bool:
    """What a flag of `Family.biases` comes to."""
    return flag if isinstance(flag, bool) else bool(config.get(flag, family.default_bias))


def _layer_sizes(layout: Layout, layer: int, family: Family) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    skip = []
    if layout.slots[layer]:
        sizes["num_attention_heads"] = len(layout.slots[layer])
        if family.kv_heads_key:
            sizes["num_key_value_heads"] = len(layout.kv_heads[layer])
    else:
        skip.append("attention")
    if layout.neurons[layer]:
        sizes["intermediate_size"] = len(layout.neurons[layer])
    else:
        skip.append("ffn")
    return {**sizes, "skip": skip} if skip else sizes
