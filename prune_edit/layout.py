"""Layout: which of the base model's units a checkpoint holds, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prune_edit.errors import ModelError, PlanError
from prune_edit.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCHEMA_VERSION = 1

Kept = tuple[tuple[int, ...], ...]
"""Per layer, the ascending original indices of the kept units."""


@dataclass(frozen=True)
class Layout:
    """The units each layer holds, as ascending indices of the base model.

    `n_heads`, `n_kv_heads` and `n_neurons` are the base model's a layer. `slots` and `kv_heads`
    say what is physically there, in the order of the weights.
    """

    n_heads: int
    n_kv_heads: int
    n_neurons: int
    heads: Kept
    neurons: Kept

    def __post_init__(self) -> None:
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

    @cached_property
    def kv_heads(self) -> Kept:
        """Per layer, the KV heads there: those that at least one kept query head uses."""
        group = self.n_heads // self.n_kv_heads
        return tuple(tuple(sorted({head // group for head in kept})) for kept in self.heads)

    @cached_property
    def slots(self) -> tuple[tuple[int | None, ...], ...]:
        """Per layer, the query heads in physical order; None is a pad.

        Groups must be equal in size, so a short one is padded with dead heads at its end.
        """
        group = self.n_heads // self.n_kv_heads
        layers = []
        for kept, kv_heads in zip(self.heads, self.kv_heads, strict=True):
            groups = [[head for head in kept if head // group == kv] for kv in kv_heads]
            size = max(map(len, groups), default=0)
            padded = (have + [None] * (size - len(have)) for have in groups)
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
            heads, neurons = tuple(range(base[0])), tuple(range(base[2]))
            return cls(*base, (heads,) * layers, (neurons,) * layers)
        try:
            block = fields["prune_edit"]
            if block["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"config.json: prune_edit schema {block['schema']}, this version reads "
                    f"{SCHEMA_VERSION}; prune the base model again"
                )
            return cls(
                *base_sizes(fields, family),
                tuple(map(tuple, block["heads"])),
                tuple(map(tuple, block["neurons"])),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"config.json: a {family.model_type} without a whole prune_edit block "
                f"({error!r}); prune the base model again"
            ) from None

    def keep(self, heads: Kept, neurons: Kept) -> Layout:
        """The layout of the same base model with these units."""
        return Layout(self.n_heads, self.n_kv_heads, self.n_neurons, heads, neurons)

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


def base_sizes(config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Query heads, KV heads and FFN width a layer of the base model."""
    if family.model_type != family.base_type:
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
