"""Units: a number for every head and neuron, in the base model's coordinates.

L layers, H query heads a layer, N neurons a layer. Ablating, pruning, scaling and editing are all
one act: the input of the attention output projection is multiplied per head, that of the FFN
output projection per neuron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Units:
    """Factors: `heads` is (L, H) or (B, L, H), `neurons` (L, N) or (B, L, N); None leaves alone."""

    heads: torch.Tensor | None = None
    neurons: torch.Tensor | None = None

    @classmethod
    def without_heads(cls, shape: tuple[int, int], heads: torch.Tensor) -> Units:
        """Zero for `heads`, (B, K) flat numbers per example or (K,) for all; one elsewhere."""
        layers, width = shape
        factors = torch.ones(*heads.shape[:-1], layers * width)
        factors.scatter_(-1, heads, 0.0)
        return cls(heads=factors.unflatten(-1, (layers, width)))
