"""Layout: which of the base model's units a checkpoint holds, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from prune_edit.errors import ModelError, PlanError
from prune_edit.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCHEMA_VERSION = 1

Kept = tuple[tuple[int, ...], ...]
"""Per layer, the ascending original indices of the kept units."""


Order = tuple[tuple[int | None, ...], ...]
"""Per layer, the units along an axis in physical order; None where there is nothing but zeros."""


class Physical(Protocol):
    """What tensors hold along their axes, whatever decided it: a Layout, or a padded one."""

    @property
    def n_heads(self) -> int:
        """H of the base model."""

    @property
    def n_kv_heads(self) -> int:
        """K of the base model."""

    @property
    def slots(self) -> Order:
        """Query heads."""

    @property
    def kv_heads(self) -> Order:
        """KV heads, each of as many query heads as any other of its layer."""

    @property
    def neurons(self) -> Order:
        """FFN neurons."""


@dataclass(frozen=True)
class Layout:
    """The units each layer holds, as ascending indices of the base model.

    `n_heads`, `n_kv_heads` and `n_neurons` are the base model's a layer. `slots` and `kv_heads`
    say what is physically there, in the order of the weights. Groups of query heads must be equal
    in size: with `kv` "pad" short ones are padded, with "duplicate" keys and values are repeated
    instead.
    """

    n_heads: int
    n_kv_heads: int
    n_neurons: int
    heads: Kept
    neurons: Kept
    kv: str = "pad"

    def __post_init__(self) -> None:
        if self.kv not in ("pad", "duplicate"):
            raise PlanError(f"a layout's kv is {self.kv!r}, neither pad nor duplicate")
        if self.n_heads % self.n_kv_heads:
            raise PlanError(
                f"{self.n_heads} query heads do not share {self.n_kv_heads} KV heads evenly"
            )

    @property
    def n_layers(self) -> int:
        """Layers."""
        return len(self.heads)

    @property
    def full(self) -> bool:
        """Whether every unit of the base model is there."""
        return all(len(kept) == self.n_heads for kept in self.heads) and all(
            len(kept) == self.n_neurons for kept in self.neurons
        )

    def groups(self, layer: int) -> dict[int, tuple[int, ...]]:
        """A layer's kept query heads by the KV head they use."""
        size = self.n_heads // self.n_kv_heads
        kept = self.heads[layer]
        return {
            kv: tuple(head for head in kept if head // size == kv)
            for kv in sorted({head // size for head in kept})
        }

    @cached_property
    def kv_heads(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the KV heads there: those that at least one kept query head uses."""
        layers = []
        for layer in range(self.n_layers):
            groups = self.groups(layer)
            each = math.gcd(*map(len, groups.values())) if self.kv == "duplicate" else 0
            layers.append(
                tuple(
                    kv
                    for kv, heads in groups.items()
                    for _ in range(len(heads) // each if each else 1)
                )
            )
        return tuple(layers)

    @cached_property
    def slots(self) -> Order:
        """Per layer, the query heads in physical order; None is a pad, at the end of its group."""
        layers: list[tuple[int | None, ...]] = []
        for layer in range(self.n_layers):
            groups = self.groups(layer).values()
            size = 0 if self.kv == "duplicate" else max(map(len, groups), default=0)
            padded = ((*have, *(None,) * (size - len(have))) for have in groups)
            layers.append(tuple(slot for have in padded for slot in have))
        return tuple(layers)

    @classmethod
    def of_config(cls, config: PretrainedConfig | Mapping[str, Any]) -> Layout:
        """The layout of a stock model (everything is there) or a pruned one.

        A masked checkpoint is a stock model: its zeroed units are there. Raises ModelError where
        a size is missing, PlanError where a pruned configuration lacks what prune-edit wrote.
        """
        fields = config if isinstance(config, Mapping) else config.to_dict()
        family = family_of(str(fields.get("model_type")))
        if family.model_type == family.base_type:
            try:
                base, layers = base_sizes(fields, family), fields[family.layers_key]
            except KeyError as error:
                raise ModelError(f"config.json lacks {error}; give a whole model folder") from None
            every = tuple(range(base[0])), tuple(range(base[2]))
            return cls(*base, (every[0],) * layers, (every[1],) * layers)
        try:
            block = fields["prune_edit"]
            if block["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"config.json: prune_edit schema {block['schema']}, this version reads "
                    f"{SCHEMA_VERSION}; prune the base model again"
                )
            base = base_sizes(fields, family)
            heads = kept_of(block, "heads", base[0])
            neurons = kept_of(block, "neurons", base[2])
            return cls(*base, heads, neurons, block.get("kv", "pad"))
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"config.json: a {family.model_type} without a whole prune_edit block "
                f"({error!r}); prune the base model again"
            ) from None

    def keep(self, heads: Kept, neurons: Kept) -> Layout:
        """The layout of the same base model with these units."""
        return replace(self, heads=heads, neurons=neurons)

    def check_within(self, have: Layout) -> None:
        """Raise PlanError unless `have` holds all units of this layout, for the same base model."""
        for name in ("n_heads", "n_kv_heads", "n_neurons", "n_layers"):
            wanted, there = getattr(self, name), getattr(have, name)
            if wanted != there:
                raise PlanError(
                    f"the plan is for a base model with {name} {wanted}, this one has {there}; "
                    "use the model the plan was made for"
                )
        for kind in ("heads", "neurons"):
            for layer, (wanted, there) in enumerate(
                zip(getattr(self, kind), getattr(have, kind), strict=True)
            ):
                if lacking := sorted(set(wanted) - set(there)):
                    raise PlanError(
                        f"layer {layer}: the plan keeps {kind} {lacking[:5]}, which the model no "
                        "longer has; prune the base model instead"
                    )


def kept_of(block: Mapping[str, Any], key: str, width: int) -> Kept:
    """Units of every layer as a `prune_edit` block lists them. Raises PlanError, KeyError."""
    kept = block[key]
    if not isinstance(kept, list | tuple) or not all(
        isinstance(units, list | tuple) and all(type(unit) is int for unit in units)
        and list(units) == sorted(set(units)) and (not units or 0 <= units[0] <= units[-1] < width)
        for units in kept
    ):  # fmt: skip
        raise PlanError(
            f"config.json: prune_edit's {key} are no ascending numbers below {width} for every "
            "layer; prune the base model again"
        )
    return tuple(map(tuple, kept))


def origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's `prune_edit` block without what says how its tensors lie."""
    physical = ("format", "kv", "slots", "alive_heads", "alive_neurons")
    block = config.get("prune_edit") or {}
    return {key: value for key, value in block.items() if key not in physical}


def base_sizes(config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Query heads, KV heads and FFN width a layer of the base model."""
    if str(config.get("model_type")).startswith("pruned_"):
        base = config["prune_edit"]["base"]
        return (
            base["num_attention_heads"],
            base["num_key_value_heads"],
            base["intermediate_size"],
        )
    heads = config[family.heads_key]
    kv_heads = config.get(family.kv_heads_key) if family.kv_heads_key else None
    if family.single_kv_keys is not None:
        single, unless = map(config.get, family.single_kv_keys)
        kv_heads = 1 if single and not unless else kv_heads
    width = config.get(family.width_key)
    return heads, kv_heads or heads, width or 4 * hidden_size(config)


def hidden_size(config: Mapping[str, Any]) -> int:
    """D, under either of its names."""
    return int(config["hidden_size"] if "hidden_size" in config else config["n_embd"])


def head_dim(config: Mapping[str, Any], family: Family) -> int:
    """E, explicit or derived from the base model's head count."""
    return int(config.get("head_dim") or hidden_size(config) // base_sizes(config, family)[0])
