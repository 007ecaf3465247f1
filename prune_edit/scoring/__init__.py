"""Scoring: what every head and neuron is worth for a task, one file a method, one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.running import Progress, silent
from prune_edit.scoring.activation import score_activation
from prune_edit.scoring.adapter import load_adapter
from prune_edit.scoring.baselines import score_magnitude, score_random
from prune_edit.scoring.contrast import score_cna, score_importance
from prune_edit.scoring.flap import score_flap
from prune_edit.scoring.intervention import score_intervention
from prune_edit.scoring.options import Options, predicted_targets
from prune_edit.scoring.query import score_query
from prune_edit.scoring.scores import Scores
from prune_edit.scoring.taylor import score_taylor
from prune_edit.scoring.wanda import score_wanda
from prune_edit.tasks.prompts import Encoded

Method = Callable[[Decoder, Sequence[Encoded], Options], tuple[torch.Tensor, torch.Tensor]]
"""`(decoder, prompts, options) -> heads (L, H), neurons (L, N)`."""

METHODS: dict[str, Method] = {
    "cna": score_cna,
    "importance": score_importance,
    "intervention": score_intervention,
    "query": score_query,
    "taylor": score_taylor,
    "wanda": score_wanda,
    "flap": score_flap,
    "activation": score_activation,
    "magnitude": score_magnitude,
    "random": score_random,
}

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "Progress",
    "Scores",
    "load_adapter",
    "predicted_targets",
    "silent",
]
