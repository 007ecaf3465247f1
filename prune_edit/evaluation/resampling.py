"""Intervals by resampling: of one figure, and of two models' figures on the same examples.

A figure is a formula of weighted sums over rows, so that a thousand resamples are one product:
N rows, K numbers a row, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 22  # numbers of the matrix of counts
_LARGEST = 700.0  # exp of more is no float

Interval = tuple[float, float]
Formula = Callable[[torch.Tensor], torch.Tensor]


def mean(sums: torch.Tensor) -> torch.Tensor:
    """Of sums (R, 2) of values and of their number."""
    return sums[:, 0] / sums[:, 1]


def exp_mean(sums: torch.Tensor) -> torch.Tensor:
    """Perplexity, of sums (R, 2) of nats and of tokens."""
    return (sums[:, 0] / sums[:, 1]).clamp(max=_LARGEST).exp()


def gap(sums: torch.Tensor) -> torch.Tensor:
    """The difference of two means, of sums (R, 4)."""
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]


def correlation(sums: torch.Tensor) -> torch.Tensor:
    """Pearson's, of sums (R, 6) of 1, x, y, xx, yy, xy; 0 where either is constant."""
    n, x, y, xx, yy, xy = sums.unbind(1)
    spread = (n * xx - x * x).clamp(min=0) * (n * yy - y * y).clamp(min=0)
    found = (n * xy - x * y) / spread.sqrt()
    return torch.where(spread > 0, found, torch.zeros_like(found)).clamp(-1, 1)


@dataclass(frozen=True)
class Rows:
    """What a figure is computed from: `columns` (N, K) float64, a row a cluster, and the formula.

    `share` where the figure is the mean of zeros and ones, `counts` its hits and total.
    """

    columns: torch.Tensor
    formula: Formula
    share: bool = False

    @classmethod
    def of(
        cls,
        columns: Sequence[Sequence[float]],
        formula: Formula,
        clusters: Sequence[object] | None = None,
        share: bool = False,
    ) -> Rows:
        """Rows of examples, those of one cluster summed: they are resampled together."""
        table = torch.tensor(columns, dtype=torch.float64)
        if clusters is not None and len(set(clusters)) < len(clusters):
            places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
            index = torch.tensor([places[name] for name in clusters])
            summed = torch.zeros(len(places), table.shape[1], dtype=torch.float64)
            table = summed.index_add_(0, index, table)
        return cls(table, formula, share)

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.formula(self.columns.sum(0, keepdim=True)))


def resampled(rows: Sequence[Rows], seed: int, resamples: int = RESAMPLES) -> list[torch.Tensor]:
    """The figure of each of several models on the same resamples (R,); rows must be as many."""
    count = len(rows[0].columns)
    generator = torch.Generator().manual_seed(seed)
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    step = max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        drawn = torch.randint(count, (some, count), generator=generator)
        weights = torch.zeros(some, count, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        for values, each in zip(found, rows, strict=True):
            values.append(each.formula(weights @ each.columns))
    return [torch.cat(values) for values in found]


def quantiles(values: torch.Tensor, level: float = LEVEL) -> Interval:
    """The percentile interval; resamples without a value (0 of 0) are left out."""
    values = values[~values.isnan()].sort().values
    if not len(values):
        return float("nan"), float("nan")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = torch.quantile(values, ends).tolist()
    return low, high


def paired_share_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of a difference of two shares on the same examples, never of no width.

    Bonett and Price (2012), doi 10.3102/1076998611411915: one example is added to either side of
    those on which the two disagree. Resampling alone calls two models that agree on ten examples
    equal beyond doubt.
    """
    n = len(one) + 2
    gained = (sum(a > b for a, b in zip(one, other, strict=True)) + 1) / n
    lost = (sum(a < b for a, b in zip(one, other, strict=True)) + 1) / n
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    middle = gained - lost
    half = z * ((gained + lost - middle * middle) / n) ** 0.5
    return max(-1.0, middle - half), min(1.0, middle + half)


def hull(*intervals: Interval) -> Interval:
    """From the lowest to the highest end."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)
