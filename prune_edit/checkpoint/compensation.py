"""Compensation: the constants that stand in for what was removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compensation:
    """Per layer, what to add to the attention's and the FFN's output: (D,), or None for nothing."""

    attention: tuple[torch.Tensor | None, ...]
    ffn: tuple[torch.Tensor | None, ...]
