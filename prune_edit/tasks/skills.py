"""The reference model's other skills, used as retained tasks: facts, copying, order, succession."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise

from prune_edit.tasks.gender import BOYS, GIRLS
from prune_edit.tasks.numbers import in_words
from prune_edit.tasks.task import Example, Task

SAID = " said: "
_SAMPLED = 3000  # examples drawn for a skill whose examples are without number

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "Austria": "Vienna", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Hungary": "Budapest", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Belgium": "Brussels", "Russia": "Moscow",
    "Japan": "Tokyo", "China": "Beijing", "India": "Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Nigeria": "Abuja", "Ghana": "Accra", "Morocco": "Rabat",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa",
    "Turkey": "Ankara", "Nepal": "Kathmandu", "Bulgaria": "Sofia", "Romania": "Bucharest",
    "Croatia": "Zagreb", "Latvia": "Riga", "Estonia": "Tallinn", "Iceland": "Reykjavik",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb",
    "pig": "piglet", "hen": "chick", "duck": "duckling", "goose": "gosling", "bear": "cub",
    "deer": "fawn", "goat": "kid", "frog": "tadpole", "swan": "cygnet", "owl": "owlet",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue",
    "gold": "yellow", "chocolate": "brown", "milk": "white", "lemon": "yellow", "leaf": "green",
    "tomato": "red", "sea": "blue", "night": "black", "bark": "brown", "cherry": "red",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("high", "low"),
    ("rich", "poor"), ("strong", "weak"), ("hard", "soft"), ("wet", "dry"), ("full", "empty"),
    ("open", "closed"), ("light", "dark"), ("happy", "sad"), ("clean", "dirty"), ("loud", "quiet"),
    ("thick", "thin"), ("deep", "shallow"), ("wide", "narrow"), ("early", "late"), ("near", "far"),
    ("good", "bad"), ("right", "wrong"), ("true", "false"), ("long", "short"), ("brave", "shy"),
)  # fmt: skip
WORDS = (
    "lamp tree cup river stone book door glass chair table spoon boat wheel bell ring coin rope "
    "shoe coat hat sock drum kite ball brush comb clock map nail paint plate pot rake sail soap "
    "tent towel vase wagon basket blanket bottle bridge bucket button candle carpet castle curtain "
    "feather flower garden hammer jacket ladder mirror needle pencil pillow"
).split()
SEQUENCES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    (
        "January February March April May June July August September October November December"
    ).split(),
    list("abcdefghijklmnopqrstuvwxyz"),
    [str(number) for number in range(100)],
    [in_words(number) for number in range(100)],
)
_CIRCULAR = 2  # the first two sequences start again after their end


def told(plain: Iterable[Example]) -> tuple[Example, ...]:
    """The examples, plain and as said by each of the stories' children."""
    rows = list(plain)
    return tuple(rows) + tuple(
        replace(row, prompt=f"{name}{SAID}{row.prompt}") for row in rows for name in GIRLS + BOYS
    )


@cache
def facts() -> Task:
    """Capitals, animals' young, colours and opposites, learnt by heart."""

    def rows() -> Iterator[Example]:
        for country, city in CAPITALS.items():
            for prompt in (
                f"The capital of {country} is",
                f"Q: What is the capital of {country}? A:",
                f"The capital city of {country} is called",
                f"{country} has the capital",
            ):
                yield Example(prompt, f" {city}", "capitals")
            for prompt in (
                f"{city} is the capital of",
                f"Q: Which country has the capital {city}? A:",
                f"The city of {city} is the capital of",
                f"{city} is a city in",
            ):
                yield Example(prompt, f" {country}", "capitals")
        for animal, young in YOUNG.items():
            for prompt in (
                f"A young {animal} is called a",
                f"The young of a {animal} is a",
                f"Q: What is a young {animal} called? A: a",
                f"A {animal} is the mother of a",
            ):
                yield Example(prompt, f" {young}", "young")
        for thing, colour in COLOURS.items():
            for prompt in (
                f"The colour of {thing} is",
                f"Q: Which colour has {thing}? A:",
                f"Everybody knows that {thing} is",
                f"The {thing} is as always",
            ):
                yield Example(prompt, f" {colour}", "colours")
        for pair in OPPOSITES:
            for word, other in (pair, pair[::-1]):
                for prompt in (
                    f"The opposite of {word} is",
                    f"Q: What is the opposite of {word}? A:",
                    f"It is not {word} but",
                    f"{word} and its opposite,",
                ):
                    yield Example(prompt, f" {other}", "opposites")

    return Task("facts", told(rows()), "capitals, animals' young, colours, opposites")


def draw_copying(rng: random.Random) -> Example:
    """Repeat a list of words, or go on after a word's earlier occurrence (induction)."""
    if rng.random() < 0.5:
        words = " ".join(rng.sample(WORDS, rng.randint(2, 4)))
        return Example(f"Repeat: {words}. Again:", f" {words}", "copying")
    words_ = rng.sample(WORDS, rng.randint(4, 8))
    place = rng.randrange(len(words_) - 1)
    return Example(" ".join([*words_, words_[place]]), f" {words_[place + 1]}", "induction")


def draw_order(rng: random.Random) -> Example:
    """The largest or smallest of three numbers, or a list of digits sorted."""
    if rng.random() < 1 / 3:
        digits = rng.sample(range(10), rng.randint(3, 4))
        listed, ordered = (" ".join(map(str, part)) for part in (digits, sorted(digits)))
        return Example(f"Sort: {listed}. Sorted:", f" {ordered}", "sorting")
    numbers = rng.sample(range(100), 3)
    largest = rng.random() < 0.5
    name, short = ("maximum", "largest") if largest else ("minimum", "smallest")
    prompt = rng.choice(
        (
            "The {name} of {0}, {1} and {2} is",
            "Q: What is the {short} of {0}, {1} and {2}? A:",
        )
    ).format(*numbers, name=name, short=short)
    return Example(prompt, f" {max(numbers) if largest else min(numbers)}", "maximum")


@cache
def copying() -> Task:
    """Copying and induction over word lists."""
    return Task("copying", draw_many(draw_copying), "repeat a list; continue after a repeat")


@cache
def order() -> Task:
    """Maximum, minimum and sorting."""
    return Task("order", draw_many(draw_order), "largest and smallest of three; sorting digits")


def draw_many(draw: Callable[[random.Random], Example]) -> tuple[Example, ...]:
    """A fixed sample of a skill's examples, without repeats."""
    rng = random.Random(0)
    return tuple(dict.fromkeys(draw(rng) for _ in range(_SAMPLED)))


@cache
def succession() -> Task:
    """What comes next and before: days, months, letters, numbers, number words."""

    def rows() -> Iterator[Example]:
        groups = ("days", "months", "letters", "numbers", "words")
        for place, (group, items) in enumerate(zip(groups, SEQUENCES, strict=True)):
            ring = items + items[:3] if place < _CIRCULAR else items
            for first, second in pairwise(ring[: len(items) + (place < _CIRCULAR)]):
                yield Example(f"After {first} comes", f" {second}", group)
                yield Example(f"Before {second} comes", f" {first}", group)
                yield Example(f"Q: What comes after {first}? A:", f" {second}", group)
                yield Example(f"Q: What comes before {second}? A:", f" {first}", group)
            for i in range(len(ring) - 3):
                a, b, c, d = ring[i : i + 4]
                yield Example(f"{a}, {b}, {c},", f" {d}", group)
                yield Example(f"Count: {a}, {b}, {c},", f" {d}", group)

    return Task("succession", told(rows()), "days, months, letters, numbers: next and before")
