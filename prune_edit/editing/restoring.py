"""Take an edit off again, to the byte: what `edits.json` keeps, and the way back from it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prune_edit.checkpoint.store import INDEX, open_tensors, read_config, weight_files
from prune_edit.decoder import Decoder
from prune_edit.editing.raw import raw_bytes, unpacked
from prune_edit.editing.writing import EditedTensors
from prune_edit.errors import EditError
from prune_edit.families import family_of

EDITS = "edits.json"
SCHEMA_VERSION = 1


def restorable(decoder: Decoder, tensors: EditedTensors) -> dict[str, Any]:
    """What `restore` needs, as JSON: the changed bytes, and the source's files around its tensors.

    Without a source folder, the bytes alone.
    """
    found: dict[str, Any] = {"originals": tensors.originals(), "files": {}, "weights": {}}
    folder = Path(decoder.source)
    if folder.is_dir():
        found["files"]["config.json"] = (folder / "config.json").read_text(encoding="utf-8")
        if (folder / INDEX).is_file():
            found["files"][INDEX] = (folder / INDEX).read_text(encoding="utf-8")
        for path in weight_files(folder):
            found["weights"][path.name] = {
                "header": _header(path).decode(),
                "sha256": _digest(path),
            }
    return found


def restore(edited: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the model that `edited` was made from into `folder`, which exists.

    Raises EditError where the record is not whole, or the edited weights are no longer those that
    were written, so that the original's bytes cannot be had.
    """
    try:
        originals, files, weights = record["originals"], record["files"], record["weights"]
    except (KeyError, TypeError):
        raise EditError(f"{edited / EDITS} is not whole; edit the base model again") from None
    if not weights:
        raise EditError(
            f"{edited / EDITS} does not know the original's files, since that was no folder here; "
            "load the base model from where it was"
        )
    family = family_of(str(json.loads(files["config.json"])["model_type"]))
    source = open_tensors(edited)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    for file, about in weights.items():
        header = json.loads(about["header"])
        names = _names(family, [name for name in header if name != "__metadata__"])
        with (folder / file).open("wb") as out:
            raw = about["header"].encode()
            out.write(struct.pack("<Q", len(raw)) + raw)
            ordered = sorted(names, key=lambda name: header[name]["data_offsets"][0])
            for name in ordered:
                start, end = header[name]["data_offsets"]
                data = _bytes_of(source, originals, names[name], family.transposed, header[name])
                if len(data) != end - start:
                    raise EditError(f"{edited}: tensor {name} is not as it was written")
                out.write(data)
        if _digest(folder / file) != about["sha256"]:
            raise EditError(
                f"{edited}: its weights have changed since they were edited, so {file} of the "
                "original cannot be restored; load the base model from where it was"
            )


def _names(family: Any, names: list[str]) -> dict[str, str]:
    """A file's tensor names -> those of a CausalLM's state dict, the bare ones' prefix added."""
    prefix = family.layers.split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in names)
    return {
        name: prefix + name if bare and not name.startswith(family.unembedding) else name
        for name in names
    }


def _bytes_of(
    source: Mapping[str, torch.Tensor],
    originals: Mapping[str, Any],
    name: str,
    transposed: bool,
    about: Mapping[str, Any],
) -> bytes:
    """A tensor's bytes as they were."""
    if name not in source:
        raise EditError(f"tensor {name} of the original is not in the edited model")
    tensor = source[name]
    for change in originals.get(name, ()):
        tensor = tensor.clone()
        if "first" not in change:
            tensor = unpacked(change["bytes"], tensor)
            continue
        columns = (tensor if transposed else tensor.T)[change["first"] : change["last"]]
        columns.copy_(unpacked(change["bytes"], columns))
    return raw_bytes(tensor)


def _header(path: Path) -> bytes:
    """A safetensors file's header, as it stands."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_edits(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's `edits.json`. Raises EditError."""
    path = Path(folder) / EDITS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EditError(f"{folder} has no {EDITS}; give a folder that `edit` wrote") from None
    except (OSError, ValueError) as error:
        raise EditError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA_VERSION:
        raise EditError(f"{path} is not of schema {SCHEMA_VERSION}; edit the base model again")
    read_config(folder)
    return found
