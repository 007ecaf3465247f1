"""Costs: what every head and neuron takes, in parameters, FLOPs, bytes or measured seconds.

A budget counts what pruning can remove: the projections of attention and FFN. A query head owns
its slot (a row block of the query projection, a column block of the output projection), its KV
group what all its heads share (keys and values), so the group's cost goes with its last head.
Groups of a layer are padded to equal size, and pads cost as much as heads do; or, where keys and
values are duplicated instead, each copy costs what a group does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prune_edit.arrange import owners, place
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept, Layout

COUNTED = ("parameters", "flops", "bytes")
KINDS = (*COUNTED, "latency")
CONTEXT = 64
"""Tokens in sight at which FLOPs a token are stated, where the model has as many positions."""

Cost = float
"""A whole number but for latency, which is in seconds."""


@dataclass(frozen=True)
class Costs:
    """Per layer, what one slot, KV group and neuron costs, and a block that has any unit.

    `slot` is a query head's or a pad's. `attention` and `ffn` are 0 but for latency: what a block
    takes however small it is. `group_size` is the query heads of a KV group of the base model, `kv`
    the layout's way with short groups.
    """

    kind: str
    group_size: int
    slot: tuple[Cost, ...]
    group: tuple[Cost, ...]
    neuron: tuple[Cost, ...]
    attention: tuple[Cost, ...]
    ffn: tuple[Cost, ...]
    kv: str = field(default="pad", kw_only=True)

    def of_heads(self, layer: int, sizes: Sequence[int]) -> Cost:
        """A layer's attention with so many heads in each KV group, pads or copies included."""
        there = [size for size in sizes if size > 0]
        if not there:
            return 0
        if self.kv == "duplicate":
            copies = sum(there) // math.gcd(*there)
            return (
                self.attention[layer] + sum(there) * self.slot[layer] + copies * self.group[layer]
            )
        each = max(there) * self.slot[layer] + self.group[layer]
        return self.attention[layer] + len(there) * each

    def of_neurons(self, layer: int, width: int) -> Cost:
        """A layer's FFN of so many neurons."""
        return self.ffn[layer] + width * self.neuron[layer] if width else 0

    def of(self, layout: Layout) -> Cost:
        """All attention and FFN projections of a layout."""
        return self.of_units(layout.heads, layout.neurons)

    def of_units(self, heads: Kept, neurons: Kept) -> Cost:
        """All projections of a model with these units."""
        return sum(
            self.of_heads(layer, self.sizes(heads[layer]))
            + self.of_neurons(layer, len(neurons[layer]))
            for layer in range(len(heads))
        )

    def sizes(self, heads: Sequence[int]) -> tuple[int, ...]:
        """How many of a layer's heads each KV group there has."""
        groups = [head // self.group_size for head in heads]
        return tuple(groups.count(group) for group in sorted(set(groups)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: one number where all layers have the same."""
        fields = asdict(self)
        if self.kv == "pad":
            del fields["kv"]
        for name, value in fields.items():
            if isinstance(value, tuple):
                fields[name] = value[0] if len(set(value)) == 1 else list(value)
        return fields


def counted_costs(decoder: Decoder, kind: str, context: int = CONTEXT) -> Costs:
    """The costs of a model's units in `parameters`, `flops` or `bytes`.

    `flops` are those of `evaluation.cost.flops_per_token` with `context` tokens in sight, at most
    the model's positions: two a multiply-add of the weights, and a head's scores and values.
    `bytes` are those of the weights as they were loaded. Raises BudgetError for another kind.
    """
    if kind not in COUNTED:
        raise BudgetError(f"cost {kind!r} is unknown; give {', '.join(KINDS)}")
    found = {name: [0] * decoder.n_layers for name in ("slots", "kv_heads", "neurons", "whole")}
    for layer, module in enumerate(decoder.layers):
        for name, tensor in module.named_parameters():
            where = place(decoder.family, f"{decoder.family.layers}.{layer}.{name}")
            if where is None or (where.kind == "bias" and where.role.is_input):
                continue  # an output's bias stays whatever goes
            if kind == "flops" and where.kind == "bias":
                continue
            along = [units for units, _ in owners(decoder.layout, decoder.family, where)]
            each = tensor.numel() // len(along)
            each *= {"parameters": 1, "flops": 2, "bytes": tensor.element_size()}[kind]
            if where.role.whole:  # goes with the last head
                found["whole"][layer] += each * len(along)
                continue
            for units in set(along):
                there = len(getattr(decoder.layout, units)[layer])
                found[units][layer] += each * along.count(units) // there
    if kind == "flops":
        seen = min(context, decoder.max_positions or context)
        for layer, slots in enumerate(decoder.layout.slots):
            # A multiply-add a channel and position for the scores, another for the values.
            found["slots"][layer] += 4 * decoder.head_dim * seen if slots else 0
    none = (0,) * decoder.n_layers
    layout = decoder.layout
    return Costs(
        kind,
        layout.n_heads // layout.n_kv_heads,
        tuple(found["slots"]),
        tuple(found["kv_heads"]),
        tuple(found["neurons"]),
        tuple(found["whole"]),
        none,
    )
