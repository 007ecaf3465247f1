"""What each tensor of an output is made of: slices of a source tensor, or numbers of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from prune_edit.arrange import axis_of, place
from prune_edit.checkpoint.compensation import Compensation
from prune_edit.checkpoint.reading import INDEX, SINGLE
from prune_edit.checkpoint.safety import ITEM_SIZES
from prune_edit.checkpoint.slim import slim_config, slim_tensors
from prune_edit.checkpoint.source import DTYPES, NAMES, Shadows, Source
from prune_edit.checkpoint.write import described
from prune_edit.errors import PlanError
from prune_edit.layout import Layout

MAX_SHARD_BYTES = 5_000_000_000
_RANKS = {name: rank for rank, name in enumerate(ITEM_SIZES)}


@dataclass(frozen=True)
class Piece:
    """A tensor of the output.

    `positions`: along `axis`, which place of the source each place of the output comes from,
    counted from 1, and 0 for a pad; None where all of the source goes there as it is. Without a
    `source`, `value` is what goes there, or zeros.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    axis: int = 0
    positions: numpy.ndarray[Any, Any] | None = None
    value: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A file of the output: its header, and where in the file each piece begins."""

    name: str
    header: bytes
    begins: dict[str, int]
    size: int


def cut(
    source: Source,
    want: Layout,
    fmt: str,
    provenance: Mapping[str, Any],
    compensation: Compensation | None = None,
    kv: str | None = None,
) -> tuple[dict[str, Any], list[Piece]]:
    """The configuration and the pieces of a checkpoint with the units of `want`, sorted by name.

    What moves tensors in memory moves shadows here, so that both make the same of a plan. Raises
    PlanError as `slim_config` and `described`, and for a source that repeats keys and values, since
    shadows do not show whether the copies are still equal.
    """
    family = source.family
    if source.have.kv == "duplicate":
        raise PlanError(
            "the model was written with --kv duplicate, which is not cut again without loading it; "
            "prune the base model instead"
        )
    slim = slim_config(
        source.config, family, source.have, want,
        output_bias=compensation is not None, provenance={},
    )  # fmt: skip
    shadows = dict(slim_tensors(family, Shadows(source), source.have, want, compensation))
    fields, stream = described(fmt, family, slim, shadows, want, provenance, kv)
    pieces = [_piece(source, name, shadow) for name, shadow in stream]
    named = (piece for piece in pieces if piece.name == f"{family.final_norm}.weight")
    norm = next(named, pieces[0])  # some OPT have a norm without weights
    fields["dtype"] = str(DTYPES[norm.dtype]).removeprefix("torch.")
    return fields, pieces


def _piece(source: Source, name: str, shadow: torch.Tensor) -> Piece:
    if shadow.is_meta:
        return Piece(name, source.kind(name), source.shape(name), name)
    where = place(source.family, name)
    if shadow.dim() == 2 and shadow.dtype == torch.int32 and where is not None:
        axis, positions = axis_of(where, source.family), shadow.flatten().numpy()
        shape = list(source.shape(name))
        whole = numpy.array_equal(positions, numpy.arange(1, shape[axis] + 1))
        shape[axis] = len(positions)
        found = None if whole else positions
        return Piece(name, source.kind(name), tuple(shape), name, axis, found)
    zero = not bool(shadow.any())
    return Piece(
        name, NAMES[shadow.dtype], tuple(shadow.shape), value=None if zero else shadow.clone()
    )


def plan_shards(pieces: Sequence[Piece], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """The files for the pieces, from their shapes alone: those that `write_tensors` makes."""
    batches: list[list[Piece]] = [[]]
    for piece in pieces:
        if batches[-1] and sum(p.bytes for p in batches[-1]) + piece.bytes > max_shard_bytes:
            batches.append([])
        batches[-1].append(piece)
    if len(batches) == 1:
        return [_shard(SINGLE, batches[0])]
    return [
        _shard(f"model-{number:05d}-of-{len(batches):05d}.safetensors", batch)
        for number, batch in enumerate(batches, 1)
    ]


def _shard(name: str, pieces: Sequence[Piece]) -> Shard:
    """A file in the library's own order: the widest formats first, then by name."""
    ordered = sorted(pieces, key=lambda piece: (-_RANKS[piece.dtype], piece.name.encode()))
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, reached = {}, 0
    for piece in ordered:
        begins[piece.name] = reached
        fields[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [reached, reached + piece.bytes],
        }
        reached += piece.bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begins = {name: begin + len(header) for name, begin in begins.items()}
    return Shard(name, header, begins, len(header) + reached)


def write_index(folder: Path, shards: Sequence[Shard], total: int) -> None:
    """The index of several shards; none for one."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.name for shard in shards for name in shard.begins}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that a tensor is cut into: a matrix's own, else a number a row."""
    return (shape[0], shape[1]) if len(shape) == 2 else (math.prod(shape), 1)


def runs(rows: numpy.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """The stretches of consecutive numbers, as indices: first, and one behind the last."""
    breaks = (numpy.flatnonzero(numpy.diff(rows) != 1) + 1).tolist()
    yield from zip([0, *breaks], [*breaks, len(rows)], strict=True)
