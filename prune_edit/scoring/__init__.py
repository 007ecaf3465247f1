"""Scoring: what every head and neuron is worth for a task, one file a method, one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.running import Progress, silent
from prune_edit.scoring.activation import activation_of, activation_sums, score_activation
from prune_edit.scoring.adapter import load_adapter
from prune_edit.scoring.baselines import score_magnitude, score_random
from prune_edit.scoring.cases import score_cases
from prune_edit.scoring.circuit import score_circuit
from prune_edit.scoring.contrast import contrast_sides, score_cna, score_importance
from prune_edit.scoring.flap import flap_of, score_flap
from prune_edit.scoring.intervention import score_intervention
from prune_edit.scoring.options import Options, predicted_targets
from prune_edit.scoring.query import score_query
from prune_edit.scoring.scores import Scores
from prune_edit.scoring.shards import Additive, Part, Tensors, answer_tokens, examples, weighed
from prune_edit.scoring.statistics import Moments, moments
from prune_edit.scoring.taylor import score_taylor
from prune_edit.scoring.wanda import score_wanda, wanda_of
from prune_edit.tasks.prompts import Encoded

Method = Callable[[Decoder, Sequence[Encoded], Options], tuple[torch.Tensor, torch.Tensor]]
"""`(decoder, prompts, options) -> heads (L, H), neurons (L, N)`."""

METHODS: dict[str, Method] = {
    "cna": score_cna,
    "circuit": score_circuit,
    "cna-cases": score_cases,
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

_MOMENTS = ("wanda", "flap")


def additive(method: str, options: Options, score: Method | None = None) -> Additive | None:
    """How a method's scores add up over prompts, or None where they do not.

    `score` takes the method's place where the model needs another way to the same scores. `query`
    traces, `cna-cases` ranks by, and `top_neurons` bounds, what is best over all prompts; a mean
    ablation replaces a unit by its mean over all prompts, unless the options have it.
    """
    score = score or METHODS[method]
    if options.top_neurons:
        return None
    if method == "intervention" and options.ablation == "mean" and options.means is None:
        return None
    if method == "cna" and (options.contrast or options.adapted):
        return _two_sided(weighed(METHODS["importance"], examples, answer_tokens))
    if method in ("cna", "importance"):
        return weighed(score, examples, answer_tokens)
    if method in ("intervention", "taylor"):
        return weighed(score, examples, examples)
    if method in _MOMENTS:
        finish = {"wanda": wanda_of, "flap": flap_of}[method]
        return Additive(MOMENTS.collect, lambda decoder, sums: finish(decoder, Moments.of(sums)))
    if method == "activation":
        return Additive(activation_sums, activation_of)
    return None


def _two_sided(one: Additive) -> Additive:
    """CNA between two inputs or models: each side's sums, which may weigh differently."""

    def collect(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> Tensors:
        sides = contrast_sides(decoder, prompts, options)
        found = [one.collect(*side) for side in sides]
        return {f"{i} {name}": each for i, side in enumerate(found) for name, each in side.items()}

    def finish(decoder: Decoder, sums: Tensors) -> Part:
        sides = [
            one.finish(decoder, {k[2:]: each for k, each in sums.items() if k.startswith(f"{i} ")})
            for i in range(2)
        ]
        (heads, neurons), (other_heads, other_neurons) = sides
        return heads - other_heads, neurons - other_neurons

    return Additive(collect, finish)


MOMENTS = Additive(
    lambda decoder, prompts, options: moments(decoder, prompts, options, "means").tensors(),
    lambda decoder, sums: (torch.zeros(0), torch.zeros(0)),
)
"""What means over all prompts are made of."""

__all__ = [
    "METHODS",
    "MOMENTS",
    "Method",
    "Options",
    "Progress",
    "Scores",
    "additive",
    "load_adapter",
    "predicted_targets",
    "silent",
]
