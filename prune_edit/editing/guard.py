"""What an edit must leave alone: guard prompts, and how far an edited model strays on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.hooks import scale
from prune_edit.tasks.prompts import Batch, Encoded, can_write, collate, encode_all, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.tasks.task import Example, Task
from prune_edit.units import Units

LANGUAGE = "general language"
_TEXTS = 64
_ROWS, _TEXT_ROWS = 24, 6  # of one guard in one step
_TRAIN, _VALIDATION = 2048, 48
_PRICED = 64  # of one guard


@dataclass(frozen=True)
class Guards:
    """Prompts by guard, for the search's steps and for its checks."""

    train: dict[str, list[Encoded]]
    validation: dict[str, list[Encoded]]

    def draw(
        self, rng: random.Random, count: int, damage: Mapping[str, float]
    ) -> Iterator[tuple[str, Batch]]:
        """Rows of `count` guards: of the one with most damage so far, more, and of some others."""
        names = sorted(self.train)
        worst = max(names, key=lambda name: damage.get(name, 0.0), default="")
        others = rng.sample([n for n in names if n != worst], min(count, len(names)) - 1)
        for name in [worst, *others] if names else []:
            rows = self.train[name]
            size = (_TEXT_ROWS if name == LANGUAGE else _ROWS) * (1 + (name == worst))
            yield name, collate(rng.sample(rows, min(size, len(rows))))


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


def divergence(dense: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """KL(dense, edited) of log probabilities (A, V), mean over tokens, in nats."""
    return (dense.exp() * (dense - edited)).sum(-1).mean()


def prices(decoder: Decoder, guards: Guards) -> tuple[torch.Tensor, torch.Tensor]:
    """What changing a unit costs the guards, (L, H) and (L, N): the diagonal of Fisher's matrix.

    The mean over guard prompts of the squared slope of the answer's log probability in the unit's
    factor; half of it times a change of factor squared is the divergence to second order, as far
    as units do not interact. Each guard counts alike.
    """
    shapes = {"heads": decoder.head_shape, "neurons": decoder.neuron_shape}
    total = {part: torch.zeros(shape) for part, shape in shapes.items()}
    for rows in guards.train.values():
        some = rows[:_PRICED]
        batch = collate(some).to(decoder.device)
        factors = {
            part: torch.ones(len(some), *shape, device=decoder.device, requires_grad=True)
            for part, shape in shapes.items()
        }
        with scale(decoder, Units(**factors)):
            found = log_probs(decoder, batch)
        said = found.gather(-1, batch.targets[:, None]).sum()
        slopes = torch.autograd.grad(said, list(factors.values()))
        for part, slope in zip(shapes, slopes, strict=True):
            # A slope is a row's sum over its answer's tokens; the divergence is a mean over tokens.
            total[part] += slope.pow(2).sum(0).cpu() / len(batch.targets)
    many = max(1, len(guards.train))
    return total["heads"] / many, total["neurons"] / many
