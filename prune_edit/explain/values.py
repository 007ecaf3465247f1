"""Shown: a frozen value of an explanation, with a JSON form and a picture in a notebook."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, ClassVar

import torch

from prune_edit.report.explained import fragment

Grid = tuple[tuple[float | None, ...], ...]
"""A number for every layer and head; None where the model has no such head."""
Tokens = tuple[tuple[str, float], ...]
"""Tokens with their probabilities, likeliest first."""


class Shown:
    """What all values of an explanation can do. A subclass is a frozen dataclass.

    Fields with `metadata={"json": False}` stay out of JSON.
    """

    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not a finite number is null."""
        own = fields(self)  # type: ignore[arg-type]
        return {
            each.name: plain(getattr(self, each.name))
            for each in own
            if each.metadata.get("json", True)
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: the page's section."""
        return fragment(self.kind, self.to_dict())


def plain(value: Any) -> Any:
    """Any part of an explanation as JSON's own types."""
    if isinstance(value, Shown):
        return value.to_dict()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return value


def grid_of(numbers: torch.Tensor) -> Grid:
    """A (L, H) tensor as plain numbers, NaN as None."""
    return tuple(
        tuple(None if math.isnan(each) else float(each) for each in row)
        for row in numbers.double().tolist()
    )


def best_of(numbers: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Layers and units of the highest of (L, U) numbers, NaN left out, of equals the first."""
    flat = numbers.flatten().double()
    order = flat.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    width = numbers.shape[1]
    return [(i // width, i % width) for i in order[:count].tolist() if not flat[i].isnan()]


def deep_layers(decoder_layers: int) -> range:
    """The layers that predict, where nothing else is said: 17 to 31 of 32, as in the paper."""
    return range(min(decoder_layers - 1, decoder_layers // 2 + 1), decoder_layers)


def shallow_layers(decoder_layers: int) -> range:
    """The layers that prepare: 0 to 15 of 32, as in the paper."""
    return range(max(1, decoder_layers // 2))
