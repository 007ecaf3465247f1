"""What is checked before anything in a model folder is believed.

A folder may come from anywhere: its index may name files elsewhere, its links may lead out of it,
its headers may lie. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_edit.errors import ModelError, UnsafeCheckpointError

JSON_LIMIT = 100_000_000
"""Bytes of a configuration or an index, at most; a thousand layers need a tenth of it."""
HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header, at most: the format's own limit."""

# In the order that the library stores them in: the last first, then by name.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes of a number, by its name in a header."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are `begin` to `end` of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def inside(folder: Path, name: object, said_by: str = "the model folder") -> Path:
    """The path of a file of the folder. Raises UnsafeCheckpointError for one that is elsewhere.

    A link may lead to another file of the folder, or, in the hub's cache, from
    `models--*/snapshots/REVISION` to the same repository's `blobs`; nowhere else.
    """
    if not isinstance(name, str) or re.fullmatch(r"(?!\.)[^/\\:\0]{1,255}", name) is None:
        shown = name if isinstance(name, str) and len(name) < 100 else f"{str(name)[:100]}..."
        raise UnsafeCheckpointError(
            f"{said_by} names {shown!r}, which is not a file name inside the folder; get the model "
            "from a source you trust"
        )
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        allowed = [home]
        if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
            allowed.append(home.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise UnsafeCheckpointError(
                f"{path} is a link that leads out of the folder, to {real}; put the file itself "
                "there"
            )
        if real.exists() and not stat.S_ISREG(real.stat().st_mode):
            raise UnsafeCheckpointError(f"{path} is no plain file; put one there")
    except (OSError, RuntimeError, ValueError) as error:
        raise UnsafeCheckpointError(f"{path} cannot be followed: {error}") from None
    return path


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields, as json's `object_pairs_hook`. Raises ValueError for one given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} is given twice")
    return found


def read_json(path: Path, *, strict: bool = False) -> Any:
    """A JSON file's value; `strict` refuses keys given twice.

    Raises FileNotFoundError, ModelError for a file that is too large or no JSON.
    """
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise ValueError(f"it is larger than {JSON_LIMIT:,} bytes")
        return json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates if strict else None)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_short(error)}") from None


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ModelError for a header that is absurd, or tensors that overlap, leave holes or do not
    have the bytes of their shape.
    """
    remedy = "copy it again, from a source you trust"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
        return _entries(path, header, 8 + length, size)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; copy the model folder again") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({_short(error)}); {remedy}"
        ) from None


def _entries(path: Path, header: Any, start: int, size: int) -> dict[str, Entry]:
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("the metadata are no texts")
    entries: dict[str, Entry] = {}
    for name, fields in header.items():
        shown = name[:100].encode("ascii", "backslashreplace").decode()
        name.encode("utf-8")  # half of a surrogate pair is no name
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {shown} is not described by dtype, shape and data_offsets")
        kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(kind, str) or kind not in ITEM_SIZES:
            raise ValueError(f"tensor {shown} has the unknown dtype {str(kind)[:20]!r}")
        if not _counts(shape) or len(shape) > 16:
            raise ValueError(f"tensor {shown} has no shape")
        if not _counts(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {shown} has no offsets")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_SIZES[kind]:
            raise ValueError(f"tensor {shown} has {end - begin:,} bytes, which is not its shape's")
        entries[name] = Entry(path, kind, tuple(shape), start + begin, start + end)
    found = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
    reached = start
    for name, entry in found.items():
        if entry.begin != reached:
            what = "overlaps another" if entry.begin < reached else "leaves a hole before it"
            raise ValueError(f"tensor {name[:100]} {what}")
        reached = entry.end
    if reached != size:
        raise ValueError(f"the tensors end at {reached:,}, the file at {size:,}")
    return found


def _counts(value: object) -> bool:
    """Whether this is a list of whole numbers from 0 to 2^62."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 1 << 62 for number in value
    )


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 200 else f"{said[:200]}..."
