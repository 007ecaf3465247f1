"""Surgery without loading the model: every byte of the source is read once, in blocks.

A reader thread goes through the source's files in order, hashing them, a few blocks ahead; the
writer takes from each block what stays and puts it where the planned shards have it; a third thread
has the disk begin with what is written. Memory is a few blocks, however large the model.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy
import torch

from prune_edit.checkpoint.pieces import (
    MAX_SHARD_BYTES,
    Piece,
    plan_shards,
    rows_of,
    runs,
    write_index,
)
from prune_edit.checkpoint.reading import digest_prefix
from prune_edit.checkpoint.safety import ITEM_SIZES
from prune_edit.checkpoint.source import DTYPES, Source, not_finite
from prune_edit.errors import ModelError
from prune_edit.running import Progress, silent

BLOCK = 8 << 20
"""Bytes that are read at once; a row that is larger is read whole."""
_AHEAD = 4  # blocks between reader and writer
_FLUSH = 128 << 20  # bytes written before the disk is asked to begin
_RAW: dict[int, Any] = {1: numpy.uint8, 2: numpy.int16, 4: numpy.int32, 8: numpy.int64}
_INFINITE = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


@dataclass(frozen=True)
class Block:
    """Rows of a source tensor, (rows, columns), its bits as whole numbers."""

    name: str
    first: int
    rows: numpy.ndarray[Any, Any]
    owner: numpy.ndarray[Any, Any] | None  # the buffer to give back


def write_pieces(
    folder: Path,
    source: Source,
    pieces: Sequence[Piece],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> str:
    """Write the weights of a checkpoint, and return the source's `model_digest`.

    The bytes are those of `write_tensors`. Raises ModelError where weights are not finite or the
    source changes meanwhile, OSError where the disk refuses or has not enough room.
    """
    shards = plan_shards(pieces, max_shard_bytes)
    total = sum(piece.bytes for piece in pieces)
    _check_room(folder, sum(shard.size for shard in shards))
    takers: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.source is not None:
            takers.setdefault(piece.source, []).append(piece)
    with ExitStack() as stack:
        files: dict[str, tuple[FileIO, int]] = {}
        for shard in shards:
            file = stack.enter_context((folder / shard.name).open("wb", buffering=0))
            file.write(shard.header)
            file.truncate(shard.size)  # what is not written is zero
            files |= {name: (file, begin) for name, begin in shard.begins.items()}
        flusher = stack.enter_context(_Flusher())
        for piece in pieces:
            if piece.value is not None:
                raw = piece.value.contiguous().view(torch.uint8).numpy()
                _put(*files[piece.name], raw, flusher)
        with _Reader(source) as reader:
            done = 0
            for block in reader:
                done += block.rows.nbytes
                progress("cutting", done, max(1, reader.total))
                _check_finite(block, source.stored_kind(block.name))
                for piece in takers.get(block.name, ()):
                    for row, taken in _taken(piece, block, source):
                        file, begin = files[piece.name]
                        _put(file, begin + row * taken[0].nbytes, taken, flusher)
                reader.give_back(block)
        digest = reader.digest
    write_index(folder, shards, total)
    return digest if source.pickled is None else source.digest()


def _taken(
    piece: Piece, block: Block, source: Source
) -> Iterator[tuple[int, numpy.ndarray[Any, Any]]]:
    """What a piece takes of a block: rows, and the output row that they begin at."""
    places = piece.positions
    if places is None:
        yield block.first, _converted(block.rows, piece, source)
    elif piece.axis == 1:
        taken = numpy.take(block.rows, places - 1, axis=1, mode="clip")
        taken[:, places == 0] = 0
        yield block.first, _converted(taken, piece, source)
    else:
        low, high = block.first, block.first + len(block.rows)
        rows = numpy.flatnonzero((places > low) & (places <= high))  # of the output, ascending
        for begin, end in runs(rows) if len(rows) else ():
            there = places[rows[begin:end]] - 1 - low
            if there[-1] - there[0] == len(there) - 1 and bool((numpy.diff(there) == 1).all()):
                taken = block.rows[there[0] : there[-1] + 1]
            else:
                taken = block.rows[there]
            yield int(rows[begin]), _converted(taken, piece, source)


def _converted(
    rows: numpy.ndarray[Any, Any], piece: Piece, source: Source
) -> numpy.ndarray[Any, Any]:
    assert piece.source is not None
    stored = source.stored_kind(piece.source)
    if stored == piece.dtype:
        return rows
    numbers = torch.from_numpy(numpy.ascontiguousarray(rows)).view(DTYPES[stored])
    raw: numpy.ndarray[Any, Any] = numbers.to(DTYPES[piece.dtype]).view(torch.uint8).numpy()
    raw = raw.view(_raw(piece.dtype))
    if not _finite(raw, piece.dtype):
        raise not_finite(piece.source, str(DTYPES[piece.dtype]).removeprefix("torch."))
    return raw


def _raw(dtype: str) -> Any:
    return _RAW[ITEM_SIZES[dtype]]


def _check_finite(block: Block, dtype: str) -> None:
    if not _finite(block.rows, dtype):
        raise not_finite(block.name)


def _finite(raw: numpy.ndarray[Any, Any], dtype: str) -> bool:
    """Whether no number is NaN or infinite: their exponents are all ones, so their bits largest."""
    infinite = _INFINITE.get(dtype)
    if infinite is None or not raw.size:
        return True
    unsigned = raw.view(raw.dtype.str.replace("i", "u"))
    negative = infinite + (1 << 8 * raw.itemsize - 1)
    return int(raw.max()) < infinite and int(unsigned.max()) < negative


def _put(file: FileIO, begin: int, rows: numpy.ndarray[Any, Any], flusher: _Flusher) -> None:
    data = memoryview(numpy.ascontiguousarray(rows).view(numpy.uint8).data).cast("B")
    written = 0
    while written < len(data):  # one call writes two gigabytes at most
        written += os.pwrite(file.fileno(), data[written:], begin + written)
    flusher.wrote(file.fileno(), len(data))


def _check_room(folder: Path, needed: int) -> None:
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", str(folder))


class _Flusher:
    """Has the disk write while we read on; `replacing` still waits for everything at the end."""

    def __init__(self) -> None:
        self._pending = 0
        self._asked: queue.Queue[int | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def wrote(self, descriptor: int, count: int) -> None:
        """Count what was written; ask the thread now and then."""
        self._pending += count
        if self._pending >= _FLUSH:
            self._pending = 0
            with suppress(queue.Full):  # it is still at it
                self._asked.put_nowait(descriptor)

    def __enter__(self) -> _Flusher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (descriptor := self._asked.get()) is not None:
            with suppress(OSError):  # whoever syncs at the end meets it again
                os.fdatasync(descriptor)


class _Reader:
    """The source's blocks in the order of its files, read and hashed ahead by a thread."""

    def __init__(self, source: Source) -> None:
        self.digest = ""
        self.total = sum(path.stat().st_size for path in source.files)
        self._source = source
        self._ready: queue.Queue[Block | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._free: queue.Queue[numpy.ndarray[Any, Any]] = queue.Queue()
        for _ in range(_AHEAD + 2):
            self._free.put(numpy.empty(BLOCK, dtype=numpy.uint8))
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        while self._thread.is_alive():  # it may wait for room, or for a buffer
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._free.put(numpy.empty(0, dtype=numpy.uint8))
            self._thread.join(0.01)

    def __iter__(self) -> Iterator[Block]:
        while (found := self._ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def give_back(self, block: Block) -> None:
        """Let the block's memory be used again."""
        if block.owner is not None:
            self._free.put(block.owner)

    def _run(self) -> None:
        try:
            pickled = self._source.pickled
            if pickled is None:
                self._read_files()
            else:
                for name, tensor in pickled.items():
                    rows, columns = rows_of(tensor.shape)
                    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    whole = raw.view(_raw(self._source.stored_kind(name))).reshape(rows, columns)
                    step = max(1, BLOCK // max(1, columns * whole.itemsize))
                    for first in range(0, rows, step):
                        self._give(Block(name, first, whole[first : first + step], None))
            self._ready.put(None)
        except _LeftError:
            pass
        except BaseException as error:
            self._ready.put(error)

    def _give(self, block: Block) -> None:
        if self._left.is_set():
            raise _LeftError
        self._ready.put(block)

    def _read_files(self) -> None:
        names = {(e.path, e.begin, e.end): name for name, e in self._source.entries.items()}
        digest = hashlib.sha256()
        config = self._source.folder / "config.json"
        digest.update(digest_prefix(config) + config.read_bytes())
        for path in self._source.files:
            digest.update(digest_prefix(path))
            spans = sorted(
                (begin, end, name) for (of, begin, end), name in names.items() if of == path
            )
            with path.open("rb", buffering=0) as file:
                _advise(file)
                reached = 0
                for begin, end, name in spans:
                    self._skip(file, begin - reached, digest)
                    self._read(file, name, digest)
                    reached = end
                self._skip(file, path.stat().st_size - reached, digest)
                if file.read(1):
                    raise _changed(path)
        self.digest = digest.hexdigest()

    def _read(self, file: FileIO, name: str, digest: Any) -> None:
        kind = _raw(self._source.stored_kind(name))
        rows, columns = rows_of(self._source.shape(name))
        width = columns * numpy.dtype(kind).itemsize
        if not rows * width:
            return
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            owner = self._free.get()
            if self._left.is_set():
                raise _LeftError
            home = owner if count * width <= len(owner) else numpy.empty(count * width, numpy.uint8)
            room = home[: count * width]
            self._fill(file, room.data)
            digest.update(room)
            self._give(Block(name, first, room.view(kind).reshape(count, columns), owner))

    def _skip(self, file: FileIO, count: int, digest: Any) -> None:
        """Hash what no tensor of the model is in."""
        while count > 0:
            data = file.read(min(count, BLOCK))
            if not data:
                raise _changed(Path(file.name))
            digest.update(data)
            count -= len(data)

    @staticmethod
    def _fill(file: FileIO, room: memoryview) -> None:
        done = 0
        while done < len(room):
            count = file.readinto(room[done:])
            if not count:
                raise _changed(Path(file.name))
            done += count


class _LeftError(Exception):
    """The writer has no use for more."""


def _changed(path: Path) -> ModelError:
    return ModelError(f"{path} changed while it was read; run again once nobody writes it")


def _advise(file: FileIO) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
