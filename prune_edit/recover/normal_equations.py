"""The normal equations of one linear map, summed over batches and solved with a chosen ridge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

RIDGE = 1e-4  # of the mean square of an input, times the tokens' weight
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e6)  # the last changes nothing
_PLENTY = 10  # tokens an unknown, with which the first will do


@dataclass
class _Sums:
    """Products of inputs (n, n), of inputs and what lacks (n, D), the latter's square, tokens."""

    square: torch.Tensor | float = 0.0
    product: torch.Tensor | float = 0.0
    lacking: float = 0.0
    tokens: int = 0

    def add(self, x: torch.Tensor, lacking: torch.Tensor, weights: torch.Tensor) -> None:
        weighed = (x * weights[:, None]).T
        # Products of some thousand tokens in float32, their sums in float64.
        self.square = self.square + (weighed @ x).double().cpu()
        self.product = self.product + (weighed @ lacking).double().cpu()
        self.lacking += float((weights[:, None] * lacking.square()).sum())
        self.tokens += len(x)

    def left_over(self, change: torch.Tensor) -> float:
        """What still lacks after a change (n, D), squared and weighed."""
        assert isinstance(self.square, torch.Tensor) and isinstance(self.product, torch.Tensor)
        moved = change * (self.square @ change - 2 * self.product)
        return self.lacking + float(moved.sum())


@dataclass
class NormalEquations:
    """Inputs X (tokens, n), a column of ones behind where there is a `constant`, and what lacks.

    The change that makes up for it is `(X^T W X + ridge) ^ -1 X^T W E`: of the smallest size, so
    that what the data do not ask for stays.
    """

    constant: bool
    most: _Sums = field(default_factory=_Sums)
    rest: _Sums = field(default_factory=_Sums)

    def add(
        self,
        inputs: torch.Tensor | None,
        lacking: torch.Tensor,
        weights: torch.Tensor,
        held: torch.Tensor,
    ) -> None:
        """A batch: inputs (B, T, n) or none, what lacks (B, T, D), weights and held out (B, T)."""
        real = weights > 0
        columns = [] if inputs is None else [inputs.float()]
        if self.constant:
            columns.append(torch.ones(*weights.shape, 1, device=weights.device))
        x = torch.cat(columns, -1)
        for sums, which in ((self.most, real & ~held), (self.rest, real & held)):
            if bool(which.any()):
                sums.add(x[which], lacking[which].float(), weights[which])

    @property
    def square(self) -> torch.Tensor:
        """X^T W X over all batches, (n, n) float64."""
        found = self.most.square + self.rest.square
        assert isinstance(found, torch.Tensor)
        return found

    def solve(
        self,
        ridge: float | None = None,
        shaped: Callable[[torch.Tensor], torch.Tensor] = lambda change: change,
    ) -> torch.Tensor:
        """The change (n, D), float64; without a `ridge`, with the one that serves best.

        `shaped` is what becomes of a change before it is used, and so before it is judged.
        """
        if ridge is None:
            ridge = self._best_ridge(shaped)
        product = self.most.product + self.rest.product
        assert isinstance(product, torch.Tensor)
        return shaped(self._solve(self.square, product, ridge))

    def _best_ridge(self, shaped: Callable[[torch.Tensor], torch.Tensor]) -> float:
        most, rest = self.most, self.rest
        if most.tokens + rest.tokens >= _PLENTY * len(self.square):
            return RIDGE
        if not rest.tokens or not most.tokens:
            return _RIDGES[-1]
        assert isinstance(most.square, torch.Tensor) and isinstance(most.product, torch.Tensor)
        square, product = most.square, most.product
        return min(
            _RIDGES,
            key=lambda each: rest.left_over(shaped(self._solve(square, product, each))),
        )

    def _solve(self, square: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
        size = square.diagonal().mean().clamp(min=1e-30)
        penalty = torch.full((len(square),), float(ridge * size), dtype=torch.float64)
        if self.constant:
            penalty[-1] = 1e-8 * size  # a constant is not shrunk
        found: torch.Tensor = torch.linalg.solve(square + penalty.diag(), product)
        return found
