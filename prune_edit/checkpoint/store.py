"""Folders of safetensors: read lazily, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prune_edit.errors import (
    ModelError,
    OutputExistsError,
    OutputWriteError,
    UnsafeCheckpointError,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some of the quota or choose another --out",
    errno.EROFS: "the file system is read-only, choose another --out",
    errno.EACCES: "no permission, choose another --out",
    errno.EPERM: "no permission, choose another --out",
    errno.ENAMETOOLONG: "choose a shorter --out",
}


# Reading


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError."""
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist or is not a folder; give one, or "
            "a hub id such as owner/name"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a configuration: it holds no JSON object")
    return config


def open_tensors(folder: str | Path) -> Mapping[str, torch.Tensor]:
    """The folder's tensors by name; a lookup reads that tensor, nothing is held.

    Raises ModelError for a folder that is missing or damaged, UnsafeCheckpointError for one with
    pickled weights only.
    """
    folder = Path(folder)
    read_config(folder)
    files: dict[str, str] = {}
    for name, listed in _shards(folder).items():
        handle = _open(folder / name)
        there = set(handle.keys())
        if listed is not None and (lacking := sorted(set(listed) - there)):
            raise ModelError(f"{folder / name} lacks tensor {lacking[0]} that {INDEX} lists")
        files |= dict.fromkeys(there, name)
    return _Tensors(folder, files)


def model_digest(folder: str | Path) -> str:
    """SHA-256 over config.json and the weights, as hex. Raises as `open_tensors`."""
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    try:
        for name in ("config.json", *sorted(_shards(folder))):
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return digest.hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the folder's weights. Raises as `open_tensors`."""
    return [Path(folder) / name for name in sorted(_shards(Path(folder)))]


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self._folder = folder
        self._files = dict(sorted(files.items()))
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open(self._folder / file)
        tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Weight files, and the tensors an index expects in each (None without an index)."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if not (folder / INDEX).exists():
        if pickles := sorted(path.name for kind in _PICKLES for path in folder.glob(kind)):
            raise UnsafeCheckpointError(
                f"{folder} holds its weights only as pickle ({pickles[0]}), which can run code "
                "when read; convert it to safetensors first"
            )
        raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        entries = sorted(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is not a weight index: {error!r}") from None
    shards: dict[str, list[str] | None] = {}
    for tensor, file in entries:
        # Compared as written: a symlink out of the folder is how the hub's cache is built.
        if not isinstance(file, str) or re.fullmatch(r"(?!\.)[^/\\:\0]+", file) is None:
            raise ModelError(
                f"{folder / INDEX}: {tensor} is said to be in {file!r}, which is not a file name "
                "inside the folder"
            )
        names = shards.setdefault(file, [])
        assert names is not None
        names.append(tensor)
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; copy the model folder again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from None


# Writing


def check_output(out: str | Path, overwrite: bool, mark: str = "config.json") -> None:
    """Raise OutputExistsError unless `out` is free or may be replaced.

    Only an empty folder or one with a file named `mark` is ever replaced.
    """
    out = Path(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; give another --out, or --overwrite")
    is_ours = out.is_dir() and ((out / mark).is_file() or not any(out.iterdir()))
    if not is_ours:
        raise OutputExistsError(
            f"{out} exists and is no folder of this kind (it has no {mark}), so --overwrite does "
            "not replace it; give another --out"
        )


@contextmanager
def replacing(
    out: str | Path, overwrite: bool = False, mark: str = "config.json"
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well.

    An exception, Ctrl-C included, leaves `out` as it was. A kill leaves the old or the new whole.
    Raises OutputExistsError before the block, OutputWriteError when the disk refuses.
    """
    target = Path(out).resolve()
    check_output(target, overwrite, mark)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        temporary.mkdir()
    except OSError as error:
        raise _write_error(out, error) from error
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        check_output(target, overwrite, mark)  # someone may have made it meanwhile
        if os.path.lexists(target):
            target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            if os.path.lexists(aside):
                aside.rename(target)
            raise
        _fsync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # A copy that finds the disk full names what it read.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        elsewhere = (
            not full
            and error.filename is not None
            and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(target.parent)
        )
        if elsewhere or error.errno is None:  # reading something, say; not the output's fault
            raise
        raise _write_error(out, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_error(out: str | Path, error: OSError) -> OutputWriteError:
    remedy = _REMEDIES.get(error.errno or 0, "choose another --out")
    return OutputWriteError(f"{out} could not be written: {error.strerror or error}; {remedy}")


def write_tensors(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write model.safetensors, or shards and their index; one shard is in memory at a time.

    The same tensors give the same bytes. Raises OSError when the disk refuses.
    """
    folder = Path(folder)
    shards: list[list[str]] = []
    batch: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        _save(batch, folder / f"shard-{len(shards)}")
        shards.append(sorted(batch))
        batch.clear()
        size = 0

    for name, tensor in tensors:
        weight = tensor.numel() * tensor.element_size()
        if batch and size + weight > max_shard_bytes:
            flush()
        batch[name] = tensor.detach().cpu().contiguous()
        size += weight
        total += weight
    if batch or not shards:
        flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library writes files that only their owner can read
    except SafetensorError as error:
        # The library reports a full disk as text: "... (os error 28)".
        if code := re.search(r"os error (\d+)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _clean(target: Path) -> None:
    """Remove what killed runs left beside `target`; give back what one had moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or (int(match[2]) != os.getpid() and _is_alive(int(match[2]))):
            continue
        if match[1] == "old" and not os.path.lexists(target):
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill(pid, 0) would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _fsync(path: Path) -> None:
    # Some file systems cannot sync folders; a file that cannot be synced is not written.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
