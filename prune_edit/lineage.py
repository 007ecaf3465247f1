"""Lineage: the models that a checkpoint was made from, the first one first."""

from __future__ import annotations

from typing import Any

from prune_edit.decoder import Decoder


def block_of(decoder: Decoder) -> dict[str, Any]:
    """What prune-edit wrote into the model's configuration; empty for a stock model."""
    block = getattr(decoder.model.config, "prune_edit", None)
    return dict(block) if isinstance(block, dict) else {}


def ancestors(block: dict[str, Any]) -> list[dict[str, str]]:
    """`model` and `digest` of all that a model with this block was made from, the first one first.

    A block without a lineage knows the last parent alone.
    """
    known = block.get("lineage")
    if isinstance(known, list):
        return [{"model": str(each["model"]), "digest": str(each["digest"])} for each in known]
    if block.get("base_digest"):
        return [{"model": str(block.get("base_model", "")), "digest": str(block["base_digest"])}]
    return []


def descent(block: dict[str, Any], name: str, digest: str, act: str) -> dict[str, Any]:
    """Provenance of what is `pruned` or `edited` from a model with this block: parent and all."""
    return {
        "base_model": name,
        "base_digest": digest,
        "lineage": [*ancestors(block), {"model": name, "digest": digest}],
        "act": act,
    }
