"""Scores of several tasks: the mean of what each task alone gives, by the tasks' weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_edit.scoring.scores import Scores
from prune_edit.scoring.shards import Part
from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Encoded


def weighted(score: Callable[[list[Encoded]], Part], prompts: Sequence[Encoded]) -> Part:
    """`score` of each task's prompts, and the mean by their weights; heads (L, H), neurons (L, N).

    One task's scores are its own, to the last bit.
    """
    parts = [(share, score(rows)) for _, share, rows in by_part(prompts)] or [(1.0, score([]))]
    heads, neurons = (_mean([(share, part[i]) for share, part in parts]) for i in range(2))
    return heads, neurons


def combined(parts: Sequence[tuple[float, Scores]], metadata: dict[str, str]) -> Scores:
    """Scores of several tasks as one, by shares of weight; `metadata` is taken over, the number of
    examples and what the first says of method and settings kept."""
    heads, neurons = (
        _mean([(share, getattr(scores, name)) for share, scores in parts])
        for name in ("heads", "neurons")
    )
    examples = sum(int(scores.metadata["examples"]) for _, scores in parts)
    named = {**parts[0][1].metadata, **metadata, "examples": str(examples)}
    return Scores(heads, neurons, named)


def _mean(parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.stack([share * scores.double() for share, scores in parts]).sum(0)
    return whole.to(parts[0][1].dtype)
