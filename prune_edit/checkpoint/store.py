"""Folders of safetensors, written whole or not at all. Reading is reading.py's."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prune_edit.checkpoint.locking import locked
from prune_edit.checkpoint.manifest import NAME as MANIFEST
from prune_edit.checkpoint.manifest import write_manifest
from prune_edit.checkpoint.reading import INDEX as INDEX
from prune_edit.checkpoint.reading import SINGLE as SINGLE
from prune_edit.checkpoint.reading import model_digest as model_digest
from prune_edit.checkpoint.reading import open_tensors as open_tensors
from prune_edit.checkpoint.reading import read_config as read_config
from prune_edit.checkpoint.reading import weight_files as weight_files
from prune_edit.errors import OutputExistsError, OutputWriteError

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some of the quota or choose another --out",
    errno.EROFS: "the file system is read-only, choose another --out",
    errno.EACCES: "no permission, choose another --out",
    errno.EPERM: "no permission, choose another --out",
    errno.ENAMETOOLONG: "choose a shorter --out",
}


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target) as alone:
            _clean(target, alone)
            check_output(target, overwrite, mark)  # a killed run may have moved it aside
            temporary.mkdir()
            with _removed_after(temporary):
                yield temporary
                if (temporary / "config.json").is_file() and not (temporary / MANIFEST).exists():
                    write_manifest(temporary)
                sync(temporary)
                check_output(target, overwrite, mark)  # someone may have made it meanwhile
                _take_place(temporary, target)
    except OSError as error:
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


@contextmanager
def _removed_after(folder: Path) -> Iterator[None]:
    """Remove the folder at the end: half written, or what its whole successor took the place of."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> None:
    """Put the folder at the target, and what was there at its own place.

    In one step where the system can exchange names; else there is a moment at which a kill leaves
    the old one aside, where the next run finds it.
    """
    if os.path.lexists(target) and not _exchange(temporary, target):
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    elif not os.path.lexists(target):
        temporary.rename(target)
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; whether that was possible."""
    at_cwd, exchange = -100, 2  # fcntl.h, stdio.h of Linux
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux
        return False
    done: int = renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange)
    return done == 0


def sync(folder: Path) -> None:
    """Have the disk hold what was written. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


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


def _clean(target: Path, alone: bool) -> None:
    """Remove what killed runs left beside `target`; give back what one had moved aside.

    `alone`: the lock is held, so that nobody who left something is still at work.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or (
            not alone and int(match[2]) != os.getpid() and _is_alive(int(match[2]))
        ):
            continue
        if match[1] == "old" and not os.path.lexists(target):
            path.rename(target)
        elif path.is_symlink() or not path.is_dir():
            path.unlink()
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
