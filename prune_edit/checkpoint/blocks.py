"""The source's bytes, each read once: a thread reads blocks ahead, a second one hashes them."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from prune_edit.checkpoint.files import OnceRead, aligned, changed
from prune_edit.checkpoint.pieces import rows_of
from prune_edit.checkpoint.reading import digest_prefix
from prune_edit.checkpoint.safety import ITEM_SIZES
from prune_edit.checkpoint.source import Source

BLOCK = 8 << 20
"""Bytes that are read at once; a row that is larger is read whole."""
AHEAD = 4
"""Blocks between the reader and whoever is slower, the writer or the hashing."""
_READS = 3  # at once: the disk has the next request before it has done with the last
Bytes = numpy.ndarray[Any, Any]
_RAW: dict[int, Any] = {1: numpy.uint8, 2: numpy.int16, 4: numpy.int32, 8: numpy.int64}


class Buffer:
    """Memory for a block; it is free again once all who use it let go."""

    def __init__(self, size: int, home: queue.Queue[Buffer]) -> None:
        self.bytes = aligned(size)
        self.size, self._home, self._users, self._lock = size, home, 0, threading.Lock()

    def lend(self, users: int) -> None:
        """Note how many will let go of it."""
        self._users = users

    def release(self) -> None:
        """Let go; the last one makes it free."""
        with self._lock:
            self._users -= 1
            free = self._users == 0
        if free:
            self._home.put(self)


@dataclass(frozen=True)
class Block:
    """Rows of a source tensor, (rows, columns), its bits as whole numbers."""

    name: str
    first: int
    rows: numpy.ndarray[Any, Any]
    owner: Buffer | None  # the buffer to give back


def raw(dtype: str) -> Any:
    """The whole numbers that hold the bits of a format."""
    return _RAW[ITEM_SIZES[dtype]]


class Reader:
    """The source's blocks in the order of its files, `total` bytes; `digest` once they are read."""

    def __init__(self, source: Source) -> None:
        self._sizes = {path: path.stat().st_size for path in source.files}
        self.total = sum(self._sizes.values())
        self._source = source
        self._ready: queue.Queue[Block | BaseException | None] = queue.Queue(maxsize=AHEAD)
        self._free: queue.Queue[Buffer] = queue.Queue()
        for _ in range(AHEAD + 1 + _READS):
            self._free.put(Buffer(BLOCK, self._free))
        self._left = threading.Event()
        self._hasher = _Hasher()
        self._pool = ThreadPoolExecutor(_READS)
        self._asked: deque[
            tuple[Future[Bytes], Buffer, Callable[[Bytes, Buffer], Block] | None]
        ] = deque()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def digest(self) -> str:
        """The source's `model_digest`; empty for pickles."""
        return self._hasher.result()

    def __enter__(self) -> Reader:
        self._hasher.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        while self._thread.is_alive():  # it may wait for room, or for a buffer
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._free.put(Buffer(0, self._free))
            self._thread.join(0.01)
        self._hasher.result()

    def __iter__(self) -> Iterator[Block]:
        while (found := self._ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def give_back(self, block: Block) -> None:
        """Let the block's memory be used again."""
        if block.owner is not None:
            block.owner.release()

    def _run(self) -> None:
        try:
            if self._source.pickled is None:
                self._read_files()
            else:
                self._read_pickles()
            self._ready.put(None)
        except _LeftError:
            pass
        except BaseException as error:
            self._ready.put(error)
        finally:
            self._pool.shutdown()
            self._hasher.end()

    def _give(self, block: Block) -> None:
        if self._left.is_set():
            raise _LeftError
        self._ready.put(block)

    def _read_pickles(self) -> None:
        for name, tensor in (self._source.pickled or {}).items():
            rows, columns = rows_of(tensor.shape)
            bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            whole = bits.view(raw(self._source.stored_kind(name))).reshape(rows, columns)
            step = max(1, BLOCK // max(1, columns * whole.itemsize))
            for first in range(0, rows, step):
                self._give(Block(name, first, whole[first : first + step], None))

    def _read_files(self) -> None:
        names = {(e.path, e.begin, e.end): name for name, e in self._source.entries.items()}
        config = self._source.folder / "config.json"
        self._hasher.add(digest_prefix(config) + config.read_bytes())
        for path in self._source.files:
            self._hasher.add(digest_prefix(path))
            spans = sorted(
                (begin, end, name) for (of, begin, end), name in names.items() if of == path
            )
            with OnceRead(path) as file, self._settled():
                reached = 0
                for begin, end, name in spans:
                    self._skip(file, reached, begin)
                    self._read(file, begin, name)
                    reached = end
                self._skip(file, reached, self._sizes[path])
                self._finish()
                if file.size != self._sizes[path]:
                    raise changed(path)

    def _read(self, file: OnceRead, begin: int, name: str) -> None:
        kind = raw(self._source.stored_kind(name))
        rows, columns = rows_of(self._source.shape(name))
        width = columns * numpy.dtype(kind).itemsize
        if not rows * width:
            return
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            count = min(step, rows - first)

            def block(room: Bytes, owner: Buffer, first: int = first, count: int = count) -> Block:
                bits = room.view(kind).reshape(count, columns)
                return Block(name, first, bits, owner)

            self._ask(file, begin + first * width, count * width, block)

    def _skip(self, file: OnceRead, begin: int, end: int) -> None:
        """Hash what no tensor of the model is in."""
        for offset in range(begin, end, BLOCK):
            self._ask(file, offset, min(BLOCK, end - offset), None)

    def _ask(
        self, file: OnceRead, offset: int, size: int, block: Callable[[Bytes, Buffer], Block] | None
    ) -> None:
        owner = self._free.get()
        if self._left.is_set():
            raise _LeftError
        owner.lend(1 if block is None else 2)
        home = owner.bytes if size <= owner.size else aligned(size)
        self._asked.append((self._pool.submit(file.read, home, offset, size), owner, block))
        self._finish(_READS - 1)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Have no read under way at the end, however that comes."""
        try:
            yield
        finally:
            wait([future for future, _, _ in self._asked])

    def _finish(self, left: int = 0) -> None:
        """Hand on what was read, in order, until so many requests are left."""
        while len(self._asked) > left:
            future, owner, block = self._asked.popleft()
            room = future.result()
            self._hasher.add(room, owner)
            if block is not None:
                self._give(block(room, owner))


class _Hasher:
    """SHA-256 in a thread of its own: of all that is done with a block it takes longest."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._asked: queue.Queue[tuple[Any, Buffer | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, data: Any, owner: Buffer | None = None) -> None:
        """Hash these bytes, too, and then let go of their buffer."""
        self._asked.put((data, owner))

    def end(self) -> None:
        """Say that there is no more."""
        self._asked.put(None)

    def result(self) -> str:
        """The digest, once everything is hashed."""
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            data, owner = asked
            self._digest.update(data)
            if owner is not None:
                owner.release()


class _LeftError(Exception):
    """The writer has no use for more."""
