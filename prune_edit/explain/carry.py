"""Sums told apart by what a digit of their answer needs: memory alone, or a carry.

arXiv 2409.14144, section 3.3. 15+32=47 is memorised digit by digit; in 15+37=52 the first digit is
one more than 1 and 3 make (one less, for a borrow). The kind is a token's, not a sum's: the last
digit never needs a carry. A token of several digits needs one if any of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prune_edit.decoder import Decoder
from prune_edit.explain.heads import HeadMaps, explain_heads
from prune_edit.explain.question import token_rows
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded

KINDS = ("memorize", "change-one")


def carries(operation: str, a: int, b: int, place: int) -> bool:
    """Whether a carry (a borrow, for `sub`) enters the digit at `place`, 0 the last."""
    low = int(10**place)
    if operation == "sub":
        return a % low < b % low
    return a % low + b % low >= low


def carry_rows(decoder: Decoder, prompts: Sequence[Encoded]) -> list[Encoded]:
    """The answer tokens of sums and differences in digits, each a prompt grouped by its kind.

    Operands come from the built-in tasks' keys; prompts of other tasks have none and are left out.
    """
    found = []
    for row in prompts:
        asked = _operands(row)
        if asked is None:
            continue
        texts = [str(decoder.tokenizer.decode([token])).strip() for token in row.answer]
        digits = "".join(texts)
        if not digits.isdecimal():
            continue
        left = len(digits)
        for part, text in zip(token_rows([row]), texts, strict=True):
            if text:
                places = range(left - len(text), left)
                kind = KINDS[any(carries(*asked, place) for place in places)]
                group = f"{asked[0]}, {kind}"
                found.append(replace(part, example=replace(part.example, group=group)))
            left -= len(text)
    return found


def explain_carries(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> HeadMaps | None:
    """What heads do for memorised digits and for those with a carry; None without such prompts."""
    rows = carry_rows(decoder, prompts)
    return explain_heads(decoder, rows, options) if rows else None


def _operands(row: Encoded) -> tuple[str, int, int] | None:
    """Operation and operands by the example's key, as `tasks/arithmetic.py` writes it."""
    parts = row.example.key.split()
    if len(parts) < 3 or parts[0] not in ("add", "sub"):
        return None
    if not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    a, b = int(parts[1]), int(parts[2])
    # A pair's key has the smaller first; a difference is never negative.
    return parts[0], max(a, b), min(a, b)
