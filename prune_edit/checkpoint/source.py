"""A model folder to be cut: what is in it is known and checked, the weights stay on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prune_edit.arrange import Canonical, axis_of, place
from prune_edit.checkpoint.reading import (
    is_pickled,
    model_digest,
    open_tensors,
    read_config,
    read_headers,
    weight_files,
)
from prune_edit.checkpoint.safety import ITEM_SIZES, Entry
from prune_edit.checkpoint.write import config_of, expected_shapes
from prune_edit.errors import ModelError, PruneEditError
from prune_edit.families import Family, family_of
from prune_edit.layout import Layout, kept_of
from prune_edit.support import check_supported

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REMEDY = "get a whole copy of the checkpoint"


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: its tensors' names are those of a CausalLM's state dict.

    `have` are the units whose weights are there, `alive` those of them that are not zeroed in a
    masked checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    have: Layout
    alive: Layout
    entries: dict[str, Entry]  # empty for pickles
    pickled: Mapping[str, torch.Tensor] | None
    dtype: str | None  # what floating weights are converted to

    def kind(self, name: str) -> str:
        """A tensor's dtype as it is to be written, as a header names it."""
        found = self.stored_kind(name)
        return self.dtype if self.dtype and DTYPES[found].is_floating_point else found

    def stored_kind(self, name: str) -> str:
        """A tensor's dtype on disk."""
        if self.pickled is None:
            return self.entries[name].dtype
        return NAMES[self.pickled[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        if self.pickled is None:
            return self.entries[name].shape
        return tuple(self.pickled[name].shape)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory, for small ones, as it is to be written. Raises ModelError."""
        if self.pickled is None:
            entry = self.entries[name]
            with entry.path.open("rb") as file:
                file.seek(entry.begin)
                data = bytearray(file.read(entry.end - entry.begin))
            if len(data) != entry.end - entry.begin:
                raise ModelError(f"{entry.path} ends early; copy it again")
            shaped = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            if data:
                shaped = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
        else:
            shaped = self.pickled[name].contiguous()
        if shaped.is_floating_point() and not bool(torch.isfinite(shaped).all()):
            raise not_finite(name)
        return shaped.to(DTYPES[self.kind(name)])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All tensors' names."""
        return tuple(self.entries if self.pickled is None else self.pickled)

    @cached_property
    def bytes(self) -> int:
        """What all weights take in the format that they are written in."""
        return sum(math.prod(self.shape(name)) * ITEM_SIZES[self.kind(name)] for name in self.names)

    @property
    def files(self) -> list[Path]:
        """The files of the weights."""
        return weight_files(self.folder)

    def digest(self) -> str:
        """`model_digest`, by reading everything."""
        return model_digest(self.folder)


def open_source(folder: str | Path, dtype: str | None = None) -> Source:
    """A folder whose family can be written, checked against its own configuration.

    `dtype`: float32, bfloat16, float16, or None for the weights' own. Raises ModelError where
    tensors are missing or of another shape, and what `open_tensors` raises.
    """
    folder = Path(folder)
    fields = read_config(folder)
    kind = None if dtype is None else NAMES.get(getattr(torch, dtype, torch.complex64))
    if dtype is not None and kind not in ("F32", "BF16", "F16", "F64"):
        raise ModelError(f"dtype {dtype!r} is unknown; give float32, bfloat16 or float16")
    try:
        check_supported(fields)
        config = config_of(fields).to_dict()
        family = family_of(str(config["model_type"]))
        have = Layout.of_config(config)
        alive = _alive(config, have)
        expected = expected_shapes(config, family)
    except PruneEditError:
        raise
    except Exception as error:  # a configuration may hold anything
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder / 'config.json'} is not valid: {said}") from None
    if is_pickled(folder):
        found: Mapping[str, Any] = Canonical(family, open_tensors(folder))
    else:
        found = Canonical(family, read_headers(folder))  # type: ignore[arg-type]
    _check(folder, family, config, {name: tuple(found[name].shape) for name in found}, expected)
    own = {name: found[name] for name in sorted(expected)}
    for name, tensor in own.items():
        if str(tensor.dtype) not in DTYPES and tensor.dtype not in NAMES:
            raise ModelError(f"{folder}: tensor {name} has dtype {tensor.dtype}, which is not read")
    if is_pickled(folder):
        return Source(folder, config, family, have, alive, {}, own, kind)
    return Source(folder, config, family, have, alive, own, None, kind)


def not_finite(name: str, converted: str | None = None) -> ModelError:
    """The error for weights that are no numbers."""
    said = f"once it is {converted}; keep the checkpoint's --dtype" if converted else _REMEDY
    return ModelError(f"tensor {name} holds NaN or infinity{' ' if converted else '; '}{said}")


def _alive(config: Mapping[str, Any], have: Layout) -> Layout:
    block = config.get("prune_edit") or {}
    if block.get("format") != "masked" or not have.full:
        return have
    heads, neurons = (
        kept_of(block, kind, width)
        for kind, width in (("heads", have.n_heads), ("neurons", have.n_neurons))
    )
    return have.keep(heads, neurons)


def _check(
    folder: Path,
    family: Family,
    config: Mapping[str, Any],
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ModelError unless the tensors are those of the configuration."""
    for name in sorted(expected):
        if name not in found:
            raise ModelError(
                f"{folder}: weights do not fill the architecture (first: {name}); {_REMEDY}"
            )
        if found[name] != expected[name]:
            raise ModelError(
                f"{folder}: tensor {name} is {found[name]}, the configuration says "
                f"{expected[name]}; {_REMEDY}"
            )
    layers = re.escape(family.layers)
    count = config[family.layers_key]
    for name in sorted(set(found) - set(expected)):
        layer = re.match(rf"{layers}\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= count:
            raise ModelError(
                f"{folder}: there are weights of layer {layer[1]} ({name}), the configuration "
                f"says {count} layers; {_REMEDY}"
            )


class Shadows(Mapping[str, torch.Tensor]):
    """The source's tensors as what moves them needs to see them, at next to no memory.

    A weight whose units may move is its positions along their axis, counted from 1, so that a zero
    is a pad; any other matrix is a tensor without numbers; vectors are there in full.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._source.shape(name)
        if len(shape) < 2:
            return self._source.read(name)
        where = place(self._source.family, name)
        if where is None:
            return torch.empty(shape, dtype=DTYPES[self._source.kind(name)], device="meta")
        axis = axis_of(where, self._source.family)
        positions = torch.arange(1, shape[axis] + 1, dtype=torch.int32)
        return positions.view((-1, 1) if axis == 0 else (1, -1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.names)

    def __len__(self) -> int:
        return len(self._source.names)

    def __contains__(self, name: object) -> bool:
        return name in self._source.names
