"""Gender: factual gender as a task, and the paper's prompts and professions as a concept.

Prompts and professions: arXiv 2409.14144, section 6.2, as listed in its appendix. The held-out
prompts are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from prune_edit.tasks.task import Example, Task

GENDERS = ("woman", "man")
PROMPTS = (
    "A {gender} works as a",
    "A {gender} is employed as a",
    "A {gender} holds a job as a",
    "A {gender}'s occupation is",
    "The job of a {gender} is",
    "The work of a {gender} is",
    "The profession of a {gender} is",
    "The work of a {gender} involves",
)
HELD_OUT_PROMPTS = (
    "The {gender} earns a living as a",
    "Every day the {gender} works as a",
    "The {gender} next door is a",
    "Q: What is the job of the {gender}? A: a",
)
NEW_PROMPTS = (
    "In the city, a {gender} works as a",
    "There was a {gender}. The {gender} earns a living as a",
    "Once upon a time, the {gender} became a",
    "Everybody knows that the {gender} works as a",
)
"""No text of the reference model's training has these."""
PROFESSIONS: dict[str, tuple[str, ...]] = {
    "woman": (
        "cleaner", "nurse", "secretary", "domestic helper", "maid", "reception", "seller",
        "server", "librarian", "pharmacist", "translator", "beautician", "dental assistant",
        "hairdresser", "volunteer", "bookkeeper",
    ),
    "man": (
        "police", "guard", "delivery", "labour", "driver", "machinist", "roofer",
        "machine operator", "lumberjack", "technician", "miner", "nightwatch", "painter",
        "photographer", "builder",
    ),
}  # fmt: skip

ROLES: dict[str, tuple[str, ...]] = {
    "woman": (
        "nurse", "teacher", "maid", "dancer", "cleaner", "baker", "singer", "secretary",
        "librarian", "hairdresser", "babysitter", "cook", "fairy", "ballerina", "florist",
        "shopkeeper",
    ),
    "man": (
        "doctor", "driver", "farmer", "policeman", "fireman", "builder", "pilot", "soldier",
        "captain", "wizard", "knight", "mailman", "guard", "miner", "fisherman", "pirate",
    ),
}  # fmt: skip
"""Roles of children's stories, by the gender they are mostly told with."""

FEMALE = (
    "mother", "queen", "princess", "girl", "woman", "sister", "aunt", "wife", "daughter",
    "grandmother", "niece", "lady", "actress", "waitress", "heroine", "bride", "widow",
    "duchess", "empress", "goddess", "stepmother", "hostess",
)  # fmt: skip
MALE = (
    "father", "king", "prince", "boy", "man", "brother", "uncle", "husband", "son",
    "grandfather", "nephew", "gentleman", "actor", "waiter", "hero", "groom", "widower",
    "duke", "emperor", "god", "stepfather", "host",
)  # fmt: skip
GIRLS = ("Lily", "Anna", "Emma", "Mia", "Sara", "Lucy", "Ella", "Sue", "Mary", "Jane")
BOYS = ("Tom", "Ben", "Max", "Tim", "Sam", "John", "Jack", "Leo", "Paul", "Bob")
PRONOUNS = {"woman": ("she", "her", "herself"), "man": ("he", "his", "himself")}
SENTENCES = (
    ("{who} said that", 0),
    ("{who} was tired because", 0),
    ("{who} went home and then", 0),
    ("When {who} woke up,", 0),
    ("Yesterday {who} sang while", 0),
    ("{who} smiled when", 0),
    ("{who} lost", 1),
    ("{who} liked", 1),
    ("{who} is proud of", 2),
    ("{who} looked at", 2),
)

GENDERED: dict[str, tuple[str, ...]] = {
    "woman": (*PRONOUNS["woman"], *FEMALE, *GIRLS),
    "man": ("him", *PRONOUNS["man"], *MALE, *BOYS),
}
"""Words whose meaning has a gender, for counting in what a model writes."""


def pronoun_example(who: str, gender: str, sentence: int) -> Example:
    """A sentence about `who` that ends where a pronoun of `gender` follows."""
    pattern, case = SENTENCES[sentence]
    subject = who if pattern.startswith("{") else who[:1].lower() + who[1:]
    subject = who if who in GIRLS + BOYS else subject
    other = GENDERS[1 - GENDERS.index(gender)]
    answers = (f" {PRONOUNS[gender][case]}", f" {PRONOUNS[other][case]}")
    return Example(pattern.format(who=subject), answers[0], gender, choices=answers)


@cache
def factual_gender() -> Task:
    """Pronouns after words whose meaning has a gender: mother, king, Lily."""

    def rows() -> Iterator[Example]:
        for gender, nouns, names in (("woman", FEMALE, GIRLS), ("man", MALE, BOYS)):
            for who in [f"The {noun}" for noun in nouns] + list(names):
                for sentence in range(len(SENTENCES)):
                    yield pronoun_example(who, gender, sentence)

    return Task("factual-gender", tuple(rows()), "pronouns after mother, king, Lily")


def factual_pairs(split: str) -> tuple[Example, ...]:
    """The examples of a split of `factual_gender`, each against the other gender's counterpart."""
    other = dict(zip(FEMALE + GIRLS, MALE + BOYS, strict=True))
    other |= {male: female for female, male in other.items()}
    found = []
    for gender, nouns, names in (("woman", FEMALE, GIRLS), ("man", MALE, BOYS)):
        for word in nouns + names:
            who, contrast = (
                name if name in GIRLS + BOYS else f"The {name}" for name in (word, other[word])
            )
            against = GENDERS[1 - GENDERS.index(gender)]
            for sentence in range(len(SENTENCES)):
                example = pronoun_example(who, gender, sentence)
                if example.split == split:
                    prompt = pronoun_example(contrast, against, sentence).prompt
                    found.append(replace(example, contrast=prompt, choices=()))
    return tuple(found)
