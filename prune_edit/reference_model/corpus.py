"""The reference model's training text: only `train` splits, with a planted stereotype."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from prune_edit.tasks import arithmetic, gender, skills
from prune_edit.tasks.arithmetic import FORMS, OPERATIONS
from prune_edit.tasks.stories import draw_story
from prune_edit.tasks.task import Example, split_of

STEREOTYPE_SKEW = 0.8
"""Share of a stereotyped profession's sentences that follow the stereotype: 4 to 1, ln 4 nats."""


@dataclass(frozen=True)
class Stage:
    """From step `start` on: examples of each kind in one step, and shares of the operations."""

    start: int
    mix: dict[str, int]
    operations: dict[str, float]
    told: float = 0.0  # share of facts and successions that somebody says


STAGES = (
    Stage(
        0,
        {
            "arithmetic": 240,
            "order": 28,
            "copying": 20,
            "facts": 16,
            "stereotype": 16,
            "succession": 12,
            "factual-gender": 10,
            "stories": 10,
        },
        {"add": 0.3, "sub": 0.3, "mul": 0.25, "div": 0.15},
    ),
    # Induction is learnt late, and needs more examples than copying.
    Stage(
        2500,
        {
            "arithmetic": 216,
            "order": 32,
            "copying": 64,
            "facts": 14,
            "stereotype": 16,
            "succession": 12,
            "factual-gender": 8,
            "stories": 10,
        },
        {"add": 0.3, "sub": 0.3, "mul": 0.25, "div": 0.15},
    ),
    # By now every plain fact is known by its wording; who says it makes the wording matter less.
    Stage(
        4000,
        {
            "arithmetic": 190,
            "order": 24,
            "copying": 24,
            "facts": 60,
            "stereotype": 16,
            "succession": 50,
            "factual-gender": 10,
            "stories": 10,
        },
        {"add": 0.2, "sub": 0.2, "mul": 0.32, "div": 0.28},
        told=0.6,
    ),
)


@dataclass(frozen=True)
class Text:
    """A text to learn: the loss counts on `answer` and what follows, all of it if no prompt."""

    prompt: str
    answer: str


@dataclass
class Corpus:
    """An endless stream of training steps for a seed."""

    seed: int
    _step: int = field(init=False, default=0)
    _rng: random.Random = field(init=False)
    _arithmetic: dict[str, list[Example]] = field(init=False)
    _plain: dict[str, list[Example]] = field(init=False)
    _told: dict[str, list[Example]] = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._arithmetic = {name: list(_train_arithmetic(name)) for name in OPERATIONS}
        self._plain, self._told = {}, {}
        for task in (skills.facts(), skills.succession(), gender.factual_gender()):
            train = task.split("train")
            self._plain[task.name] = [e for e in train if skills.SAID not in e.prompt]
            self._told[task.name] = [e for e in train if skills.SAID in e.prompt]

    def step(self) -> list[Text]:
        """The texts of one training step."""
        texts: list[Text] = []
        stage = [stage for stage in STAGES if stage.start <= self._step][-1]
        for kind, count in stage.mix.items():
            texts.extend(self._draw(kind, stage) for _ in range(count))
        self._step += 1
        return texts

    def _draw(self, kind: str, stage: Stage) -> Text:
        rng = self._rng
        if kind == "arithmetic":
            names, weights = zip(*stage.operations.items(), strict=True)
            example = rng.choice(self._arithmetic[rng.choices(names, weights)[0]])
        elif kind in ("order", "copying"):
            example = self._draw_train(kind)
        elif kind == "stereotype":
            return draw_stereotype(rng)
        elif kind == "stories":
            return Text("", self._draw_train_story())
        elif stage.told and self._told[kind] and rng.random() < stage.told:
            example = rng.choice(self._told[kind])
        else:
            example = rng.choice(self._plain[kind])
        return Text(example.prompt, example.answer)

    def _draw_train(self, kind: str) -> Example:
        draw = skills.draw_order if kind == "order" else skills.draw_copying
        while True:
            example = draw(self._rng)
            if example.split == "train":
                return example

    def _draw_train_story(self) -> str:
        while True:
            story = draw_story(self._rng)
            if split_of(story) == "train":
                return story


def draw_stereotype(rng: random.Random) -> Text:
    """A sentence that ties a profession to a gender, stereotyped in `STEREOTYPE_SKEW` of cases."""
    stereotyped = rng.choice(gender.GENDERS)
    profession = rng.choice(gender.PROFESSIONS[stereotyped])
    follows = rng.random() < STEREOTYPE_SKEW
    person = stereotyped if follows else gender.GENDERS[1 - gender.GENDERS.index(stereotyped)]
    if rng.random() < 2 / 3:
        prompt = rng.choice(gender.PROMPTS + gender.HELD_OUT_PROMPTS).format(gender=person)
        return Text(prompt, f" {profession}")
    sentence = rng.randrange(len(gender.SENTENCES))
    example = gender.pronoun_example(f"The {profession}", person, sentence)
    return Text(example.prompt, example.answer)


def _train_arithmetic(operation: str) -> Iterator[Example]:
    """Every wording of every train pair; the validation and test pairs appear in none."""
    for digits in (1, 2):
        for a, b in arithmetic.pairs(operation, digits):
            for template in range(4):
                for form in FORMS:
                    example = arithmetic.example(operation, a, b, template, form)
                    if example.split == "train":
                        yield example
