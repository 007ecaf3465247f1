"""Number words: 0 to 999,999 in English, as the prompts write them."""

from __future__ import annotations

from functools import cache

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@cache
def in_words(number: int) -> str:
    """`47` as `forty seven`, without hyphens or `and`."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest = TENS[number // 10 - 2], number % 10
        return f"{tens} {UNITS[rest]}" if rest else tens
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    head, rest = f"{in_words(number // size)} {name}", number % size
    return f"{head} {in_words(rest)}" if rest else head
