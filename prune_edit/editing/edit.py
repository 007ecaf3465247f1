"""Edit: what each changed unit is multiplied by and moved to; a frozen value with a JSON form.

An edit is affine in what the output projections read: a head's or neuron's input is multiplied by
its factor, and a neuron's is moved by its constant, `f m + c`. So it can be written into weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import scale, shift
from prune_edit.units import Units


@dataclass(frozen=True)
class Change:
    """One unit's: `kind` is head or neuron, `how` the name of what is done to it."""

    kind: str
    layer: int
    unit: int
    factor: float
    constant: float = 0.0
    how: str = "scale"

    @property
    def name(self) -> str:
        """As the paper writes them: head 17^22, neuron 28_3696."""
        return f"{self.layer}{'^' if self.kind == 'head' else '_'}{self.unit}"


@dataclass(frozen=True)
class Edit:
    """All changes, heads first, in order of layer and unit; shapes are the base model's."""

    changes: tuple[Change, ...]
    head_shape: tuple[int, int]
    neuron_shape: tuple[int, int]

    @cached_property
    def heads(self) -> torch.Tensor | None:
        """Factors of the heads, (L, H); None where none is changed."""
        return self._factors("head", self.head_shape)

    @cached_property
    def neurons(self) -> torch.Tensor | None:
        """Factors of the neurons, (L, N); None where none is changed."""
        return self._factors("neuron", self.neuron_shape)

    @cached_property
    def constants(self) -> torch.Tensor | None:
        """What the neurons are moved by, (L, N); None where none is."""
        found = torch.zeros(self.neuron_shape)
        for change in self.of("neuron"):
            found[change.layer, change.unit] = change.constant
        return found if found.any() else None

    def of(self, kind: str) -> tuple[Change, ...]:
        """The changes of heads, or of neurons."""
        return tuple(change for change in self.changes if change.kind == kind)

    def part(self, share: float) -> Edit:
        """The same edit, done in part: 0 changes nothing, 1 is all of it."""
        return replace(
            self,
            changes=tuple(
                replace(
                    change,
                    factor=1 + share * (change.factor - 1),
                    constant=share * change.constant,
                )
                for change in self.changes
            ),
        )

    def only(self, kind: str) -> Edit:
        """The part that changes heads, or neurons."""
        return replace(self, changes=self.of(kind))

    def _factors(self, kind: str, shape: tuple[int, int]) -> torch.Tensor | None:
        if not (some := self.of(kind)):
            return None
        found = torch.ones(shape)
        for change in some:
            found[change.layer, change.unit] = change.factor
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "head_shape": list(self.head_shape),
            "neuron_shape": list(self.neuron_shape),
            "changes": [vars(change) for change in self.changes],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Edit:
        """The inverse of `to_dict`."""
        layers, heads = values["head_shape"]
        _, neurons = values["neuron_shape"]
        changes = tuple(Change(**change) for change in values["changes"])
        return cls(changes, (layers, heads), (layers, neurons))


def edit_of(decoder: Decoder, changes: Sequence[Change]) -> Edit:
    """The changes in order; those that change nothing are left out."""
    some = [c for c in changes if c.factor != 1 or c.constant != 0]
    some.sort(key=lambda c: (c.kind, c.layer, c.unit))
    return Edit(tuple(some), decoder.head_shape, decoder.neuron_shape)


@contextmanager
def applied(decoder: Decoder, edit: Edit) -> Iterator[None]:
    """The model as edited, by hooks."""
    with ExitStack() as stack:
        if edit.heads is not None or edit.neurons is not None:
            stack.enter_context(scale(decoder, Units(edit.heads, edit.neurons)))
        if edit.constants is not None:
            stack.enter_context(shift(decoder, edit.constants))
        yield


def named(factor: float) -> str:
    """What a factor does to a unit."""
    if factor == 0:
        return "zero"
    if factor < 0:
        return "reverse"
    return "scale" if factor < 1 else "amplify"
