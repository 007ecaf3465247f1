"""Model folders, read lazily: nothing is believed before safety.py has looked at it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prune_edit.checkpoint.safety import Entry, inside, read_header, read_json
from prune_edit.errors import ModelError, UnsafeCheckpointError
from prune_edit.trust import trusted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist or is not a folder; give one, or "
            "a hub id such as owner/name"
        )
    path = inside(folder, "config.json")
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json; give a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a configuration: it holds no JSON object")
    return config


def open_tensors(folder: str | Path) -> Mapping[str, torch.Tensor]:
    """The folder's tensors by name; a lookup reads that tensor, nothing is held.

    Raises ModelError for a folder that is missing or damaged, UnsafeCheckpointError for one with
    pickled weights only (unless those are trusted) or with files elsewhere.
    """
    folder = Path(folder)
    read_config(folder)
    if pickles := _pickles(folder):
        return _Pickled(pickles)
    return _Tensors(read_headers(folder))


def read_headers(folder: str | Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors folder is; sorted by name. Raises as `open_tensors`."""
    folder = Path(folder)
    found: dict[str, Entry] = {}
    for file, listed in _shards(folder).items():
        there = read_header(inside(folder, file))
        if listed is not None and (lacking := sorted(set(listed) - set(there))):
            raise ModelError(f"{folder / file} lacks tensor {lacking[0]} that {INDEX} lists")
        if twice := sorted(set(there) & set(found)):
            raise ModelError(
                f"tensor {twice[0]} is in {found[twice[0]].path.name} and in {file}; get a whole "
                "copy of the checkpoint"
            )
        found |= there
    return dict(sorted(found.items()))


def model_digest(folder: str | Path) -> str:
    """SHA-256 over config.json and the weights, as hex. Raises as `open_tensors`."""
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    try:
        for path in (folder / "config.json", *weight_files(folder)):
            digest.update(digest_prefix(path))
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return digest.hexdigest()


def digest_prefix(path: Path) -> bytes:
    """What `model_digest` puts before a file's bytes."""
    return f"{path.name}\0{path.stat().st_size}\0".encode()


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the folder's weights, by name. Raises as `open_tensors`."""
    folder = Path(folder)
    return _pickles(folder) or [inside(folder, name) for name in sorted(_shards(folder))]


def is_pickled(folder: str | Path) -> bool:
    """Whether the weights are pickles, and trusted. Raises UnsafeCheckpointError for untrusted."""
    return bool(_pickles(Path(folder)))


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._entries[name].path
        if path not in self._open:
            self._open[path] = open_file(path)
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor


def open_file(path: Path) -> Any:
    """A safetensors file, open. Raises ModelError."""
    try:
        return safe_open(path, framework="pt").__enter__()
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; copy the model folder again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from None


class _Pickled(Mapping[str, torch.Tensor]):
    """Pickled weights, read as tensors and nothing else, mapped from the file where it can be."""

    def __init__(self, files: list[Path]) -> None:
        found: dict[str, torch.Tensor] = {}
        for path in files:
            for name, tensor in _unpickled(path).items():
                if name in found:
                    raise ModelError(f"tensor {name} is in two files, {path.name} is the second")
                found[name] = tensor
        self._found = dict(sorted(found.items()))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    from pickle import UnpicklingError

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; copy the model folder again") from None
    except UnpicklingError as error:
        said = " ".join(str(error).split())[:200]
        raise UnsafeCheckpointError(f"{path} holds more than weights: {said}") from None
    except Exception as error:  # what a damaged archive makes the unpickler raise
        raise ModelError(f"{path} cannot be read ({error!r:.200}); copy it again") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise ModelError(f"{path} is no state dict, tensors by name")
    return found


def _pickles(folder: Path) -> list[Path]:
    """The pickled files that hold the weights where no safetensors do; empty otherwise.

    Raises UnsafeCheckpointError where they are not trusted.
    """
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return []
    single, index = (folder / name for name in _PICKLED)
    there = {path.name for kind in _PICKLES for path in folder.glob(kind)}
    there -= {path.name for kind in _NO_WEIGHTS for path in folder.glob(kind)}
    if not there:
        return []
    first = sorted(there)[0]
    if not trusted().pickle:
        raise UnsafeCheckpointError(
            f"{folder} holds its weights only as pickle ({first}), which can run code "
            "when read; convert it to safetensors first, or --allow-pickle if you trust it"
        )
    if single.exists():
        return [inside(folder, single.name)]
    if index.exists():
        return [inside(folder, name) for name in sorted(_listed(index))]
    if len(there) > 1:
        raise ModelError(
            f"{folder} holds {len(there)} pickles and no {index.name}, the first is {first}; leave "
            "the one with the weights"
        )
    return [inside(folder, first)]


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Weight files, and the tensors an index expects in each (None without an index)."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if not (folder / INDEX).exists():
        _pickles(folder)
        raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}")
    shards = _listed(inside(folder, INDEX))
    if not shards:
        raise ModelError(f"{folder / INDEX} is not a weight index: it lists no tensor")
    return dict(shards)


def _listed(index: Path) -> dict[str, list[str]]:
    """The files of an index, and the tensors it says are in each."""
    try:
        fields = read_json(index, strict=True)
        entries = sorted(fields["weight_map"].items())
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a weight index: {error!r}") from None
    shards: dict[str, list[str]] = {}
    for tensor, file in entries:
        shown = tensor[:100].encode("ascii", "backslashreplace").decode()
        inside(index.parent, file, f"{index}: {shown}")
        shards.setdefault(file, []).append(tensor)
    return shards
