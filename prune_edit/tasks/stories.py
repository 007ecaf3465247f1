"""Plain short text for perplexity: little stories from a fixed grammar."""

from __future__ import annotations

import random
from functools import cache

from prune_edit.tasks.gender import BOYS, GIRLS, PRONOUNS
from prune_edit.tasks.skills import WORDS
from prune_edit.tasks.task import split_of

_PLACES = "park forest beach market school farm lake hill shop kitchen garden zoo".split()
_ANIMALS = "dog cat bird rabbit fox mouse horse duck frog turtle bear squirrel".split()
_ADJECTIVES = "big little red old shiny funny soft brave sad happy quiet tiny".split()
_OPENINGS = (
    "One day, {name} went to the {place}.",
    "Once upon a time, there was a child named {name}. {She} lived near the {place}.",
    "It was a sunny day. {name} was at the {place}.",
    "{name} woke up early and walked to the {place}.",
)
_MEETINGS = (
    "{She} saw a {adjective} {animal}.",
    "There {she} met a {adjective} {animal} with a {thing}.",
    "{She} found a {adjective} {thing} under a tree.",
    "A {adjective} {animal} took {her} {thing} and ran away.",
)
_TURNS = (
    "The {animal} wanted to play, so they ran and laughed.",
    "{name} gave the {animal} a {thing} and it was very happy.",
    "{She} was scared at first, but the {animal} was kind.",
    "{name} asked for help, and the {animal} looked for the {thing}.",
)
_ENDINGS = (
    "{She} went home and told {her} mother about the {animal}.",
    "In the end, they became best friends.",
    "{name} hugged the {animal} and said goodbye.",
    "That night, {she} slept well and dreamed of the {place}.",
)


def draw_story(rng: random.Random) -> str:
    """One story of four or five sentences."""
    female = rng.random() < 0.5
    she, her, _ = PRONOUNS["woman" if female else "man"]
    words = {
        "name": rng.choice(GIRLS if female else BOYS),
        "she": she,
        "She": she.capitalize(),
        "her": her,
        "place": rng.choice(_PLACES),
        "animal": rng.choice(_ANIMALS),
        "adjective": rng.choice(_ADJECTIVES),
        "thing": rng.choice(WORDS),
    }
    parts = (_OPENINGS, _MEETINGS, _TURNS, _ENDINGS)
    return " ".join(rng.choice(part) for part in parts).format(**words)


@cache
def stories(split: str = "test", count: int = 256) -> tuple[str, ...]:
    """The first `count` stories of a split, always the same ones."""
    rng = random.Random(1)
    found: dict[str, None] = {}
    while len(found) < count:
        story = draw_story(rng)
        if split_of(story) == split:
            found[story] = None
    return tuple(found)
