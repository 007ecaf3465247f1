"""Prompts: a task's examples as token ids, the questions of spaces, BOS and padding settled here.

- Space: `join` puts one between prompt and answer where words would otherwise run together, and
  leaves digits after digits and anything after a sign such as `=` alone. A prompt that ends in a
  space, or an answer that starts with one, is taken as written.
- Tokens: prompt and answer are encoded together, so the answer's tokens are those the model saw in
  training; a space at the prompt's end moves to the answer.
- BOS: whatever the tokenizer itself adds in front is kept, an end token it adds is dropped.
- Padding: positions come from the attention mask, so left and right padding give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prune_edit.errors import TaskError
from prune_edit.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_SPACED_LETTER = 0x2E7F  # beyond are the scripts that are written without spaces
_AFTER_THESE = ".,:;?!)\"'"


def join(prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and answer with the space that belongs between them at the answer's start."""
    if prompt.endswith(" "):
        return prompt.rstrip(" "), f" {answer.lstrip(' ')}"
    if not prompt or not answer or answer[0].isspace():
        return prompt, answer
    last, first = prompt[-1], answer[0]
    if max(ord(last), ord(first)) > _LAST_SPACED_LETTER or not first.isalnum():
        return prompt, answer
    if last in _AFTER_THESE or (last.isalnum() and not (last.isdigit() and first.isdigit())):
        return prompt, f" {answer}"
    return prompt, answer


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the answer's tokens are `ids[start:]`.

    Of several tasks, `part` is the one it belongs to, `weight` that one's.
    """

    ids: tuple[int, ...]
    start: int
    example: Example
    part: str = ""
    weight: float = 1.0

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.ids[self.start :]


@dataclass(frozen=True)
class Batch:
    """Padded examples: `input_ids`, `attention_mask` and `position_ids` are (B, T).

    `rows` (A,), `columns` (A,) and `targets` (A,) are the example, the position that predicts, and
    the token of each of the A answer tokens in the batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's keyword arguments."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the start token the tokenizer adds, without an end token."""
    return texts_ids(tokenizer, [text])[0]


def texts_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`text_ids` of many texts."""
    if not texts:
        return []
    specials, without = (
        tokenizer(["0"], add_special_tokens=add, verbose=False)["input_ids"][0]
        for add in (True, False)
    )
    # What the tokenizer adds in front and behind is the same for every text.
    front = next(
        (
            i
            for i in range(len(specials) - len(without) + 1)
            if specials[i : i + len(without)] == without
        ),
        0,
    )
    behind = len(specials) - len(without) - front
    every: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    return [ids[: len(ids) - behind] for ids in every] if behind > 0 else every


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, where: str = "task") -> Encoded:
    """One example's tokens. Raises TaskError where the tokenizer cannot write it."""
    return encode_all(tokenizer, [example], where)[0]


def can_write(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether no part of the text was lost to the unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids:
        return True
    # The unknown token can be an ordinary one (MathGPT's is `0`): then the text must come back.
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = str(tokenizer.decode(plain, skip_special_tokens=False))
    return "".join(back.split()) == "".join(text.split())


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    where: str,
    max_positions: int | None = None,
) -> list[Encoded]:
    """All examples' tokens.

    Raises TaskError where the tokenizer cannot write one, or the model has too few positions.
    """
    parts = [join(example.prompt, example.answer) for example in examples]
    fulls = texts_ids(tokenizer, [prompt + answer for prompt, answer in parts])
    # An empty prompt is whatever the tokenizer adds in front.
    fronts = texts_ids(tokenizer, [prompt for prompt, _ in parts])
    encoded = []
    for example, (prompt, answer), full, front in zip(examples, parts, fulls, fronts, strict=True):
        if full[: len(front)] != front:
            # The boundary falls inside a token: keep the prompt as the model will be given it.
            own = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
            full = front + list(own)
        if len(full) <= len(front):
            raise TaskError(
                f"{where}: answer {example.answer!r} of prompt {example.prompt!r} has no tokens of "
                "its own; give an answer that the tokenizer can write"
            )
        if not front:
            raise TaskError(
                f"{where}: prompt {example.prompt!r} has no tokens and the tokenizer adds none; "
                "give a prompt"
            )
        if not can_write(tokenizer, prompt + answer, full):
            raise TaskError(
                f"{where}: {(prompt + answer)!r} has words that are not in the model's vocabulary; "
                "reword it, or take a task that fits the model"
            )
        # The last token is only predicted, never read.
        if max_positions is not None and len(full) - 1 > max_positions:
            raise TaskError(
                f"{where}: {example.prompt!r} with its answer has {len(full)} tokens, the "
                f"model has {max_positions} positions; shorten it"
            )
        encoded.append(Encoded(tuple(full), len(front), example))
    return encoded


def collate(encoded: Sequence[Encoded], side: str = "right", pad_id: int = 0) -> Batch:
    """One padded batch; the last answer token is a target and no input."""
    width = max(len(row.ids) for row in encoded) - 1
    ids = torch.full((len(encoded), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(encoded):
        read = row.ids[:-1]
        first = width - len(read) if side == "left" else 0
        ids[i, first : first + len(read)] = torch.tensor(read)
        mask[i, first : first + len(read)] = 1
        rows += [i] * len(row.answer)
        columns += range(first + row.start - 1, first + len(read))
        targets += row.answer
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, mask, positions, *map(torch.tensor, (rows, columns, targets)))


def batches(
    encoded: Sequence[Encoded], max_tokens: int, side: str = "right"
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `max_tokens` padded tokens, shortest first, with the rows' numbers."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), i))
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order) and (stop + 1 - start) * len(encoded[order[stop]].ids) <= max_tokens
        ):
            stop += 1
        chosen = order[start:stop]
        yield chosen, collate([encoded[i] for i in chosen], side)
        start = stop
