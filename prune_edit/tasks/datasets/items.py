"""Item and DataSet: a published test as texts whose likelihoods are compared."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_edit.errors import TaskError
from prune_edit.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Item:
    """One comparison of a published test: texts to score, and what is known of them.

    `texts` are (prompt, continuation) pairs of which the continuation is scored; a whole sentence
    has an empty prompt. `labels` say what each text is (`stereotype`, `he`, ...). `group` is the
    test's own category, `cluster` what is resampled together (a pair, a profession), `numbers`
    figures published with the item, by name.
    """

    texts: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    group: str = ""
    cluster: str = ""
    numbers: tuple[tuple[str, float], ...] = ()

    def place(self, label: str) -> int:
        """The place of the text with this label."""
        return self.labels.index(label)

    def number(self, name: str) -> float:
        """A figure published with the item."""
        return dict(self.numbers)[name]

    @property
    def has(self) -> frozenset[str]:
        """The names of the figures published with the item."""
        return frozenset(name for name, _ in self.numbers)


@dataclass(frozen=True)
class DataSet:
    """A published test read from its own format. Raises TaskError when nothing is in it.

    `items` give its published figures; `examples` are the same as a task with choices (none where
    there is no right answer); `pairs` as contrast pairs of a concept (`prompt` the stereotyped
    one), where the texts differ before their end.
    """

    name: str
    items: tuple[Item, ...]
    examples: tuple[Example, ...] = ()
    pairs: tuple[Example, ...] = ()
    about: str = ""
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.items and not self.examples:
            raise TaskError(f"{self.source or self.name}: no examples were found in it")

    def task(self) -> Task:
        """As a task. Raises TaskError for a test without right answers."""
        if not self.examples:
            raise TaskError(
                f"{self.name} has no right answers and is no task; it measures a bias: name it in "
                "a rule of `prune-edit gate`"
            )
        return Task(self.name, self.examples, self.about, source=self.source)


def shared_end(one: str, other: str) -> int:
    """How many characters two sentences share at their end, from a word's start on."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    # Back to where a word starts: half a word is no answer.
    while count and not one[len(one) - count].isspace():
        count -= 1
    return count


def contrast_pair(stereotyped: str, other: str, group: str, key: str = "") -> Example | None:
    """Two sentences as a pair of prompts with one answer, their shared end; None without one."""
    count = shared_end(stereotyped, other)
    answer = stereotyped[len(stereotyped) - count :]
    prompts = stereotyped[: len(stereotyped) - count], other[: len(other) - count]
    if not answer.strip(" .!?") or not all(prompts) or prompts[0] == prompts[1]:
        return None
    return Example(prompts[0], answer, group, contrast=prompts[1], key=key)
