"""Bias on contrast pairs: how much likelier the answer is after the stereotyped prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import answer_sums
from prune_edit.running import Running
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Example

_RESAMPLES = 1000


@dataclass(frozen=True)
class Bias:
    """Mean `log p(answer | prompt) - log p(answer | contrast)` in nats, per group and over all."""

    value: float
    interval: tuple[float, float]
    groups: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"nats": self.value, "interval": list(self.interval), "groups": self.groups}


def measure_bias(decoder: Decoder, pairs: Sequence[Example], options: Running) -> Bias:
    """The pairs' bias, with a 95 % bootstrap interval over the pairs."""
    sides = []
    for rows in (pairs, [replace(pair, prompt=str(pair.contrast)) for pair in pairs]):
        encoded = encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
        sides.append(answer_sums(decoder, encoded, options))
    gaps = [a - b for a, b in zip(*sides, strict=True)]
    groups: dict[str, list[float]] = {}
    for pair, gap in zip(pairs, gaps, strict=True):
        groups.setdefault(pair.group, []).append(gap)
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(gaps, k=len(gaps))) for _ in range(_RESAMPLES))
    interval = means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
    return Bias(fmean(gaps), interval, {k: fmean(v) for k, v in sorted(groups.items())})
