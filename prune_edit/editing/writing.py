"""Write an edit into a checkpoint's weights, and take it off again, to the byte.

Tensors are read from the source folder and stay in its number format. `edits.json` keeps the bytes
of the columns that were changed, and the source's files as they were around the tensors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_edit.arrange import Canonical, tensor_name
from prune_edit.checkpoint.slim import output_biases
from prune_edit.checkpoint.stock import stocks
from prune_edit.checkpoint.store import INDEX, open_tensors, read_config, weight_files
from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit
from prune_edit.errors import EditError, PlanError

EDITS = "edits.json"
SCHEMA_VERSION = 1


class EditedTensors(Mapping[str, torch.Tensor]):
    """A model's tensors with the edit's changes, each made when it is asked for."""

    def __init__(self, decoder: Decoder, source: Mapping[str, torch.Tensor], edit: Edit) -> None:
        self._decoder = decoder
        self._source = Canonical(decoder.family, source)
        self._edit = edit
        self.places = places(decoder, edit)
        self._biases = self._shifts() if edit.constants is not None else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._biases:
            like = self._source[f"{self._decoder.family.final_norm}.weight"]
            found = self._source[name] if name in self._source else torch.zeros_like(like)
            return (found.double() + self._biases[name]).to(found.dtype)
        tensor = self._source[name]
        if name in self.places:
            tensor = tensor.clone()
            for change, part in self.places[name]:
                columns = _columns(self._decoder, tensor)[part]
                columns.copy_((columns.double() * change.factor).to(tensor.dtype))
            if not tensor.isfinite().all():
                raise EditError(
                    f"the edit takes {name} beyond what {str(tensor.dtype).removeprefix('torch.')} "
                    "can hold; give a smaller --scale"
                )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._source, *self._biases}))

    def __len__(self) -> int:
        return len({*self._source, *self._biases})

    def __contains__(self, name: object) -> bool:
        return name in self._source or name in self._biases

    def originals(self) -> dict[str, list[dict[str, Any]]]:
        """Of every changed column its bytes as they were, by tensor, and biases as they were."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, some in self.places.items():
            columns = _columns(self._decoder, self._source[name])
            found[name] = [
                {"first": part.start, "last": part.stop, "bytes": _packed(columns[part])}
                for _, part in some
            ]
        for name in self._biases:
            if name in self._source:
                found[name] = [{"bytes": _packed(self._source[name])}]
        return found

    def _shifts(self) -> dict[str, torch.Tensor]:
        """The output bias that every layer's constants add up to, (D,) float64, by name."""
        decoder, constants = self._decoder, self._edit.constants
        assert constants is not None
        biased = output_biases(decoder.model.config.to_dict(), decoder.family)[1]
        found = {}
        for layer in range(decoder.n_layers):
            name = tensor_name(decoder.family, layer, decoder.family.ffn_output, "bias")
            weight = tensor_name(decoder.family, layer, decoder.family.ffn_output, "weight")
            own = constants[layer][decoder.neuron_slots[layer]].double()
            if own.any():
                columns = _columns(decoder, self._source[weight]).double()
                found[name] = own @ columns.to(own.device)
            elif not biased:
                like = self._source[f"{decoder.family.final_norm}.weight"]
                found[name] = torch.zeros(like.shape, dtype=torch.float64)
        return found


def places(decoder: Decoder, edit: Edit) -> dict[str, list[tuple[Change, slice]]]:
    """By tensor, the changes with the rows of its (in, D) form that they concern."""
    found: dict[str, list[tuple[Change, slice]]] = {}
    family, size = decoder.family, decoder.head_dim
    for change in edit.changes:
        head = change.kind == "head"
        slots = (decoder.head_slots if head else decoder.neuron_slots)[change.layer].tolist()
        at = slots.index(change.unit)
        part = slice(at * size, (at + 1) * size) if head else slice(at, at + 1)
        path = family.attention_output if head else family.ffn_output
        name = tensor_name(family, change.layer, path, "weight")
        found.setdefault(name, []).append((change, part))
    return found


def _columns(decoder: Decoder, weight: torch.Tensor) -> torch.Tensor:
    """A projection's weight as (in, D), sharing its memory."""
    return weight if decoder.family.transposed else weight.T


def source_tensors(decoder: Decoder) -> Mapping[str, torch.Tensor]:
    """The model's tensors as its folder has them, or as they were loaded."""
    if Path(decoder.source).is_dir():
        return open_tensors(decoder.source)
    return {name: each.cpu() for name, each in decoder.model.state_dict().items()}


def written_config(decoder: Decoder, edit: Edit) -> dict[str, Any]:
    """The configuration of the edited model, before a format's own fields.

    Raises EditError where the edit moves neurons and the architecture has no output bias.
    """
    config: dict[str, Any] = decoder.model.config.to_dict()
    if edit.constants is not None:
        check_room(decoder)
        config["ffn_output_bias"] = True
    return config


def has_room(decoder: Decoder) -> bool:
    """Whether constants can be written: the FFN has an output bias, or a stock form could."""
    family = decoder.family
    if family.model_type != family.base_type:
        return True
    try:
        stocks({**decoder.model.config.to_dict(), "ffn_output_bias": True}, family)
    except PlanError:
        return False
    return True


def check_room(decoder: Decoder) -> None:
    """Raise EditError where constants cannot be written."""
    if not has_room(decoder):
        raise EditError(
            f"a {decoder.family.base_type} has no output biases, so its weights cannot hold what "
            "moves neurons (mean, clamp); take --suppress search, zero, scale or amplify, or edit "
            "the pruned model, whose format has room"
        )


# Back again


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
    from prune_edit.families import family_of

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
            tensor = _unpacked(change["bytes"], tensor)
            continue
        columns = (tensor if transposed else tensor.T)[change["first"] : change["last"]]
        columns.copy_(_unpacked(change["bytes"], columns))
    return _raw(tensor)


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(_raw(tensor)).decode()


def _unpacked(text: str, like: torch.Tensor) -> torch.Tensor:
    data = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return data.view(like.dtype).view(like.shape)


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
