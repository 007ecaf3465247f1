"""Run a model over prompts: how, in which batches, and what its answers' log probabilities are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from prune_edit.decoder import Decoder
from prune_edit.tasks.prompts import Batch, Encoded, batches

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_LOGITS = 1 << 24  # numbers at once: 64 MiB in float32


def silent(what: str, done: int, total: int) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class Running:
    """What everything that runs a model may be told.

    seed            what random choices draw from
    batch_tokens    padded tokens run at once: memory, not the figures, depends on it
    progress        called as prompts are done
    """

    seed: int = 0
    batch_tokens: int = 4096
    progress: Progress = field(default=silent, compare=False, kw_only=True)


def stream(
    decoder: Decoder, prompts: Sequence[Encoded], running: Running, what: str
) -> Iterator[Batch]:
    """The prompts' batches on the decoder's device, with progress."""
    for _, batch in numbered(decoder, prompts, running, what):
        yield batch


def numbered(
    decoder: Decoder, prompts: Sequence[Encoded], running: Running, what: str
) -> Iterator[tuple[list[int], Batch]]:
    """`stream`, and the prompts' numbers in each batch."""
    done = 0
    running.progress(what, 0, len(prompts))
    for rows, batch in batches(prompts, running.batch_tokens):
        yield rows, batch.to(decoder.device)
        done += len(rows)
        running.progress(what, done, len(prompts))


def answer_log_probs(decoder: Decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log probability of each target (A,) at its normed state (A, D), float32.

    Logits are made for a few states at a time: a vocabulary can be large.
    """
    rows = max(1, _LOGITS // decoder.unembedding.shape[0])
    if torch.is_grad_enabled() or len(states) <= rows:
        return _log_probs(decoder, states, targets)
    parts = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.cat([_log_probs(decoder, some, wanted) for some, wanted in parts])


def best_tokens(decoder: Decoder, states: torch.Tensor) -> torch.Tensor:
    """The arg-max token of each normed state (A, D): (A,)."""
    rows = max(1, _LOGITS // decoder.unembedding.shape[0])
    return torch.cat([decoder.unembed(some).argmax(-1) for some in states.split(rows)])


def _log_probs(decoder: Decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = decoder.unembed(states).float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
