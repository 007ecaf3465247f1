"""Arithmetic: the paper's 16 prompts, four operations by four wordings, digits and number words.

Source: arXiv 2409.14144, section 3.1 and its appendix. Operands have up to one, two or three
digits; differences are not negative; products have a one-digit second factor; ratios are exact.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from prune_edit.tasks.numbers import in_words
from prune_edit.tasks.task import Example, Task, fraction_of

OPERATIONS = ("add", "sub", "mul", "div")
FORMS = ("digits", "words")
TEMPLATES: dict[str, tuple[str, ...]] = {
    operation: (
        f"The {noun} {link} {{a}} and {{b}} is",
        f"Q: What is {{a}} {verb} {{b}}? A:",
        f"{{a}} {verb} {{b}} is",
        f"{{a}}{sign}{{b}}=",
    )
    for operation, noun, link, verb, sign in (
        ("add", "sum", "of", "plus", "+"),
        ("sub", "difference", "between", "minus", "-"),
        ("mul", "product", "of", "times", "*"),
        ("div", "ratio", "of", "divides", "/"),
    )
}
_SYMBOL_TEMPLATE = 3  # `a+b=` is written without spaces, and so is its answer
_WORDINGS_OF_A_PAIR = 2  # of eight, for the operations with thousands of pairs
_THREE_DIGIT_PAIRS = 4000


def pairs(operation: str, digits: int) -> list[tuple[int, int]]:
    """Operand pairs whose larger operand has `digits` digits; a fixed sample for three digits."""
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    if operation == "mul":
        return [(a, b) for a in range(low, high) for b in range(10)]
    if operation == "div":
        divisors = range(1, min(high, 100))
        return [(a, b) for a in range(max(low, 1), high) for b in divisors if a % b == 0]
    if digits <= 2:
        found = [(a, b) for a in range(high) for b in range(high) if max(a, b) >= low]
    else:
        rng = random.Random(digits)
        found = [(rng.randrange(low, high), rng.randrange(high)) for _ in range(_THREE_DIGIT_PAIRS)]
        found = sorted({pair if rng.random() < 0.5 else pair[::-1] for pair in found})
    if operation == "sub":
        found = sorted({(max(pair), min(pair)) for pair in found})
    return found


def solve(operation: str, a: int, b: int) -> int:
    """The right answer."""
    return {"add": a + b, "sub": a - b, "mul": a * b, "div": a // b if b else 0}[operation]


def learnt_by_heart(operation: str, a: int, b: int) -> bool:
    """Whether the pair belongs to a table (products, ratios, one-digit sums and differences)."""
    return operation in ("mul", "div") or max(a, b) < 10


def example(operation: str, a: int, b: int, template: int, form: str) -> Example:
    """One prompt. Sums and differences are split by operand pair, tables by pair and wording."""
    write = str if form == "digits" else in_words
    prompt = TEMPLATES[operation][template].format(a=write(a), b=write(b))
    answer = write(solve(operation, a, b))
    key = f"{operation} {min(a, b)} {max(a, b)}"
    if learnt_by_heart(operation, a, b):
        key = f"{operation} {a} {b} {template} {form}"
    space = "" if template == _SYMBOL_TEMPLATE else " "
    return Example(prompt, space + answer, group=operation, key=key)


@cache
def load(operation: str | None = None, digits: tuple[int, ...] = (1, 2)) -> Task:
    """The arithmetic task, or the sub-task of one operation."""
    chosen = OPERATIONS if operation is None else (operation,)
    return Task(
        name="arithmetic" if operation is None else f"arithmetic/{operation}",
        examples=tuple(e for name in chosen for size in digits for e in _examples(name, size)),
        about="the paper's prompts: " + ", ".join(chosen) + "; digits and number words",
        adapts=digits == (1, 2),
    )


@cache
def load_padded() -> Task:
    """Three-digit sums for models that know nothing but digits, as MathGPT: `293480` -> `0773`."""
    rng = random.Random(0)
    drawn = {(rng.randrange(1000), rng.randrange(1000)) for _ in range(2 * _THREE_DIGIT_PAIRS)}
    return Task(
        name="arithmetic/padded",
        examples=tuple(
            Example(f"{a:03d}{b:03d}", f"{a + b:04d}", key=f"add {min(a, b)} {max(a, b)}")
            for a, b in sorted(drawn)
        ),
        about="three-digit sums, zero-padded and nothing between, for digit-only vocabularies",
    )


def _examples(operation: str, digits: int) -> Iterator[Example]:
    wordings = [(template, form) for template in range(4) for form in FORMS]
    for a, b in pairs(operation, digits):
        chosen = wordings
        if not learnt_by_heart(operation, a, b):
            first = int(fraction_of(f"wording {operation} {a} {b}") * len(wordings))
            # Steps of five reach both forms and all four templates as the pairs go by.
            chosen = [wordings[(first + 5 * i) % len(wordings)] for i in range(_WORDINGS_OF_A_PAIR)]
        for template, form in chosen:
            yield example(operation, a, b, template, form)
