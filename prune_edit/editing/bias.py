"""Bias on contrast pairs: how much likelier the answer is after the stereotyped prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.probe import Probe, probe_pairs
from prune_edit.running import Running
from prune_edit.tasks.task import Example

_RESAMPLES = 1000
_FLIPS = 10_000


@dataclass(frozen=True)
class Bias:
    """Mean `log p(answer | prompt) - log p(answer | contrast)` in nats, per group and over all.

    `size` is the mean of the gaps' absolute values: a mean can be small because opposite gaps
    cancel, and this cannot. `gaps` are the pairs'.
    """

    value: float
    interval: tuple[float, float]
    groups: dict[str, float]
    size: float = 0.0
    gaps: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the single gaps."""
        return {
            "nats": self.value,
            "interval": list(self.interval),
            "absolute": self.size,
            "groups": self.groups,
            "pairs": len(self.gaps),
        }


@torch.no_grad()
def measure_bias(
    decoder: Decoder, pairs: Sequence[Example] | Probe, options: Running | None = None
) -> Bias:
    """The pairs' bias, with a 95 % bootstrap interval over prompts and answers."""
    probe = pairs if isinstance(pairs, Probe) else probe_pairs(decoder, pairs)
    gaps = probe.gaps(decoder).double()
    groups: dict[str, list[float]] = {}
    for pair, gap in zip(probe.pairs, gaps.tolist(), strict=True):
        groups.setdefault(pair.group, []).append(gap)
    return Bias(
        float(gaps.mean()),
        bootstrap(probe.pairs, gaps),
        {name: fmean(found) for name, found in sorted(groups.items())},
        float(gaps.abs().mean()),
        tuple(gaps.tolist()),
    )


def bootstrap(pairs: Sequence[Example], values: torch.Tensor) -> tuple[float, float]:
    """A 95 % interval of the mean of values (P,), prompts and answers both drawn anew.

    Pairs share prompts and answers, so drawing pairs would promise too much (the pigeonhole
    bootstrap of Owen, 2007, counts a pair as often as its prompt times as its answer is drawn).
    Where pairs have keys, or two answers of one prompt are compared, `unit_of` is drawn.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(_RESAMPLES, len(pairs), dtype=torch.float64)
    for keys in _drawn(pairs):
        names = sorted(set(keys))
        if len(names) < 2:
            continue
        drawn = torch.randint(len(names), (_RESAMPLES, len(names)), generator=generator)
        counts = torch.zeros(_RESAMPLES, len(names), dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        places = {name: i for i, name in enumerate(names)}
        weights *= counts[:, [places[key] for key in keys]]
    total = weights.sum(1)
    means = (weights @ values.double())[total > 0] / total[total > 0]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    middle = float(values.double().mean())
    return min(low, middle), max(high, middle)


def _drawn(pairs: Sequence[Example]) -> list[list[str]]:
    if any(pair.key or pair.contrast is None for pair in pairs):
        return [units_of(pairs)]
    return [[_prompt(pair) for pair in pairs], [pair.answer for pair in pairs]]


def _prompt(pair: Example) -> str:
    return "\x1f".join(sorted((pair.prompt, pair.contrast or "")))


def units_of(pairs: Sequence[Example]) -> list[str]:
    """Of every pair what it stands for: pairs of one unit are not independent of each other.

    The pair's `key` where it has one, such as the profession that a pronoun follows; else the
    answer; the prompt where all pairs have one answer, or where answers to one prompt are compared.
    """
    by_answer = len({pair.answer for pair in pairs}) > 1
    return [
        f"{pair.group}\x1f{pair.key}" if pair.key
        else f"{pair.group}\x1f{pair.answer}" if by_answer and pair.contrast is not None
        else _prompt(pair)
        for pair in pairs
    ]  # fmt: skip


def paired_test(pairs: Sequence[Example], changes: Sequence[float]) -> float:
    """The p-value of a mean change as large as this, were its sign chance (sign flips by unit).

    The changes of one unit flip together, since they are not independent of each other.
    """
    sums: dict[str, float] = {}
    for unit, change in zip(units_of(pairs), changes, strict=True):
        sums[unit] = sums.get(unit, 0.0) + change
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_FLIPS, len(values)), generator=generator).double() * 2 - 1
    extreme = ((signs @ values).abs() >= values.sum().abs() - 1e-12).sum()
    return float((extreme + 1) / (_FLIPS + 1))
