"""Perplexity on plain text: what pruning costs besides the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.running import Running, answer_log_probs, stream
from prune_edit.tasks.prompts import Encoded, can_write, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.tasks.task import Example

_STORIES = 128
_LOGITS = 1 << 24  # numbers at once: 64 MiB in float32
_LARGEST_MEAN = 700.0  # exp of more is no float


@torch.no_grad()
def measure_perplexity(
    decoder: Decoder, texts: Sequence[str] | None = None, options: Running | None = None
) -> float | None:
    """exp of the mean negative log probability of every token but each text's first.

    Without `texts`, the test stories. A text longer than the model's positions is read in windows.
    None where the tokenizer cannot write the texts, or nothing in them is predicted.
    """
    options = options or Running()
    windows: list[Encoded] = []
    for text in stories("test", _STORIES) if texts is None else texts:
        ids = text_ids(decoder.tokenizer, text)
        if not can_write(decoder.tokenizer, text, ids):
            return None
        windows += _windows(ids, decoder.max_positions, Example(text, ""))
    total, tokens = 0.0, 0
    rows = max(1, _LOGITS // decoder.unembedding.shape[0])
    for batch in stream(decoder, windows, options, "perplexity"):
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]  # (A, D)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            found = answer_log_probs(decoder, states[part], batch.targets[part])
            total -= float(found.double().sum())
        tokens += len(batch.targets)
    return math.exp(min(total / tokens, _LARGEST_MEAN)) if tokens else None


def _windows(ids: Sequence[int], positions: int | None, example: Example) -> Iterator[Encoded]:
    """Pieces that overlap by one token, so that every token but the first is a target once."""
    step = positions or max(1, len(ids) - 1)
    for start in range(0, len(ids) - 1, step):
        yield Encoded(tuple(ids[start : start + step + 1]), 1, example)
