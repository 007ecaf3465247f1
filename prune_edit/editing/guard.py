"""What an edit must leave alone: guard prompts, and how far an edited model strays on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.tasks.prompts import Batch, Encoded, can_write, collate, encode_all, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.tasks.task import Example, Task

LANGUAGE = "general language"
_TEXTS = 64
_ROWS = 64  # of one guard at once
_TEXT_ANSWERS = 8  # answers' tokens that a text has, at least
_TRAIN, _VALIDATION = 2048, 48


@dataclass(frozen=True)
class Guards:
    """Prompts by guard, for the search and for its checks."""

    train: dict[str, list[Encoded]]
    validation: dict[str, list[Encoded]]

    def some(self, count: int) -> dict[str, list[Encoded]]:
        """At most `count` train prompts a guard; of plain text, whose tokens all count, fewer."""
        return {
            name: rows[: max(1, count // _TEXT_ANSWERS) if name == LANGUAGE else count]
            for name, rows in self.train.items()
        }


@dataclass
class Watched:
    """Prompts by guard, and what the dense model says there, to see how far another strays.

    Every guard counts alike, and so does every answer token of a guard.
    """

    decoder: Decoder
    rows: Mapping[str, Sequence[Encoded]]

    def batches(self) -> Iterator[tuple[Batch, torch.Tensor, float]]:
        """Batches with the dense log probabilities (A, V), and what a token of them counts."""
        yield from self._kept if self._kept is not None else self._made()

    @torch.no_grad()
    def damage(self, edited: Callable[[], AbstractContextManager[None]]) -> float:
        """Divergence of the model inside `edited()` from the one outside, in nats a token."""
        found = 0.0
        for batch, dense, share in self.batches():
            with edited():
                logs = log_probs(self.decoder, batch)
            found += float((dense.exp() * (dense - logs)).sum()) * share
        return found

    @cached_property
    def _kept(self) -> list[tuple[Batch, torch.Tensor, float]] | None:
        """All batches, if they fit."""
        tokens = sum(len(row.answer) for rows in self.rows.values() for row in rows)
        size = 4 * tokens * self.decoder.unembedding.shape[0]
        return list(self._made()) if size <= self.decoder.work else None

    @torch.no_grad()
    def _made(self) -> Iterator[tuple[Batch, torch.Tensor, float]]:
        room = self.decoder.work // (64 * self.decoder.unembedding.shape[0])
        for some in self.rows.values():
            rows = sorted(some, key=lambda row: len(row.ids))  # little padding
            share = 1 / (len(self.rows) * sum(len(row.answer) for row in rows))
            start = 0
            while start < len(rows):
                end, total = start, 0
                while end < len(rows) and end - start < _ROWS and (not total or total < room):
                    total += len(rows[end].answer)
                    end += 1
                batch = collate(rows[start:end]).to(self.decoder.device)
                yield batch, log_probs(self.decoder, batch), share
                start = end


def guards_of(decoder: Decoder, tasks: Sequence[Task]) -> Guards:
    """The tasks' train and validation prompts, and plain text where the model can write it.

    A task that the tokenizer cannot write guards nothing.
    """
    found: dict[str, dict[str, list[Encoded]]] = {"train": {}, "validation": {}}
    for split, count in (("train", _TRAIN), ("validation", _VALIDATION)):
        for task in tasks:
            try:
                found[split][task.name] = encode_all(
                    decoder.tokenizer,
                    task.sample(split, count),
                    f"task {task.name!r}",
                    decoder.max_positions,
                )
            except TaskError:
                continue
        if texts := _texts(decoder, split):
            found[split][LANGUAGE] = texts
    return Guards(**found)


def _texts(decoder: Decoder, split: str) -> list[Encoded]:
    """Plain text, all of which is to be predicted; none where the tokenizer cannot write it."""
    rows = []
    for text in stories(split, _TEXTS if split == "train" else _TEXTS // 4):
        ids = text_ids(decoder.tokenizer, text)
        if not can_write(decoder.tokenizer, text, ids):
            return []
        limit = (decoder.max_positions or len(ids)) + 1
        if len(ids) > 1:
            rows.append(Encoded(tuple(ids[:limit]), 1, Example(text, "")))
    return rows


def log_probs(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """What the model says of every token where an answer's is predicted, (A, V)."""
    states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
    return decoder.unembed(states).float().log_softmax(-1)
