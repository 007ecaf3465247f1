"""Verify: cut single edges of a chain and measure what goes.

A cut is exact for its path alone: the target is computed as it is without what the source brings
it, everything else as ever; then the model runs with the target so changed at the answer's
position, and the answer's log probability tells what the edge was worth. Edges run side by side,
a copy of the prompt each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.explain.paths import Paths, Shallow, Unit
from prune_edit.hooks import Captured, capture
from prune_edit.running import Running, answer_log_probs
from prune_edit.tasks.prompts import Batch


@dataclass(frozen=True)
class Cut:
    """An edge by its ends: a shallow neuron, a token's position, a head or a deep neuron into a
    head, a deep neuron, or (None) the answer.
    """

    kind: str
    source: Shallow | Unit | int
    target: Unit | None
    share: float | None
    product: float
    measured_share: float | None = None
    measured_drop: float | None = None


@torch.no_grad()
def cut_edges(
    decoder: Decoder, batch: Batch, paths: Paths, cuts: Sequence[Cut], running: Running
) -> list[Cut]:
    """The edges with what cutting each alone did; `batch` is the prompt, alone."""
    at_once = max(1, running.batch_tokens // batch.input_ids.numel())
    found: list[Cut] = []
    running.progress("edges", 0, len(cuts))
    for start in range(0, len(cuts), at_once):
        found += _cut(decoder, batch, paths, cuts[start : start + at_once])
        running.progress("edges", len(found), len(cuts))
    return found


@dataclass(frozen=True)
class _Change:
    """New numbers (channels,) from channel `first` of what a layer's output projection reads."""

    part: str
    layer: int
    first: int
    values: torch.Tensor


def _cut(decoder: Decoder, batch: Batch, paths: Paths, cuts: Sequence[Cut]) -> list[Cut]:
    copies = Batch(
        **{name: each.expand(len(cuts), *each.shape[1:]) for name, each in vars(batch).items()}
    )
    copies = replace(copies, rows=torch.arange(len(cuts), device=decoder.device))
    usual = float(_answers(decoder, batch)[0])
    with _subtracted(decoder, paths, cuts), capture(decoder) as seen:
        decoder.final_states(**copies.inputs)
    found = [_changed(decoder, paths, seen, cut, row) for row, cut in enumerate(cuts)]
    with _replaced(decoder, [change for change, _ in found], paths.column):
        after = _answers(decoder, copies)
    return [
        replace(cut, measured_share=share, measured_drop=usual - float(log_prob))
        for cut, (_, share), log_prob in zip(cuts, found, after.tolist(), strict=True)
    ]


def _changed(
    decoder: Decoder, paths: Paths, seen: Captured, cut: Cut, row: int
) -> tuple[_Change, float | None]:
    """What an edge's target gives without it, and the share of what it gave that is gone."""
    column, size = paths.column, decoder.head_dim
    if cut.target is None:  # the source itself goes
        assert isinstance(cut.source, tuple)
        layer, slot = cut.source[0], paths.neuron_slot(cut.source[0], cut.source[1])
        return _Change("neurons", layer, slot, torch.zeros(1, device=decoder.device)), None
    layer = cut.target[0]
    if cut.kind.endswith("head"):
        slot = decoder.layout.slots[layer].index(cut.target[1])
        new = seen.heads[layer][row, column, slot * size : (slot + 1) * size].float()
        if isinstance(cut.source, int) and layer in paths.fetched:
            new = new - paths.fetched[layer][slot, cut.source]
        return _Change("heads", layer, slot * size, new), _head_share(paths, cut.target, new)
    slot = paths.neuron_slot(*cut.target)
    new = seen.coefficients[layer][row, column, slot : slot + 1].float()
    old = float(paths.seen.coefficients[layer][0, column, slot])
    return _Change("neurons", layer, slot, new), (old - float(new[0])) / old if old else None


def _answers(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Log probability of each row's answer token."""
    states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
    return answer_log_probs(decoder, states, batch.targets)


def _head_share(paths: Paths, head: Unit, new: torch.Tensor) -> float | None:
    """The share of what a head brings the keys that is gone."""
    layer, head_number = head
    if layer not in paths.back:
        return None
    slot = paths.decoder.layout.slots[layer].index(head_number)
    back = paths.back[layer][slot]
    whole = float((paths.brought[layer][slot] * back).sum())
    return (whole - float((new * back).sum())) / whole if whole else None


@contextmanager
def _subtracted(decoder: Decoder, paths: Paths, cuts: Sequence[Cut]) -> Iterator[None]:
    """Take from what each target reads what its source brings it, in the cut's own row."""
    taken: dict[nn.Module, list[tuple[int, int, torch.Tensor]]] = {}
    for row, cut in enumerate(cuts):
        if isinstance(cut.source, int) or cut.target is None:
            continue
        layer = cut.target[0]
        if cut.kind == "neuron to head":
            assert isinstance(cut.source, Shallow)
            norm = decoder.attention_norm(layer)
            reader = decoder.attention(layer) if norm is None else norm
            vector, place = paths.shallow_output(cut.source), cut.source.position
        else:
            reader, place = decoder.ffn_reader(layer), paths.column
            unit = cut.source[0], cut.source[1]
            vector = (
                paths.head_output(unit)
                if cut.kind == "head to neuron"
                else paths.neuron_output(unit)
            )
        taken.setdefault(reader, []).append((row, place, vector))
    with ExitStack() as stack:
        for reader, own in taken.items():
            hook = reader.register_forward_pre_hook(_minus(len(cuts), own), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _minus(rows: int, taken: list[tuple[int, int, torch.Tensor]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        shape = states.shape
        changed = states.clone().view(rows, -1, shape[-1])  # OPT hands all tokens in a row
        for row, place, vector in taken:
            changed[row, place] -= vector.to(changed)
        changed = changed.view(shape)
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}

    return hook


@contextmanager
def _replaced(decoder: Decoder, changes: Sequence[_Change], column: int) -> Iterator[None]:
    """Let units give new numbers at a position, each change in its own row."""

    def put(own: list[tuple[int, _Change]]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0].clone()
            rows = states.view(len(changes), -1, states.shape[-1])  # as for `_minus`
            for row, change in own:
                part = slice(change.first, change.first + len(change.values))
                rows[row, column, part] = change.values.to(rows)
            return (states, *args[1:])

        return hook

    places = {(change.part, change.layer) for change in changes}
    with ExitStack() as stack:
        for part, layer in sorted(places):
            heads = part == "heads"
            module = decoder.attention_output(layer) if heads else decoder.ffn_output(layer)
            assert module is not None
            own = [(i, c) for i, c in enumerate(changes) if (c.part, c.layer) == (part, layer)]
            stack.callback(module.register_forward_pre_hook(put(own)).remove)
        yield
