"""Move one tensor from the units a checkpoint holds to the units another should hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from prune_edit.errors import PlanError
from prune_edit.families import Family
from prune_edit.layout import Physical


@dataclass(frozen=True)
class Role:
    """What one projection's weight has units on: its output axis, or its input axis."""

    part: str  # "attention" or "ffn"
    units: str  # attribute of Layout: "slots", "kv_heads" or "neurons"
    path: str
    is_input: bool = False
    fused: bool = False  # whether it holds queries, keys and values, or gate and up
    whole: bool = False  # whether all of the base model's units stay while the block has any


def roles(family: Family) -> dict[str, Role]:
    """Module path inside a layer -> its role, for all projections that pruning resizes."""
    whole = family.joint_qk_norms
    if family.fused_qkv:
        inputs = [Role("attention", "slots", family.queries, fused=True)]
    else:
        inputs = [
            Role("attention", "slots", family.queries, whole=whole),
            Role("attention", "kv_heads", family.keys, whole=whole),
            Role("attention", "kv_heads", family.values),
        ]
    table = [
        *inputs,
        Role("attention", "slots", family.attention_output, is_input=True),
        *(Role("ffn", "neurons", path, fused=family.fused_ffn) for path in family.ffn_inputs),
        Role("ffn", "neurons", family.ffn_output, is_input=True),
    ]
    return {role.path: role for role in table}


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


def is_gone(family: Family, name: str, layout: Physical) -> bool:
    """Whether the block that a tensor belongs to has no units; an output's bias always stays."""
    where = place(family, name)
    if where is None:
        norm = _norm_of_queries_or_keys(family, name)
        return norm is not None and not layout.slots[norm]
    if where.kind == "bias" and where.role.is_input:
        return False
    return not (layout.slots if where.role.part == "attention" else layout.neurons)[where.layer]


def _norm_of_queries_or_keys(family: Family, name: str) -> int | None:
    """The layer of a tensor that is a norm inside attention, else None."""
    for path in family.qk_norms or ():
        if match := re.fullmatch(
            rf"{re.escape(family.layers)}\.(\d+)\.{re.escape(path)}\.weight", name
        ):
            return int(match[1])
    return None


Owner = tuple[str, str, int | None]
"""What some rows or columns are (`queries`, `gate`, ...), the attribute of Layout, the unit."""


def axis_owners(layout: Physical, family: Family, where: Place) -> list[Owner]:
    """What a projection's axis holds, in physical order.

    Every entry stands for E rows of an attention projection, or for one of an FFN's.
    """
    role, layer = where.role, where.layer
    if role.part == "ffn":
        parts = ("gate", "up") if role.fused else ("",)
        return [(part, "neurons", unit) for part in parts for unit in layout.neurons[layer]]
    slots, kv_heads = layout.slots[layer], layout.kv_heads[layer]
    if role.whole:
        count = layout.n_heads if role.units == "slots" else layout.n_kv_heads
        return [("", role.units, unit) for unit in range(count)]
    if not role.fused or role.is_input:
        units = slots if role.units == "slots" else kv_heads
        return [("", role.units, unit) for unit in units]
    queries: list[Owner] = [("queries", "slots", slot) for slot in slots]
    shared = ("keys", "values")
    if not family.grouped_qkv:
        return queries + [(part, "kv_heads", unit) for part in shared for unit in kv_heads]
    size = len(slots) // max(1, len(kv_heads))
    return [
        owner
        for i, unit in enumerate(kv_heads)
        for owner in (
            *queries[i * size : (i + 1) * size],
            *((part, "kv_heads", unit) for part in shared),
        )
    ]


def owners(layout: Physical, family: Family, where: Place) -> list[tuple[str, int | None]]:
    """The units along a projection's axis in physical order: (attribute of Layout, unit) each."""
    return [(units, unit) for _, units, unit in axis_owners(layout, family, where)]


def axis_of(where: Place, family: Family) -> int:
    """The dimension of a tensor that its units lie along."""
    return 0 if where.kind == "bias" else int(where.role.is_input != family.transposed)


def arrange(
    tensor: torch.Tensor, where: Place, family: Family, have: Physical, want: Physical
) -> torch.Tensor:
    """The tensor with its units in `want`'s order, zeros where `have` lacks one.

    An output bias has no units and stays as it is. Raises PlanError where `have` repeats keys or
    values that are no longer equal.
    """
    if where.kind == "bias" and where.role.is_input:
        return tensor
    there, asked = (axis_owners(layout, family, where) for layout in (have, want))
    if there == asked:
        return tensor
    at: dict[Owner, int] = {}
    for position, owner in enumerate(there):
        at.setdefault(owner, position)
    axis = axis_of(where, family)
    units = tensor.unflatten(axis, (len(there), -1))
    _check_copies(units, axis, there, at, where)
    # None is a pad; a unit that is not there is one, too.
    positions = [at.get(owner) if owner[2] is not None else None for owner in asked]
    index = torch.tensor([position or 0 for position in positions], device=tensor.device)
    pads = [new for new, position in enumerate(positions) if position is None]
    found: torch.Tensor = units.index_select(axis, index)
    if pads:
        found = found.index_fill(axis, torch.tensor(pads, device=tensor.device), 0)
    return found.flatten(axis, axis + 1)


def _check_copies(
    units: torch.Tensor, axis: int, there: list[Owner], at: dict[Owner, int], where: Place
) -> None:
    for position, owner in enumerate(there):
        first = at[owner]
        if owner[2] is None or position == first:
            continue
        if not torch.equal(units.select(axis, position), units.select(axis, first)):
            raise PlanError(
                f"layer {where.layer}: the copies that --kv duplicate made of KV head {owner[2]} "
                "differ, so the model was tuned since; prune the base model instead"
            )


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
