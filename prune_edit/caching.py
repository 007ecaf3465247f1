"""The key-value cache of a causal language model, under the name its transformers version uses."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def prefill(model: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Run `ids` (B, T) and fill a cache: the model's output and the cache."""
    output = model(ids, use_cache=True, **options)
    return output, getattr(output, _name(model))


def decode(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    """Run the next `ids` (B, T) on a cache, which grows by them: the model's output."""
    return model(ids, use_cache=True, **{_name(model): cache})


def _name(model: Any) -> str:
    # transformers 5.24 calls `cache` what was `past_key_values`, and warns of the old name.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
