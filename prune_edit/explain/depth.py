"""Depth: where in the layers the answer's probability arises.

arXiv 2409.14144, section 4 (log-probability increase), for whole blocks: the log probability of the
answer when the stream at the last position is read as it stands before attention, after it, and
after the FFN. The final norm's scale is frozen at the real final state, as for neurons, so the
increases of all layers sum to the model's own log probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.values import Shown
from prune_edit.hooks import capture
from prune_edit.replay import record
from prune_edit.running import Running, stream
from prune_edit.scoring.importance import vocabulary_rows
from prune_edit.tasks.prompts import Encoded


@dataclass(frozen=True)
class LayerGain(Shown):
    """What a layer's attention and FFN add to the answer's log probability, in nats."""

    kind: ClassVar[str] = "layer gain"

    layer: int
    attention: float
    ffn: float


@dataclass(frozen=True)
class Depth(Shown):
    """From the embedding's log probability, `start`, to the model's, `end`: means over tokens."""

    kind: ClassVar[str] = "depth"

    start: float
    end: float
    layers: tuple[LayerGain, ...]


@torch.no_grad()
def explain_depth(decoder: Decoder, prompts: Sequence[Encoded], running: Running) -> Depth:
    """Mean log-probability increase of every block over the answer tokens."""
    places = 2 * decoder.n_layers + 1
    total = torch.zeros(places, dtype=torch.float64)
    tokens = 0
    for batch in stream(decoder, prompts, running, "layers"):
        at = batch.rows, batch.columns
        with capture(decoder, at=at, heads=False) as seen:
            _, replay = record(decoder, batch.inputs)
        assert seen.final is not None
        states = [*(state[at] for state in replay.states), seen.final]
        points = [states[0]]
        for layer, after in enumerate(states[1:]):
            # A layer whose FFN is gone may not read x + A: all it adds is then attention's.
            points += [seen.residual.get(layer, after), after]
        for place, state in enumerate(points):
            total[place] += float(_log_probs(decoder, state, seen.final, batch.targets).sum())
        tokens += len(batch.targets)
    means = (total / max(1, tokens)).tolist()
    gains = [after - before for before, after in pairwise(means)]
    layers = tuple(
        LayerGain(layer, gains[2 * layer], gains[2 * layer + 1])
        for layer in range(decoder.n_layers)
    )
    return Depth(means[0], means[-1], layers)


def _log_probs(
    decoder: Decoder, states: torch.Tensor, final: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log probability of the targets when the stream is `states` (A, D), norm frozen at `final`."""
    linear, divisor = decoder.frozen_norm(final)
    state = linear(states) / divisor
    logits = torch.empty(len(state), len(decoder.unembedding), device=state.device)
    for part, weight in vocabulary_rows(decoder.unembedding):
        logits[:, part] = state @ weight.T
    constant = decoder.logit_constant()
    logits = decoder.cap(logits if constant is None else logits + constant)
    return logits.double().gather(1, targets[:, None])[:, 0] - logits.double().logsumexp(1)
