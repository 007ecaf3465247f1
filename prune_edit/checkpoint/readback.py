"""What was written, read from the disk again: every byte must be there as it was handed over."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy

from prune_edit.checkpoint import blocks
from prune_edit.checkpoint.files import OnceRead
from prune_edit.checkpoint.stream import Segment, Written
from prune_edit.errors import ModelError, VerificationError
from prune_edit.running import Progress, silent


def read_back(
    folder: Path, written: Written, progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """The files' entries in the manifest, once each was found on the disk as it was written.

    Files are read side by side, each once. Raises VerificationError for the first byte that
    differs, OSError.
    """
    total = sum(written.sizes.values())
    done, lock = 0, threading.Lock()

    def more(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress("reading back", done, max(1, total))

    def one(name: str) -> dict[str, Any]:
        return _read(folder / name, written.sizes[name], written.segments[name], more)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(written.sizes, pool.map(one, written.sizes), strict=True))


def _read(path: Path, size: int, segments: Sequence[Segment], progress: Any) -> dict[str, Any]:
    _forget(path)
    digest, check = hashlib.sha256(), _Segments(path, segments)
    try:
        with OnceRead(path) as file:
            if file.size != size:
                raise _wrong(path, min(size, file.size))
            with ThreadPoolExecutor(1) as hashing:
                for room in file.chunks(blocks.BLOCK):
                    hashed = hashing.submit(digest.update, room.data)
                    check.feed(memoryview(room.data))
                    hashed.result()
                    progress(len(room))
    except ModelError as error:
        raise VerificationError(str(error)) from None
    return {"bytes": size, "sha256": digest.hexdigest()}


class _Segments:
    """The segments of a file, held against its bytes as these come."""

    def __init__(self, path: Path, segments: Sequence[Segment]) -> None:
        self._path, self._at, self._crc = path, 0, 0
        self._left: Iterator[Segment] = iter(sorted(segments, key=lambda one: one.begin))
        self._current = next(self._left, None)

    def feed(self, data: memoryview) -> None:
        """The next bytes. Raises VerificationError."""
        while data:
            current = self._current
            if current is None or self._at < current.begin:
                size = len(data) if current is None else min(len(data), current.begin - self._at)
                if numpy.frombuffer(data[:size], dtype=numpy.uint8).any():
                    raise _wrong(self._path, self._at)
            else:
                size = min(len(data), current.begin + current.size - self._at)
                self._crc = zlib.crc32(data[:size], self._crc)
                if self._at + size == current.begin + current.size:
                    if self._crc != current.crc:
                        raise _wrong(self._path, current.begin)
                    self._current, self._crc = next(self._left, None), 0
            self._at += size
            data = data[size:]


def _wrong(path: Path, begin: int) -> VerificationError:
    """The error for a file that is another one than was written."""
    return VerificationError(
        f"{path} does not read back as it was written, from byte {begin:,} on; check the disk and "
        "write it again"
    )


def _forget(path: Path) -> None:
    """Have the next reading come from the disk, where the system lets us ask for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
