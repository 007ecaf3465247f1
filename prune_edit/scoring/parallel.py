"""One score by several processes: who does which shard, and one end for all when one fails.

`accelerate launch -m prune_edit score` (or torchrun) starts the same command several times; RANK,
WORLD_SIZE and MASTER_ADDR say so. Shards go round the processes, and each round's sums are
exchanged on the CPU and added in the order of the shards by every process. The scores are
therefore those of a single process to the last bit, given the same kind of device and the same
number of threads a process, both of which decide how a matrix product is summed. Where shards are
fewer than processes, a few prompts on many GPUs, every process does all prompts for its share of
the heads and layers; units then share their products with others than in a single process, and the
scores agree to 1e-6. (So does a model whose layers are read from disk, which is cut differently,
offload.py.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from prune_edit import errors
from prune_edit.decoder import Decoder
from prune_edit.errors import PruneEditError
from prune_edit.scoring.options import Options
from prune_edit.scoring.shards import (
    Additive,
    Part,
    Score,
    Shard,
    Sums,
    Tensors,
    in_order,
    shards_of,
)
from prune_edit.tasks.prompts import Encoded

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # a shard may take long, and main alone does what is not additive


class Store(Protocol):
    """Where finished shards are kept; cache.py has the real one."""

    def load_sums(self) -> Sums | None:
        """What an earlier run finished."""

    def save_sums(self, sums: Sums) -> None:
        """Keep what is finished so far."""


@dataclass(frozen=True)
class Workers:
    """The processes of this run; one by default."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def local(self, device: str) -> str:
        """The device of this process: its own GPU, where there are several processes."""
        if device == "cuda" and self.count > 1:
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return device

    def all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in every process, by rank.

        Raises in every process what it raised in the first process where it did.
        """
        if self.count == 1:
            return [work()]
        failure: tuple[str, str] | None = None
        value: T | None = None
        try:
            value = work()
        except PruneEditError as error:
            failure = type(error).__name__, str(error)
        except Exception as error:
            failure = "", f"unexpected {type(error).__name__} in process {self.rank}: {error}"
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, (failure, value), group=self.group)
        except RuntimeError:
            raise PruneEditError(
                "another process of this run ended before its work was done; the same command "
                "goes on from the last finished shard"
            ) from None
        for failed, _ in found:
            if failed is not None:
                raise getattr(errors, failed[0], PruneEditError)(failed[1])
        return [value for _, value in found]

    @property
    def share(self) -> tuple[int, int]:
        """This process's number and how many there are, for `Options.share`."""
        return self.rank, self.count

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, in the order of their ranks, for `Options.gather`."""
        parts = self.all(lambda: tensor.cpu())
        found = parts[0]
        for part in parts[1:]:
            found = found + part
        return found.to(tensor.device)

    def here(self, work: Callable[[], T]) -> T:
        """What `work` gives in this process, once it has ended well in every one."""
        found: list[T] = []
        self.all(lambda: found.append(work()))
        return found[0]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, the only one that does it."""
        return self.all(lambda: work() if self.main else None)[0]  # type: ignore[return-value]


@contextmanager
def joined(launched: bool = True) -> Iterator[Workers]:
    """The processes that a launcher started together; only this one where there are no others."""
    count = int(os.environ.get("WORLD_SIZE", "1") or 1)
    named = all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR"))
    if not launched or count == 1 or not named:
        yield Workers()
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    # Scores are small and on the CPU: gloo also where the caller talks by another backend.
    plain = own or dist.get_backend() == "gloo"
    group = None if plain else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if own:
            dist.destroy_process_group()


def run_shards(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    method: Additive | Score,
    options: Options,
    workers: Workers | None = None,
    store: Store | None = None,
    size: int | None = None,
) -> Part:
    """Heads (L, H) and neurons (L, N) of all prompts, in shards of `size` where that is possible.

    Where there are fewer shards than processes, all do every shard, each its share of the units. A
    method that is not additive is run by the main process on all prompts at once.
    """
    workers = workers or Workers()
    if not isinstance(method, Additive):
        score = method
        return workers.from_main(lambda: score(decoder, *in_order(prompts, options)))
    sums = sum_shards(decoder, prompts, method, options, workers, store, size)
    return method.finish(decoder, sums.tensors)


def sum_shards(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    method: Additive,
    options: Options,
    workers: Workers,
    store: Store | None = None,
    size: int | None = None,
) -> Sums:
    """What all shards add up to."""
    kept = workers.from_main(lambda: None if store is None else store.load_sums())
    # A killed run's shards are gone on with, whatever size they would have now.
    size = size if kept is None else kept.size
    shards = shards_of(prompts, options, size, decoder.unembedding.shape[1])
    sums = kept or Sums(size=size or 0)
    together = workers.count > 1 and len(shards) < workers.count
    shared = replace(options, share=workers.share, gather=workers.total) if together else options

    def collect(shard: Shard, before: int) -> Tensors:
        shown = _part_of(shared, before, len(prompts), len(shard.prompts))
        return method.collect(decoder, shard.prompts, shard.options(shown))

    step = 1 if together else workers.count
    while sums.done < len(shards):
        first, own = sums.done, sums.done + (0 if together else workers.rank)
        before = sum(len(shard.prompts) for shard in shards[:own])
        if together:
            sums.add(collect(shards[own], before))
        else:
            mine = shards[own : own + 1] if own < first + step else []
            for parts in workers.all(lambda: [collect(shard, before) for shard in mine]):  # noqa: B023
                for part in parts:
                    sums.add(part)
        if workers.main and store is not None:
            store.save_sums(sums)
    return sums


def _part_of(options: Options, done: int, total: int, part: int) -> Options:
    """The same options with the progress of one shard shown as progress of all."""

    def progress(what: str, now: int, of: int) -> None:
        options.progress(what, done + part * now // max(1, of), total)

    return replace(options, progress=progress)
