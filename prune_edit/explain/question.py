"""Question: a prompt and the one token of its answer that is explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.explain.values import Shown, Tokens
from prune_edit.tasks.prompts import Batch, Encoded, can_write, collate, encode_all, text_ids
from prune_edit.tasks.task import Example

_SPACES = 3  # tokens of nothing but space that may stand before what is explained
_LIKELIEST = 5


@dataclass(frozen=True)
class Question(Shown):
    """A prompt as the model reads it, and what it says next.

    `tokens` are all it reads, the answer's earlier ones included; `answer` is the token that is
    explained, at `probability`, the likeliest of `says`; `notes` what a reader should know.
    """

    kind: ClassVar[str] = "question"

    prompt: str
    tokens: tuple[str, ...]
    answer: str
    probability: float
    says: Tokens
    notes: tuple[str, ...]
    row: Encoded = field(repr=False, metadata={"json": False})

    def batch(self, decoder: Decoder) -> Batch:
        """The question alone, on the decoder's device."""
        return collate([self.row]).to(decoder.device)


@torch.no_grad()
def ask(
    decoder: Decoder, prompt: str, answer: str | None = None, token: int | None = None
) -> Question:
    """What the model says after a prompt, a token that is more than a space.

    An `answer` of several tokens is explained at its `token`-th (from 1; the first, unless it is a
    space), after those before it. Where the model says something else there, that is explained, and
    noted. Raises TaskError for a prompt that the tokenizer cannot write or the model has no
    positions for, and for a token that the answer does not have.
    """
    notes: list[str] = []
    if answer is None:
        if token is not None:
            raise TaskError(f"token {token} is of no answer; give --answer too")
        ids = _read(decoder, prompt)
        wanted = None
    else:
        ids, wanted = _within(decoder, prompt, answer, token, notes)
    chances = _chances(decoder, ids)
    for _ in range(_SPACES):
        best = int(chances.argmax())
        if wanted is not None or not _blank(decoder, best):
            break
        notes.append("the model writes a space first; explained is what it says after it")
        ids = [*ids, best]
        _check_length(decoder, prompt, len(ids))
        chances = _chances(decoder, ids)
    best = int(chances.argmax())
    if wanted is not None and wanted != best:
        notes.append(
            f"the model says {shown(decoder, best)!r} (p {float(chances[best]):.4f}), not "
            f"{shown(decoder, wanted)!r} (p {float(chances[wanted]):.4f}); explained is what it "
            "says"
        )
    row = Encoded((*ids, best), len(ids), Example(prompt, shown(decoder, best)))
    top = chances.topk(min(_LIKELIEST, len(chances)))
    says = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Question(
        prompt=prompt,
        tokens=tuple(shown(decoder, each) for each in ids),
        answer=shown(decoder, best),
        probability=float(chances[best]),
        says=tuple((shown(decoder, each), float(chance)) for each, chance in says),
        notes=tuple(notes),
        row=row,
    )


def token_rows(prompts: Sequence[Encoded]) -> list[Encoded]:
    """Every answer token as a prompt of its own, those before it given."""
    return [
        Encoded(
            row.ids[: place + 1],
            place,
            replace(row.example, choices=()),
            row.part,
            row.weight,
        )
        for row in prompts
        for place in range(row.start, len(row.ids))
    ]


def shown(decoder: Decoder, token: int) -> str:
    """A token as a reader knows it; its piece of the vocabulary where it is nothing but space."""
    text = str(decoder.tokenizer.decode([token]))
    if text.strip() and "\ufffd" not in text:
        return text.strip()
    piece = decoder.tokenizer.convert_ids_to_tokens(token)
    return str(piece) if piece is not None else text


def _blank(decoder: Decoder, token: int) -> bool:
    return not str(decoder.tokenizer.decode([token])).strip()


def _chances(decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Probabilities of the next token, (V,) float32."""
    batch = collate([Encoded((*ids, 0), len(ids), Example("", ""))]).to(decoder.device)
    state = decoder.final_states(**batch.inputs)[0, -1]
    return decoder.unembed(state).float().softmax(-1).cpu()


def _read(decoder: Decoder, prompt: str) -> list[int]:
    """The prompt's tokens. Raises TaskError."""
    ids = text_ids(decoder.tokenizer, prompt.rstrip(" "))
    if not ids:
        raise TaskError(
            f"prompt {prompt!r} has no tokens and the tokenizer adds none; give a prompt"
        )
    if not can_write(decoder.tokenizer, prompt, ids):
        raise TaskError(
            f"prompt {prompt!r} has words that are not in the model's vocabulary; reword it, or "
            "give a --model that knows them"
        )
    _check_length(decoder, prompt, len(ids))
    return ids


def _check_length(decoder: Decoder, prompt: str, length: int) -> None:
    most = decoder.max_positions
    if most is not None and length > most:
        short = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        raise TaskError(
            f"prompt {short!r} has {length} tokens, the model has {most} positions; shorten it"
        )


def _within(
    decoder: Decoder, prompt: str, answer: str, token: int | None, notes: list[str]
) -> tuple[list[int], int]:
    """The tokens before the one that is explained, and that one. Raises TaskError."""
    example = Example(prompt, answer)
    (row,) = encode_all(decoder.tokenizer, [example], "explain", decoder.max_positions)
    parts = row.answer
    if token is not None and not 1 <= token <= len(parts):
        raise TaskError(
            f"token {token} is not in answer {answer!r}, which has {len(parts)}; give 1 to "
            f"{len(parts)}"
        )
    place = next((i for i, part in enumerate(parts) if not _blank(decoder, part)), 0)
    place = place if token is None else token - 1
    words = [part for part in parts if not _blank(decoder, part)]
    if len(words) > 1 and token is None:
        split = ", ".join(repr(shown(decoder, part)) for part in parts)
        notes.append(
            f"the tokenizer splits the answer into {split}; explained is "
            f"{shown(decoder, parts[place])!r}, --token {place + 2} explains the next"
        )
    return list(row.ids[: row.start + place]), parts[place]
