"""Surgery without loading the model: every byte of the source is read once, in blocks.

blocks.py reads the source's files in order and hashes them, a few blocks ahead; the writer takes
from each block what stays and puts it where the planned shards have it; another thread has the disk
begin with what is written. Memory is a few blocks, however large the model.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy
import torch

from prune_edit.checkpoint.blocks import Block, Reader, raw
from prune_edit.checkpoint.pieces import (
    MAX_SHARD_BYTES,
    Piece,
    Shard,
    plan_shards,
    runs,
    write_index,
)
from prune_edit.checkpoint.source import DTYPES, Source, not_finite
from prune_edit.running import Progress, silent

_FLUSH = 128 << 20  # bytes written before the disk is asked to begin
_INFINITE = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


@dataclass(frozen=True)
class Segment:
    """Bytes of a written file, and their CRC-32, by which `read_back` knows them again."""

    begin: int
    size: int
    crc: int


@dataclass(frozen=True)
class Written:
    """The source's `model_digest`, and each file's size and segments; the rest of it is zero."""

    digest: str
    sizes: dict[str, int]
    segments: dict[str, list[Segment]]


def write_pieces(
    folder: Path,
    source: Source,
    pieces: Sequence[Piece],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Written:
    """Write the weights of a checkpoint; what `read_back` has to find again.

    The bytes are those of `write_tensors`. Raises ModelError where weights are not finite or the
    source changes meanwhile, OSError where the disk refuses or has not enough room.
    """
    shards = plan_shards(pieces, max_shard_bytes)
    _check_room(folder, sum(shard.size for shard in shards))
    takers: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.source is not None:
            takers.setdefault(piece.source, []).append(piece)
    with _Files(folder, shards) as files:
        for piece in pieces:
            if piece.value is not None:
                files.put(piece.name, 0, piece.value.contiguous().view(torch.uint8).numpy())
        with Reader(source) as reader:
            done = 0
            for block in reader:
                done += block.rows.nbytes
                progress("cutting", done, max(1, reader.total))
                _check_finite(block, source.stored_kind(block.name))
                for piece in takers.get(block.name, ()):
                    for row, taken in _taken(piece, block, source):
                        files.put(piece.name, row * taken[0].nbytes, taken)
                reader.give_back(block)
            digest = reader.digest if source.pickled is None else source.digest()
    write_index(folder, shards, sum(piece.bytes for piece in pieces))
    sizes = {shard.name: shard.size for shard in shards}
    return Written(digest, sizes, files.segments)


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
    bits: numpy.ndarray[Any, Any] = numbers.to(DTYPES[piece.dtype]).view(torch.uint8).numpy()
    bits = bits.view(raw(piece.dtype))
    if not _finite(bits, piece.dtype):
        raise not_finite(piece.source, str(DTYPES[piece.dtype]).removeprefix("torch."))
    return bits


def _check_finite(block: Block, dtype: str) -> None:
    if not _finite(block.rows, dtype):
        raise not_finite(block.name)


def _finite(bits: numpy.ndarray[Any, Any], dtype: str) -> bool:
    """Whether no number is NaN or infinite: their exponents are all ones, so their bits largest."""
    infinite = _INFINITE.get(dtype)
    if infinite is None or not bits.size:
        return True
    unsigned = bits.view(bits.dtype.str.replace("i", "u"))
    negative = infinite + (1 << 8 * bits.itemsize - 1)
    return int(bits.max()) < infinite and int(unsigned.max()) < negative


def _check_room(folder: Path, needed: int) -> None:
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", str(folder))


class _Files:
    """The planned files, each as large as it will be, and what was written into them."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.segments: dict[str, list[Segment]] = {shard.name: [] for shard in shards}
        self._folder, self._shards = folder, shards
        self._homes = {
            name: (shard.name, begin) for shard in shards for name, begin in shard.begins.items()
        }
        self._open: dict[str, FileIO] = {}
        self._stack, self._flusher = ExitStack(), _Flusher()

    def __enter__(self) -> _Files:
        with ExitStack() as stack:
            for shard in self._shards:
                file = stack.enter_context((self._folder / shard.name).open("wb", buffering=0))
                file.truncate(shard.size)  # what is not written is zero
                self._open[shard.name] = file
                self._put(shard.name, 0, memoryview(shard.header))
            stack.enter_context(self._flusher)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def put(self, piece: str, offset: int, rows: numpy.ndarray[Any, Any]) -> None:
        """Write rows of a piece, which begin at that byte of it."""
        name, begin = self._homes[piece]
        data = memoryview(numpy.ascontiguousarray(rows).view(numpy.uint8).data).cast("B")
        self._put(name, begin + offset, data)

    def _put(self, name: str, begin: int, data: memoryview) -> None:
        descriptor, written = self._open[name].fileno(), 0
        while written < len(data):  # one call writes two gigabytes at most
            written += os.pwrite(descriptor, data[written:], begin + written)
        self.segments[name].append(Segment(begin, written, zlib.crc32(data)))
        self._flusher.wrote(descriptor, written)


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
