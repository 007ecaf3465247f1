"""Scoring: what every head and neuron is worth for a task, one file a method, one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.baselines import score_magnitude, score_random
from prune_edit.scoring.cna import score_cna, score_importance
from prune_edit.scoring.scores import Scores
from prune_edit.scoring.streaming import Options, Progress, predicted_targets, silent
from prune_edit.tasks.prompts import Encoded

Method = Callable[[Decoder, Sequence[Encoded], Options], tuple[torch.Tensor, torch.Tensor]]
"""`(decoder, prompts, options) -> heads (L, H), neurons (L, N)`."""

METHODS: dict[str, Method] = {
    "cna": score_cna,
    "importance": score_importance,
    "magnitude": score_magnitude,
    "random": score_random,
}

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "Progress",
    "Scores",
    "predicted_targets",
    "silent",
]
