"""Move one tensor from the units a checkpoint holds to the units another should hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from prune_edit.families import Family
from prune_edit.layout import Layout

Order = Sequence[int | None]
"""The original units along an axis, in physical order; None where there is nothing but zeros."""


@dataclass(frozen=True)
class Role:
    """What one projection's weight has units on: its output axis, or its input axis."""

    part: str  # "attention" or "ffn"
    units: str  # attribute of Layout: "slots", "kv_heads" or "neurons"
    path: str
    is_input: bool = False
    blocks: int = 1  # 3 where queries, keys and values are one projection, 2 for gate and up


def roles(family: Family) -> dict[str, Role]:
    """Module path inside a layer -> its role, for all projections that pruning resizes."""
    if family.fused_qkv:
        inputs = [Role("attention", "slots", family.queries, blocks=3)]
    else:
        inputs = [
            Role("attention", "slots", family.queries),
            Role("attention", "kv_heads", family.keys),
            Role("attention", "kv_heads", family.values),
        ]
    table = [
        *inputs,
        Role("attention", "slots", family.attention_output, is_input=True),
        *(Role("ffn", "neurons", path, blocks=1 + family.fused_ffn) for path in family.ffn_inputs),
        Role("ffn", "neurons", family.ffn_output, is_input=True),
    ]
    return {role.path: role for role in table}


def order(layout: Layout, role: Role, layer: int) -> Order:
    """The units that a role's axis holds in one layer."""
    units: Order = getattr(layout, role.units)[layer]
    return units


@dataclass(frozen=True)
class Place:
    """A tensor of a resized projection: its layer, role, and `weight` or `bias`."""

    layer: int
    role: Role
    kind: str


def place(family: Family, name: str) -> Place | None:
    """Where a tensor belongs, or None for one that pruning leaves alone."""
    match = re.fullmatch(rf"{re.escape(family.layers)}\.(\d+)\.(.+)\.(weight|bias)", name)
    role = roles(family).get(match[2]) if match else None
    return Place(int(match[1]), role, match[3]) if match and role else None


def tensor_name(family: Family, layer: int, path: str, kind: str) -> str:
    """The inverse of `place`."""
    return f"{family.layers}.{layer}.{path}.{kind}"


def owners(layout: Layout, family: Family, where: Place) -> list[tuple[str, int | None]]:
    """The units along a projection's axis in physical order: (attribute of Layout, unit) each.

    Every entry stands for E rows of an attention projection, or for one of an FFN's.
    """
    role, layer = where.role, where.layer
    slots, kv_heads = layout.slots[layer], layout.kv_heads[layer]
    if role.is_input or role.part == "ffn" or not family.fused_qkv:
        return [(role.units, unit) for unit in order(layout, role, layer)] * role.blocks
    queries: list[tuple[str, int | None]] = [("slots", slot) for slot in slots]
    if not family.grouped_qkv:
        return queries + [("kv_heads", unit) for unit in kv_heads] * 2
    size = len(slots) // max(1, len(kv_heads))
    return [
        owner
        for i, unit in enumerate(kv_heads)
        for owner in (*queries[i * size : (i + 1) * size], *[("kv_heads", unit)] * 2)
    ]


def arrange(
    tensor: torch.Tensor, where: Place, family: Family, have: Order, want: Order
) -> torch.Tensor:
    """The tensor with its units in `want`'s order, zeros where `have` lacks one.

    An output bias has no units and stays as it is.
    """
    if where.kind == "bias" and where.role.is_input:
        return tensor
    axis = unit_axis(where, family)
    parts = tensor.chunk(where.role.blocks, dim=axis)
    taken = [_take(part, axis, have, want) for part in parts]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=axis)


def unit_axis(where: Place, family: Family) -> int:
    """The axis of a tensor that has the units: 0, also of a bias, or 1."""
    return 0 if where.kind == "bias" else int(where.role.is_input != family.transposed)


def _take(tensor: torch.Tensor, axis: int, have: Order, want: Order) -> torch.Tensor:
    if list(have) == list(want):
        return tensor
    at = {unit: position for position, unit in enumerate(have) if unit is not None}
    # None is a pad; a unit that is not there is one, too.
    positions = [at.get(unit) if unit is not None else None for unit in want]
    index = torch.tensor([position or 0 for position in positions], device=tensor.device)
    pads = [new for new, position in enumerate(positions) if position is None]
    units: torch.Tensor = tensor.unflatten(axis, (len(have), -1)).index_select(axis, index)
    if pads:
        units = units.index_fill(axis, torch.tensor(pads, device=tensor.device), 0)
    return units.flatten(axis, axis + 1)


class Canonical(Mapping[str, torch.Tensor]):
    """A checkpoint under the names a CausalLM's state dict has.

    Base-model checkpoints (OpenAI's GPT-2 is one) lack the prefix, and old ones hold causal masks.
    """

    def __init__(self, family: Family, source: Mapping[str, torch.Tensor]) -> None:
        prefix = family.layers.split(".")[0] + "."
        bare = not any(name.startswith(prefix) for name in source)
        mask = re.compile(rf".*\.{re.escape(family.attention)}\.(masked_)?bias")
        self._source = source
        self._names = {
            prefix + name if bare and not name.startswith(family.unembedding) else name: name
            for name in sorted(source)
            if not mask.fullmatch(name) and not name.endswith("rotary_emb.inv_freq")
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor
