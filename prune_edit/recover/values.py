"""Values by reduced rank regression: what a head hands on of what it attends to, as one map.

A head adds `P X V O` to the stream: its pattern P (T, T) mixes what the layer reads, X (T, D), and
the value map V (D, E) and the output map O (E, D) hand that on. With the patterns as they are, the
product of V and O is the least squares solution for what the stream lacks, cut to rank E: the best
such map is the solution times the projection onto the E strongest directions of what it predicts
(Izenman 1975). Heads take turns, each making up for what the others leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import Pattern
from prune_edit.recover.normal_equations import NormalEquations

_TURNS = 2  # of all heads of a layer
_NOTHING = 1e-4  # of a map's size


@dataclass
class Attended:
    """A batch at one layer: its patterns, each token's weight, and which are held out, (B, T).

    `lacking` (B, T, D) is what the stream lacks after attention, and changes as heads are refitted.
    """

    pattern: Pattern
    lacking: torch.Tensor
    weights: torch.Tensor
    held: torch.Tensor

    def mixed(self, slot: int) -> torch.Tensor:
        """What a head's pattern makes of the layer's input, (B, T, D)."""
        return self.pattern.weights[:, slot].float() @ self.pattern.read.float()


def values_alone(decoder: Decoder, layer: int) -> bool:
    """Whether every head of a layer has values of its own, which grouped queries share."""
    slots, kv_heads = decoder.layout.slots[layer], decoder.layout.kv_heads[layer]
    return bool(slots) and len(slots) == len(kv_heads) and not decoder.family.grouped_qkv


def refit_values(
    decoder: Decoder, layer: int, batches: Sequence[Attended], ridge: float | None = None
) -> None:
    """Change the layer's value and output maps in place; without a `ridge`, by the best one."""
    size = decoder.head_dim
    values, output = _maps(decoder, layer)
    for _ in range(_TURNS):
        for slot in range(len(decoder.layout.slots[layer])):
            own = slice(slot * size, (slot + 1) * size)
            before = (values[:, own].double() @ output[own].double()).cpu()
            into, out = _reduced(batches, slot, before, size, ridge)
            change = (into @ out - before).float()
            if change.norm() <= _NOTHING * before.norm():
                continue  # the same map in another basis would change weights for nothing
            values[:, own] = into.to(values)
            output[own] = out.to(output)
            for batch in batches:
                batch.lacking = batch.lacking - batch.mixed(slot) @ change.to(batch.lacking.device)


def _maps(decoder: Decoder, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's value map (D, slots * E) and output map (slots * E, D)."""
    family, inside = decoder.family, decoder.layers[layer]
    projection = decoder.attention_output(layer)
    assert projection is not None
    output = decoder.output_weight(projection).detach()
    read = decoder.output_weight(inside.get_submodule(family.values)).detach()
    return read[:, -len(output) :], output  # behind queries and keys, where all three are one


def _reduced(
    batches: Sequence[Attended], slot: int, before: torch.Tensor, size: int, ridge: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best value map (D, E) and output map (E, D) of one head, and no constant."""
    equations = NormalEquations(constant=True)
    for batch in batches:
        equations.add(batch.mixed(slot), batch.lacking, batch.weights, batch.held)
    square = equations.square[:-1, :-1]

    def outward(whole: torch.Tensor) -> torch.Tensor:
        """The E strongest directions of what a map (D, D) predicts, (D, E)."""
        found: torch.Tensor = torch.linalg.eigh(whole.T @ square @ whole)[1]
        return found[:, -size:]

    def shaped(change: torch.Tensor) -> torch.Tensor:
        whole = before + change[:-1]
        directions = outward(whole)
        cut = whole @ directions @ directions.T
        return torch.cat([cut - before, change[-1:]])

    whole = before + equations.solve(ridge, shaped)[:-1]
    directions = outward(whole)
    return whole @ directions, directions.T
