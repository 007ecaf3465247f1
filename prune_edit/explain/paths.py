"""Paths: the direct paths of one prediction, from shallow neurons to the deep ones' keys.

The query side of `scoring/query.py`, position by position and with each head's attention as it is:
what a head brings splits exactly into what it fetches from every token (biases left out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.explain.heads import patterns_of
from prune_edit.explain.hidden import carry
from prune_edit.hooks import Captured, capture
from prune_edit.replay import record
from prune_edit.running import Running
from prune_edit.scoring.query import Deep, Reads, keys_of, norm_of, reading, value_map, walk_back
from prune_edit.scoring.query import centred as without_mean
from prune_edit.tasks.prompts import Batch

Unit = tuple[int, int]
"""Layer and number of a head or a neuron."""


class Shallow(NamedTuple):
    """A neuron at a token, its effective coefficient, and its score on the query side."""

    layer: int
    neuron: int
    position: int
    coefficient: float
    score: float


@dataclass(frozen=True)
class Paths:
    """What one run of a prompt of T tokens shows; all at its answer, vectors in float32.

    Per layer up to the highest deep neuron's: `back` (slots, E) is what the keys look for in the
    heads, `brought` (slots, E) what these give, `fetched` (slots, T, E) what they fetch from every
    token, `maps` (D, slots * E) the value maps, `divisors` (T, 1) of attention's norm. Of the deep
    neurons, `weights` are their importance, `keys` (parts, D) each; `before` (parts, n) is what
    their layers have before the activation.
    """

    decoder: Decoder
    weights: Mapping[Unit, float]
    keys: Mapping[Unit, torch.Tensor]
    seen: Captured
    reads: Reads
    states: list[torch.Tensor]
    before: dict[int, torch.Tensor]
    patterns: dict[int, torch.Tensor]
    back: dict[int, torch.Tensor]
    brought: dict[int, torch.Tensor]
    fetched: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]
    divisors: dict[int, torch.Tensor | float]
    column: int

    @property
    def length(self) -> int:
        """T, up to the answer's position."""
        return self.column + 1

    @cached_property
    def total(self) -> float:
        """The sizes of all that heads bring, summed: what shares are of."""
        return max(float(sum(each.abs().sum() for each in self._brought_from.values())), 1e-12)

    @cached_property
    def _brought_from(self) -> dict[int, torch.Tensor]:
        """What each head brings from each token, (slots, T) per layer."""
        return {
            layer: torch.einsum("ste,se->st", fetched, self.back[layer])
            for layer, fetched in self.fetched.items()
        }

    @property
    def carriers(self) -> torch.Tensor:
        """What each layer brings from each token, (L, T), as a share; 0 above the deep neurons."""
        found = torch.zeros(self.decoder.n_layers, self.length)
        for layer, brought in self._brought_from.items():
            found[layer] = brought.sum(0).cpu()
        return found / self.total

    def brings(self, layer: int, head: int) -> float:
        """What a head brings, as a share."""
        if layer not in self.back:
            return 0.0
        slot = self._slot(layer, head)
        return float((self.brought[layer][slot] * self.back[layer][slot]).sum()) / self.total

    def best_shallow(self, count: int, without: set[Unit]) -> list[Shallow]:
        """The neurons and tokens that bring most through attention, best first."""
        found: list[Shallow] = []
        wanted: torch.Tensor | None = None  # (T, D)
        for layer in reversed(range(max(self.back, default=0))):
            if layer + 1 in self.back:
                above = self._sought(layer + 1)
                wanted = above if wanted is None else wanted + above
            if wanted is None or layer not in self.seen.coefficients:
                continue
            used = self.seen.effective(layer)[0, : self.length].float()  # (T, n)
            scores = used * (wanted @ self.decoder.residual_values(layer).float().T)
            best = scores.flatten().topk(min(count + len(without), scores.numel()))
            for value, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                place, slot = divmod(flat, scores.shape[1])
                neuron = int(self.decoder.neuron_slots[layer][slot])
                if value > 0 and not ((layer, neuron) in without and place == self.column):
                    used_here = float(used[place, slot])
                    found.append(Shallow(layer, neuron, place, used_here, value))
        return sorted(found, key=lambda each: -each.score)[:count]

    def _sought(self, layer: int) -> torch.Tensor:
        """What a layer's heads look for at every token on behalf of the keys, (T, D)."""
        weighed = self.patterns[layer].T[:, :, None] * self.back[layer]  # (T, slots, E)
        sought: torch.Tensor = weighed.flatten(1) @ self.maps[layer].T / self.divisors[layer]
        return sought

    def best_head(self, each: Shallow) -> Unit:
        """The head that brings most of what a shallow neuron says."""
        best = max(
            (
                (*(self._carried(each, layer) * self.back[layer]).sum(1).max(0), layer)
                for layer in self.back
                if layer > each.layer
            ),
            key=lambda found: float(found[0]),
        )
        return best[2], self.decoder.layout.slots[best[2]][int(best[1])] or 0

    def _carried(self, each: Shallow, layer: int) -> torch.Tensor:
        """What a layer's heads fetch of a shallow neuron, (slots, E)."""
        vector = self.shallow_output(each)
        divisor = self.divisors[layer]
        scale = divisor if isinstance(divisor, float) else divisor[each.position]
        heads = (vector / scale @ self.maps[layer]).view(-1, self.decoder.head_dim)
        return self.patterns[layer][:, each.position, None] * heads

    def _value(self, layer: int, neuron: int) -> torch.Tensor:
        return self.decoder.residual_values(layer)[self.neuron_slot(layer, neuron)].float()

    def _slot(self, layer: int, head: int) -> int:
        return self.decoder.layout.slots[layer].index(head)

    def neuron_slot(self, layer: int, neuron: int) -> int:
        """The place of a neuron in its layer's weights."""
        return int((self.decoder.neuron_slots[layer] == neuron).nonzero()[0, 0])

    def said(
        self, decoder: Decoder, each: Shallow, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A shallow neuron's value as it is used, and after a layer's value-output map, (D,)."""
        value = self._value(each.layer, each.neuron)
        value = -value if each.coefficient < 0 else value
        return value, carry(decoder, layer, self.maps[layer], value)

    # Edges: (share or None, product)

    def shallow_edge(self, each: Shallow, head: Unit) -> tuple[float | None, float]:
        """A shallow neuron at its token, into a head."""
        layer, slot = head[0], self._slot(*head)
        return self._into_head(head, self._carried(each, layer)[slot])

    def token_edge(self, place: int, head: Unit) -> tuple[float | None, float]:
        """All that a head fetches from a token."""
        if head[0] not in self.fetched:
            return None, 0.0
        return self._into_head(head, self.fetched[head[0]][self._slot(*head), place])

    def _into_head(self, head: Unit, vector: torch.Tensor) -> tuple[float | None, float]:
        layer, slot = head[0], self._slot(*head)
        product = float((vector * self.back[layer][slot]).sum())
        whole = float((self.brought[layer][slot] * self.back[layer][slot]).sum())
        return (product / whole if whole else None), product

    def head_edge(self, head: Unit, unit: Unit) -> tuple[float | None, float]:
        """A head's output, into a deep neuron's key."""
        return self._into_neuron(unit, self.head_output(head))

    def neuron_edge(self, low: Unit, unit: Unit) -> tuple[float | None, float]:
        """A deep neuron's output, into a deeper one's key: the PE-DAG."""
        return self._into_neuron(unit, self.neuron_output(low))

    def head_output(self, head: Unit) -> torch.Tensor:
        """What a head adds to the stream, (D,)."""
        layer, slot = head[0], self._slot(*head)
        projection = self.decoder.attention_output(layer)
        assert projection is not None
        part = slice(slot * self.decoder.head_dim, (slot + 1) * self.decoder.head_dim)
        weight = self.decoder.output_weight(projection)[part].detach().float()
        vector = self.seen.heads[layer][0, self.column, part].float() @ weight
        norm = self.decoder.attention_output_norm(layer)
        if norm is None:
            return vector
        divisor = self.reads.attention[layer][0, self.column]
        return vector * self.decoder.norm_weight(norm) / divisor

    def shallow_output(self, each: Shallow) -> torch.Tensor:
        """What a shallow neuron adds to the stream at its token, (D,)."""
        return each.coefficient * self._value(each.layer, each.neuron)

    def neuron_output(self, unit: Unit) -> torch.Tensor:
        """What a neuron adds to the stream, (D,)."""
        layer, neuron = unit
        used = self.seen.effective(layer)[0, self.column, self.neuron_slot(layer, neuron)]
        return used.float() * self._value(layer, neuron)

    def reaches(self, head: Unit, unit: Unit) -> bool:
        """Whether a head's output is there when a neuron's layer reads the stream."""
        if head[0] != unit[0]:
            return head[0] < unit[0]
        read = self.reads.ffn[unit[0]].view_as(self.states[unit[0]])
        return not torch.equal(read, self.states[unit[0]])

    def _into_neuron(self, unit: Unit, vector: torch.Tensor) -> tuple[float | None, float]:
        layer, slot = unit[0], self.neuron_slot(*unit)
        reader = norm_of(self.decoder.ffn_reader(layer))
        if reader is not None:
            read = self.reads.ffn[layer].view_as(self.states[layer])[0, self.column]
            vector = without_mean(self.decoder, vector) / self.decoder.norm_divisor(reader, read)
        products = self.keys[unit] @ vector  # (parts,)
        before = self.before[layer][:, slot]
        shares = products / torch.where(before == 0, torch.nan, before)
        share = float(shares.sum())
        return (share if share == share else None), float((products * before.sign()).sum())


@torch.no_grad()
def trace_paths(
    decoder: Decoder, batch: Batch, weights: Mapping[Unit, float], running: Running
) -> Paths:
    """Run a prompt of one answer token and keep what its paths are read from.

    `weights` are the importance of the deep neurons, all above zero.
    """
    deep = _deep(decoder, weights)
    top = max(deep, default=-1) + 1
    with (
        capture(decoder) as seen,
        reading(decoder) as reads,
        _before_activation(decoder, list(deep)) as before,
    ):
        _, replay = record(decoder, batch.inputs)
    column = int(batch.columns[0])
    back = {
        layer: found[0].unflatten(0, (-1, decoder.head_dim))
        for layer, found in walk_back(decoder, batch, reads, replay.states, deep)
    }
    maps = {layer: value_map(decoder, layer, running) for layer in range(top)}
    kept = {layer: each for layer, each in maps.items() if each is not None}
    patterns = {
        layer: found.weights[0, :, column, : column + 1].float()
        for layer, found in patterns_of(decoder, batch, list(kept)).items()
    }
    divisors: dict[int, torch.Tensor | float] = {}
    fetched = {}
    for layer, values in kept.items():
        stream = replay.states[layer][0, : column + 1].float()
        norm = decoder.attention_norm(layer)
        divisors[layer] = 1.0 if norm is None else decoder.norm_divisor(norm, stream)
        read = (stream / divisors[layer] @ values).unflatten(1, (-1, decoder.head_dim))
        fetched[layer] = patterns[layer][:, :, None] * read.transpose(0, 1)
    brought = {
        layer: seen.heads[layer][0, column].float().unflatten(0, (-1, decoder.head_dim))
        for layer in kept
    }
    before_here = {
        layer: found[:, column].unflatten(-1, (-1, len(decoder.neuron_slots[layer])))[0]
        for layer, found in before.items()
    }
    keys = {unit: deep[unit[0]].keys[:, place] for unit, place in _places(weights).items()}
    return Paths(
        decoder, weights, keys, seen, reads, replay.states, before_here, patterns, back, brought,
        fetched, kept, divisors, column,
    )  # fmt: skip


def _places(weights: Mapping[Unit, float]) -> dict[Unit, int]:
    """Where each deep neuron stands among those of its layer."""
    found: dict[Unit, int] = {}
    for unit in weights:
        found[unit] = sum(other[0] == unit[0] for other in found)
    return found


def _deep(decoder: Decoder, weights: Mapping[Unit, float]) -> dict[int, Deep]:
    found = {}
    for layer in sorted({layer for layer, _ in weights}):
        own = [(neuron, weight) for (at, neuron), weight in weights.items() if at == layer]
        slots = [int((decoder.neuron_slots[layer] == neuron).nonzero()[0, 0]) for neuron, _ in own]
        worth = torch.tensor([weight for _, weight in own], device=decoder.device)
        found[layer] = Deep(worth, keys_of(decoder, layer)[:, slots])
    return found


@contextmanager
def _before_activation(decoder: Decoder, layers: list[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Watch what the FFN's input projections of these layers give, (B, T, parts * n)."""
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            given = output.detach().float()
            parts[layer].append(given if given.dim() == 3 else given[None])  # OPT: B = 1

        return hook

    with ExitStack() as stack:
        for layer in layers:
            for path in decoder.family.ffn_inputs:
                module: nn.Module = decoder.layers[layer].get_submodule(path)
                stack.callback(module.register_forward_hook(keep(layer)).remove)
        yield found
        found.update({layer: torch.cat(each, -1) for layer, each in parts.items()})
