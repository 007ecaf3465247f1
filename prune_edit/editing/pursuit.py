"""Which few units to change: orthogonal matching pursuit over their first-order effects."""

from __future__ import annotations

import torch


def leading(slopes: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the `count` units whose slopes (P, C, 2) are the largest, ascending."""
    sizes = slopes.pow(2).sum((0, 2))
    return sizes.argsort(descending=True, stable=True)[:count].sort().values


def pursue(
    columns: torch.Tensor,
    target: torch.Tensor,
    ridge: float,
    kinds: torch.Tensor,
    most: tuple[int, int],
) -> list[int]:
    """The units whose columns (R, C, 2) together come nearest to the target (R,).

    One after the other, each time the one with the largest gain beside those chosen (Pati,
    Rezaiifar and Krishnaprasad, 1993, for pairs of columns), `ridge` added to their squared sizes.
    `kinds` (C,) is 0 or 1, and of each kind there are at most `most`. Ascending places among the C.
    """
    rest, left = columns.clone(), target.clone()
    free = torch.ones(columns.shape[1], dtype=torch.bool)
    counts = [0, 0]
    chosen: list[int] = []
    for _ in range(min(sum(most), columns.shape[1])):
        for kind in (0, 1):
            if counts[kind] >= most[kind]:
                free &= kinds != kind
        sides = torch.einsum("rcj,r->cj", rest, left)
        squares = torch.einsum("rcj,rck->cjk", rest, rest) + ridge * torch.eye(2)
        gains = (sides * torch.linalg.solve(squares, sides)).sum(1).masked_fill(~free, -1.0)
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        chosen.append(best)
        counts[int(kinds[best])] += 1
        free[best] = False
        basis = _orthonormal(rest[:, best])
        rest -= torch.einsum("rk,kcj->rcj", basis, torch.einsum("rk,rcj->kcj", basis, rest))
        left -= basis @ (basis.T @ left)
    return sorted(chosen)


def _orthonormal(pair: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (R, 1 or 2) of what two columns (R, 2) span."""
    vectors, sizes, _ = torch.linalg.svd(pair, full_matrices=False)
    basis: torch.Tensor = vectors[:, sizes > 1e-6 * sizes[0]]
    return basis
