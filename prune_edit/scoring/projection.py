"""What the top units say: their vectors read through the unembedding, softmax(E_u v).

arXiv 2409.14144, section 4 (vocabulary projection). A neuron adds its coefficient times its value
vector, so one whose mean coefficient over the answers is negative promotes what lies at the
*bottom* of its value's projection: for it the tokens shown are those of -v. A head has no vector of
its own; shown is its mean output at the answers, which is what it adds to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture
from prune_edit.running import stream
from prune_edit.scoring.options import Options
from prune_edit.scoring.scores import Scores
from prune_edit.streamed import resident
from prune_edit.tasks.prompts import Encoded

TOKENS = 8


@dataclass(frozen=True)
class TopUnit:
    """A head (17^22) or neuron (28_3696), its score, and the tokens it promotes.

    `coefficient` is a neuron's mean over the answer tokens, None for a head; `tokens` are the
    likeliest with their probabilities.
    """

    name: str
    layer: int
    unit: int
    score: float
    coefficient: float | None
    tokens: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "tokens": [list(pair) for pair in self.tokens]}


@dataclass(frozen=True)
class TopUnits:
    """The highest scored heads and neurons, best first."""

    heads: tuple[TopUnit, ...]
    neurons: tuple[TopUnit, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: [unit.to_dict() for unit in units] for name, units in vars(self).items()}


@torch.no_grad()
def top_units(
    decoder: Decoder, scores: Scores, prompts: Sequence[Encoded], options: Options, count: int
) -> TopUnits:
    """The `count` highest scored heads and neurons with their vocabulary projections."""
    inputs, coefficients = _means(decoder, prompts, options)
    heads, neurons = (
        [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in _top(scores, count)]
        for scores in (scores.heads, scores.neurons)
    )
    found_heads = []
    for layer, head in heads:
        slot = decoder.head_slots[layer].tolist().index(head)
        part = slice(slot * decoder.head_dim, (slot + 1) * decoder.head_dim)
        projection = decoder.attention_output(layer)
        assert projection is not None
        with resident(decoder, layer):
            weight = decoder.output_weight(projection)[part]  # (E, D)
            vector = inputs[layer][part].to(weight) @ weight
        if (norm := decoder.attention_output_norm(layer)) is not None:
            vector = vector.float() * decoder.norm_weight(norm)
        tokens = project(decoder, vector)
        score = float(scores.heads[layer, head])
        found_heads.append(TopUnit(f"{layer}^{head}", layer, head, score, None, tokens))
    found_neurons = []
    for layer, neuron in neurons:
        slot = decoder.neuron_slots[layer].tolist().index(neuron)
        mean = float(coefficients[layer][slot])
        with resident(decoder, layer):
            value = decoder.residual_values(layer)[slot].clone()
        tokens = project(decoder, -value if mean < 0 else value)
        score = float(scores.neurons[layer, neuron])
        found_neurons.append(TopUnit(f"{layer}_{neuron}", layer, neuron, score, mean, tokens))
    return TopUnits(tuple(found_heads), tuple(found_neurons))


def project(
    decoder: Decoder, vector: torch.Tensor, count: int = TOKENS
) -> tuple[tuple[str, float], ...]:
    """The likeliest tokens of softmax(E_u v) with their probabilities, for a vector (D,)."""
    chances = (decoder.unembedding.float() @ vector.float()).softmax(-1)
    best = chances.topk(min(count, len(chances)))
    return tuple(
        (str(decoder.tokenizer.decode([token])), float(chance))
        for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def _top(scores: torch.Tensor, count: int) -> list[int]:
    """Flat numbers of the highest scores, absent units left out, the first of equals first."""
    flat = scores.flatten().double()
    order = flat.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return [i for i in order[:count].tolist() if not flat[i].isnan()]


def _means(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Per layer, means over the answer tokens: heads' outputs (slots * E), coefficients (n)."""
    sums: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = ({}, {})
    tokens = 0
    for batch in stream(decoder, prompts, options, "projections"):
        with capture(decoder, at=(batch.rows, batch.columns)) as seen:
            decoder.final_states(**batch.inputs)
        for total, states in zip(sums, (seen.heads, seen.coefficients), strict=True):
            for layer, state in states.items():
                part = state.double().sum(0).cpu()
                total[layer] = total.get(layer, 0) + part
        tokens += len(batch.targets)
    heads, neurons = (
        {layer: total / max(1, tokens) for layer, total in each.items()} for each in sums
    )
    return heads, neurons
