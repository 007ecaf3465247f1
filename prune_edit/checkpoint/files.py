"""Large files read once from begin to end, past the system's cache where it holds nothing of them.

That saves a copy of every byte, and leaves the cache to those who come back for what is in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy

from prune_edit.errors import ModelError

PAGE = 4096
_FOLLOWING = 2  # reads under way while one is looked at
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has no such reading


def aligned(size: int) -> numpy.ndarray[Any, Any]:
    """Memory for `size` bytes from any place of a file, and for what a whole page has around."""
    return numpy.frombuffer(mmap.mmap(-1, size + 2 * PAGE), dtype=numpy.uint8)


class OnceRead:
    """A file that is read from its begin to its end, by several threads at once. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path, self._direct, self._refused = path, -1, False
        self._plain = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._mapped: numpy.ndarray[Any, Any] | None = None
        if _DIRECT and self.size:
            with suppress(OSError):  # not on every file system
                self._direct = os.open(path, os.O_RDONLY | _DIRECT)
                mapped = mmap.mmap(self._plain, 0, prot=mmap.PROT_READ)
                self._mapped = numpy.frombuffer(mapped, dtype=numpy.uint8)

    def __enter__(self) -> OnceRead:
        return self

    def __exit__(self, *error: object) -> None:
        self._mapped = None
        os.close(self._plain)
        if self._direct >= 0:
            os.close(self._direct)

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return os.fstat(self._plain).st_size

    def read(
        self, home: numpy.ndarray[Any, Any], offset: int, size: int
    ) -> numpy.ndarray[Any, Any]:
        """The bytes from `offset` on, in memory that `aligned` gave. Raises ModelError, OSError."""
        lead = offset % PAGE
        if lead % 8 or self._direct < 0 or self._refused or self._is_cached(offset, size):
            lead = done = 0
        else:
            done = self._read_direct(home, offset - lead, lead + size) - lead
        room = home[lead : lead + size]
        while done < size:
            count = os.preadv(self._plain, [room[max(0, done) :].data], offset + max(0, done))
            if not count:
                raise changed(self._path)
            done = max(0, done) + count
        return room

    def chunks(self, step: int) -> Iterator[numpy.ndarray[Any, Any]]:
        """All its bytes, so many at a time, each good until the next but one is asked for.

        The next ones are read meanwhile. Raises ModelError, OSError.
        """
        homes, size = [aligned(step) for _ in range(_FOLLOWING + 2)], self.size
        asked: deque[Future[numpy.ndarray[Any, Any]]] = deque()
        with ThreadPoolExecutor(_FOLLOWING) as pool:
            for number, offset in enumerate(range(0, size, step)):
                home = homes[number % len(homes)]
                asked.append(pool.submit(self.read, home, offset, min(step, size - offset)))
                if len(asked) > _FOLLOWING:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()

    def _is_cached(self, offset: int, size: int) -> bool:
        """Whether the system has most of these pages in memory; nothing is read for that."""
        if self._mapped is None or offset + size > len(self._mapped):
            return True
        begin = offset // PAGE * PAGE
        here = self._mapped[begin : offset + size]
        pages = numpy.zeros(-(-len(here) // PAGE), dtype=numpy.uint8)
        asked = (ctypes.c_void_p(here.ctypes.data), ctypes.c_size_t(len(here)))
        refused = ctypes.CDLL(None).mincore(*asked, ctypes.c_void_p(pages.ctypes.data))
        return bool(refused) or int((pages & 1).sum()) * 2 > len(pages)

    def _read_direct(self, home: numpy.ndarray[Any, Any], offset: int, size: int) -> int:
        try:
            return os.preadv(self._direct, [home[: -(-size // PAGE) * PAGE].data], offset)
        except OSError:  # the plain reading says what is wrong, if anything is
            self._refused = True
            return 0


def changed(path: Path) -> ModelError:
    """The error for a file that is no longer as it was when the run began."""
    return ModelError(f"{path} changed while it was read; run again once nobody writes it")
