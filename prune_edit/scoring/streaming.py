"""What every method shares: batches, targets, and sums that do not depend on order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.tasks.prompts import Batch, Encoded, batches

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class Options:
    """What a method may be told: seed, memory, how many top heads CNA ablates, progress.

    Without `neurons` a method may leave their scores NaN, where only heads are asked for.
    """

    seed: int = 0
    batch_tokens: int = 4096
    top_heads: int = 1
    neurons: bool = True
    progress: Progress = field(default=silent, compare=False)


def stream(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, what: str
) -> Iterator[Batch]:
    """The prompts' batches on the decoder's device, with progress."""
    done = 0
    options.progress(what, 0, len(prompts))
    for rows, batch in batches(prompts, options.batch_tokens):
        yield batch.to(decoder.device)
        done += len(rows)
        options.progress(what, done, len(prompts))


@torch.no_grad()
def predicted_targets(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> list[Encoded]:
    """The same prompts with the model's own next token as the answer (`--target predicted`)."""
    fronts = [replace(row, ids=(*row.ids[: row.start], 0)) for row in prompts]
    found: list[Encoded] = []
    for rows, batch in batches(fronts, options.batch_tokens):
        batch = batch.to(decoder.device)
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        tokens = decoder.unembed(states).argmax(-1).tolist()
        for i, token in zip(rows, tokens, strict=True):
            found.append(replace(fronts[i], ids=(*fronts[i].ids[:-1], token)))
    order = {id(row.example): i for i, row in enumerate(prompts)}
    return sorted(found, key=lambda row: order[id(row.example)])


def answer_log_probs(decoder: Decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log probability of each target (A,) at its normed state (A, D), float32."""
    logits = decoder.unembed(states).float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
