"""Perplexity on plain text: what pruning costs besides the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.running import Running, answer_log_probs, numbered
from prune_edit.tasks.prompts import Encoded, can_write, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.tasks.task import Example

_STORIES = 128
_LOGITS = 1 << 24  # numbers at once: 64 MiB in float32
_LARGEST_MEAN = 700.0  # exp of more is no float


def measure_perplexity(
    decoder: Decoder, texts: Sequence[str] | None = None, options: Running | None = None
) -> float | None:
    """exp of the mean negative log probability of every token but each text's first.

    Without `texts`, the test stories. A text longer than the model's positions is read in windows.
    None where the tokenizer cannot write the texts, or nothing in them is predicted.
    """
    losses = text_losses(decoder, texts, options)
    if losses is None:
        return None
    total, tokens = (sum(column) for column in zip(*losses, strict=True))
    return math.exp(min(total / tokens, _LARGEST_MEAN)) if tokens else None


def plain_texts() -> list[str]:
    """The test stories, which perplexity is of where no texts are given."""
    return list(stories("test", _STORIES))


@torch.no_grad()
def text_losses(
    decoder: Decoder, texts: Sequence[str] | None = None, options: Running | None = None
) -> list[tuple[float, int]] | None:
    """Negative log probability in nats and predicted tokens of each text, in their order.

    As `measure_perplexity`, which is exp of their sums' ratio.
    """
    options = options or Running()
    windows: list[Encoded] = []
    owners: list[int] = []
    texts = plain_texts() if texts is None else texts
    for number, text in enumerate(texts):
        ids = text_ids(decoder.tokenizer, text)
        if not can_write(decoder.tokenizer, text, ids):
            return None
        pieces = list(_windows(ids, decoder.max_positions, Example(text, "")))
        windows += pieces
        owners += [number] * len(pieces)
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    rows = max(1, _LOGITS // decoder.unembedding.shape[0])
    for numbers, batch in numbered(decoder, windows, options, "perplexity"):
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]  # (A, D)
        places = [owners[numbers[row]] for row in batch.rows.tolist()]
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            found = answer_log_probs(decoder, states[part], batch.targets[part])
            for place, value in zip(places[part], found.double().tolist(), strict=True):
                nats[place] -= value
                tokens[place] += 1
    return list(zip(nats, tokens, strict=True))


def _windows(ids: Sequence[int], positions: int | None, example: Example) -> Iterator[Encoded]:
    """Pieces that overlap by one token, so that every token but the first is a target once."""
    step = positions or max(1, len(ids) - 1)
    for start in range(0, len(ids) - 1, step):
        yield Encoded(tuple(ids[start : start + step + 1]), 1, example)
