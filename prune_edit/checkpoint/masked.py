"""The masked form: the base model's shapes, zeros where units were removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prune_edit.checkpoint.stock import Stock, stock_tensors, stocks, whole
from prune_edit.families import Family
from prune_edit.layout import SCHEMA_VERSION, Layout, origin


def masked_tensors(
    family: Family, config: Mapping[str, Any], source: Mapping[str, torch.Tensor], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a ragged model at its base shape; sorted by name, one at a time.

    `config` is the ragged (or stock) model's, `layout` what `source` holds. Raises PlanError as
    `masked_config`.
    """
    yield from stock_tensors(_stock(config, family, layout), source, layout, whole(layout))


def masked_config(
    config: Mapping[str, Any], family: Family, layout: Layout, *, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The stock configuration for `masked_tensors`, with a `prune_edit` block that says whence.

    Raises PlanError where the model has output biases that no stock architecture can have.
    """
    fields = _stock(config, family, layout).sized(
        layout.n_heads, layout.n_kv_heads, layout.n_neurons
    )
    fields["prune_edit"] = {
        **origin(config),
        **provenance,
        "schema": SCHEMA_VERSION,
        "format": "masked",
        "heads": [list(kept) for kept in layout.heads],
        "neurons": [list(kept) for kept in layout.neurons],
        **_zeroed_before(config, layout),
    }
    return fields


def _zeroed_before(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What a masked or uniform checkpoint's block says of its units, where all its slots stay."""
    block = config.get("prune_edit") or {}
    if not layout.full or block.get("format") not in ("masked", "uniform"):
        return {}
    keys = ("format", "heads", "neurons", "kv", "slots", "alive_heads", "alive_neurons")
    return {key: block[key] for key in keys if key in block}


def _stock(config: Mapping[str, Any], family: Family, layout: Layout) -> Stock:
    found = stocks(config, family)
    return next((stock for stock in found if stock.accepts(layout.n_heads)), found[0])
