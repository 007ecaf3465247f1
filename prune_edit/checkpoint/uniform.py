"""The uniform form: the same smaller sizes in every layer, so that stock code loads it.

Every layer is padded with zeros to the widest one. K KV heads of G query heads each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_edit.checkpoint.stock import Stock, stock_tensors, stocks
from prune_edit.families import Family
from prune_edit.layout import SCHEMA_VERSION, Layout, Order, origin


@dataclass(frozen=True)
class Padded:
    """What the tensors of a uniform model hold: a layout's units, and pads beside them."""

    n_heads: int
    n_kv_heads: int
    slots: Order
    kv_heads: Order
    neurons: Order

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Query heads, KV heads and neurons of every layer."""
        return len(self.slots[0]), len(self.kv_heads[0]), len(self.neurons[0])


def uniform_tensors(
    family: Family,
    config: Mapping[str, Any],
    source: Mapping[str, torch.Tensor],
    layout: Layout,
    have: Layout | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model at the common sizes; sorted by name, one at a time.

    `config` is the ragged (or stock) model's, `have` (default: `layout`) what `source` holds.
    Raises PlanError as `uniform_config`.
    """
    stock, padded = fit(config, family, layout)
    yield from stock_tensors(stock, source, layout if have is None else have, padded)


def uniform_config(
    config: Mapping[str, Any], family: Family, layout: Layout, *, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The stock configuration for `uniform_tensors`, with a `prune_edit` block that says whence.

    `alive_heads` and `alive_neurons` there are the places of this model that are no pads. Raises
    PlanError where the model has output biases that no stock architecture can have.
    """
    stock, padded = fit(config, family, layout)
    fields = stock.sized(*padded.sizes)
    fields["prune_edit"] = {
        **origin(config),
        **provenance,
        "schema": SCHEMA_VERSION,
        "format": "uniform",
        "heads": [list(kept) for kept in layout.heads],
        "neurons": [list(kept) for kept in layout.neurons],
        "alive_heads": [_alive(slots) for slots in padded.slots],
        "alive_neurons": [_alive(neurons) for neurons in padded.neurons],
    }
    return fields


def _alive(units: tuple[int | None, ...]) -> list[int]:
    return [place for place, unit in enumerate(units) if unit is not None]


def fit(config: Mapping[str, Any], family: Family, layout: Layout) -> tuple[Stock, Padded]:
    """The stock architecture and the sizes that hold a layout with the fewest query heads.

    Where stock code derives E from the number of heads, or norms queries over all heads, that
    number stays. Raises PlanError as `stocks`.
    """
    width = max(1, *map(len, layout.neurons))
    neurons = tuple((*kept, *(None,) * (width - len(kept))) for kept in layout.neurons)
    found = stocks(config, family)
    shapes = _head_shapes(family, layout)
    best = min(
        (
            (kv * size, kv, number)
            for number, stock in enumerate(found)
            for kv, size in shapes
            if stock.accepts(kv * size)
        ),
        default=None,
    )
    assert best is not None  # the base model's own number of heads always is
    heads, kv, number = best
    pairs = [_placed(family, layout, layer, kv, heads // kv) for layer in range(layout.n_layers)]
    slots, kv_heads = (tuple(pair[i] for pair in pairs) for i in (0, 1))
    return found[number], Padded(layout.n_heads, layout.n_kv_heads, slots, kv_heads, neurons)


def _head_shapes(family: Family, layout: Layout) -> list[tuple[int, int]]:
    """The (K, G) that every layer fits into; without duplicates no more than the base model's."""
    base = layout.n_kv_heads, layout.n_heads // layout.n_kv_heads
    if _stays_in_place(family):
        return [base]
    groups = [tuple(map(len, layout.groups(layer).values())) for layer in range(layout.n_layers)]
    if layout.kv != "duplicate":
        kv_heads = max(1, *map(len, groups))
        size = max(1, *(max(each, default=1) for each in groups))
        return [(k, g) for k in range(kv_heads, base[0] + 1) for g in range(size, base[1] + 1)]
    return [
        (k, g)
        for g in range(1, base[1] + 1)
        for k in range(max(1, *(_parts(each, g) for each in groups)), layout.n_heads + 1)
    ]


def _parts(groups: Sequence[int], size: int) -> int:
    """KV heads, duplicates included, that groups of query heads need in groups of `size`."""
    return sum(-(-heads // size) for heads in groups)


def _stays_in_place(family: Family) -> bool:
    """Whether query heads keep their number and place, only zeroed."""
    return not family.own_head_dim or family.joint_qk_norms


def _placed(
    family: Family, layout: Layout, layer: int, kv: int, size: int
) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """A layer's query and KV heads, padded to `kv` groups of `size`."""
    if _stays_in_place(family):
        kept, used = set(layout.heads[layer]), set(layout.kv_heads[layer])
        return (
            tuple(head if head in kept else None for head in range(layout.n_heads)),
            tuple(unit if unit in used else None for unit in range(layout.n_kv_heads)),
        )
    slots: list[int | None] = []
    kv_heads: list[int | None] = []
    for unit, heads in layout.groups(layer).items():
        for start in range(0, len(heads), size):
            part = heads[start : start + size]
            slots += [*part, *(None,) * (size - len(part))]
            kv_heads.append(unit)
    missing = kv - len(kv_heads)
    return (*slots, *(None,) * (missing * size)), (*kv_heads, *(None,) * missing)
