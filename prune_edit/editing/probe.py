"""Pairs as one model's tokens, each text run once however many answers are asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.tasks.prompts import Encoded, encode_all, join
from prune_edit.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNEVEN = ("refuse", "drop", "keep")
"""What to do with pairs whose sides do not have their tokens in the same places."""

_TOKENS = 16384  # padded, at once


@dataclass(frozen=True)
class Texts:
    """Distinct texts to read, and which tokens are asked for at the end of each.

    `ids` are what each text reads; of the K questions, `text` (K,) is the text, `token` (K,) the
    token asked for, `row` (K,) the sum it goes into and `weights` (W, K) what it counts there.
    """

    ids: tuple[tuple[int, ...], ...]
    text: torch.Tensor
    token: torch.Tensor
    row: torch.Tensor
    weights: torch.Tensor
    rows: int

    @cached_property
    def inputs(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The model's arguments (B, T), padded on the right, and the last position of each (B,)."""
        width = max(map(len, self.ids))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in self.ids])
        ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in self.ids])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return inputs, mask.sum(1) - 1

    def sums(self, decoder: Decoder) -> torch.Tensor:
        """Weighted sums of log probabilities, (W, rows) in nats, with gradients if any."""
        inputs, last = self.inputs
        step = max(1, _TOKENS // inputs["input_ids"].shape[1])
        logs = []
        for start in range(0, len(last), step):
            part = {
                name: each[start : start + step].to(decoder.device) for name, each in inputs.items()
            }
            ends = last[start : start + step].to(decoder.device)
            states = decoder.final_states(**part)
            states = states[torch.arange(len(ends), device=states.device), ends]
            logs.append(decoder.unembed(states).float().log_softmax(-1))
        found = torch.cat(logs)[self.text, self.token].cpu() * self.weights
        return found.new_zeros(len(found), self.rows).index_add(1, self.row, found)


def texts_of(rows: Sequence[Sequence[tuple[Encoded, tuple[float, ...]]]]) -> Texts:
    """`sums` of each row: of its encoded examples' answers by their weights."""
    numbers: dict[tuple[int, ...], int] = {}
    asked: list[tuple[int, int, int, tuple[float, ...]]] = []
    for number, parts in enumerate(rows):
        for encoded, weights in parts:
            for place in range(encoded.start, len(encoded.ids)):
                text = numbers.setdefault(encoded.ids[:place], len(numbers))
                asked.append((text, encoded.ids[place], number, weights))
    texts, tokens, places, counts = (list(column) for column in zip(*asked, strict=True))
    return Texts(
        tuple(numbers),
        torch.tensor(texts),
        torch.tensor(tokens),
        torch.tensor(places),
        torch.tensor(counts, dtype=torch.float32).T,
        len(rows),
    )


@dataclass(frozen=True)
class Probe:
    """Pairs ready to be asked."""

    pairs: tuple[Example, ...]
    texts: Texts

    def gaps(self, decoder: Decoder) -> torch.Tensor:
        """The bias of every pair, (P,) in nats."""
        return self.texts.sums(decoder)[0]

    def both(self, decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
        """The bias of every pair, and the mean log probability of its answers, (P,) in nats."""
        gaps, levels = self.texts.sums(decoder)
        return gaps, levels


def probe_pairs(decoder: Decoder, pairs: Sequence[Example], where: str = "concept") -> Probe:
    """The pairs as the model's tokens. Raises TaskError where the tokenizer cannot write one."""
    parts = [_parts(pair) for pair in pairs]
    flat = [example for row in parts for example, _ in row]
    rows = iter(encode_all(decoder.tokenizer, flat, where, decoder.max_positions))
    encoded = [[(next(rows), (weight, 1 / len(row))) for _, weight in row] for row in parts]
    return Probe(tuple(pairs), texts_of(encoded))


def _parts(pair: Example) -> list[tuple[Example, float]]:
    """The prompts with answers that a pair's bias is made of, and the weight of each."""
    sides = [(pair.prompt, 1.0)]
    if pair.contrast is not None:
        sides.append((pair.contrast, -1.0))
    others = [choice for choice in pair.choices if choice != pair.answer]
    found = []
    for prompt, sign in sides:
        found.append((Example(prompt, pair.answer), sign))
        found += [(Example(prompt, other), -sign / len(others)) for other in others]
    return found


def sides(pairs: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Two lists of examples whose answers' log probabilities differ by the bias, pair by pair.

    Of a pair without a contrast, the answer and the first other choice after the same prompt.
    """
    first, second = [], []
    for pair in pairs:
        plain = replace(pair, contrast=None, choices=())
        if pair.contrast is not None:
            other = replace(plain, prompt=pair.contrast)
        else:
            other = replace(plain, answer=next(c for c in pair.choices if c != pair.answer))
        first.append(plain)
        second.append(other)
    return first, second


def even_pairs(
    decoder: Decoder, pairs: Sequence[Example], uneven: str, where: str
) -> tuple[Example, ...]:
    """The pairs whose tokens can be compared place by place; all of them for `keep`.

    Compared are the places where the answer is predicted, which differ if prompt and contrast have
    different numbers of tokens, and the answer's tokens, of which a word should be one. Raises
    TaskError for the first that does not fit, unless told to `drop` those.
    """
    if uneven == "keep":
        return tuple(pairs)
    fit = []
    for pair in pairs:
        why = _unevenness(decoder, pair, where)
        if why is None:
            fit.append(pair)
        elif uneven == "refuse":
            raise TaskError(
                f"{where}: {why}; leave such pairs out with --uneven drop, or take them as they "
                "are with --uneven keep"
            )
    return tuple(fit)


def _unevenness(decoder: Decoder, pair: Example, where: str) -> str | None:
    """Why a pair's sides cannot be compared place by place, or None."""
    tokenizer = decoder.tokenizer
    rows = [row for row, _ in _parts(pair)]
    encoded = encode_all(tokenizer, rows, where, decoder.max_positions)
    first = encoded[0]
    for row in encoded[1:]:
        same = row.example.answer == pair.answer
        if row.start != first.start:
            return (
                f"prompt {pair.prompt!r} has {first.start} tokens and its contrast "
                f"{row.example.prompt!r} {row.start}, so the answer has another place"
            )
        if same and row.answer != first.answer:
            return f"answer {pair.answer!r} has other tokens after {row.example.prompt!r}"
    for row in encoded:
        pieces = _answer_pieces(tokenizer, row)
        words = row.example.answer.split()
        if pieces > len(words):
            return (
                f"the tokenizer splits answer {row.example.answer.strip()!r} into {pieces} tokens, "
                "whose later ones say little about the prompt"
            )
    return None


def _answer_pieces(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> int:
    """Tokens of an answer, not counting those that are nothing but a space."""
    _, answer = join(row.example.prompt, row.example.answer)
    texts = [str(tokenizer.decode([token])) for token in row.answer]
    blank = sum(not text.strip() for text in texts)
    return len(texts) - min(blank, len(answer) - len(answer.lstrip()))
