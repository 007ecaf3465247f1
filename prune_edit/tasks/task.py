"""Task and Example: named prompts with answers, split by hash and never by order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TypeVar

from prune_edit.errors import TaskError

Member = TypeVar("Member")
SPLITS = ("train", "validation", "test")
_TRAIN_END, _VALIDATION_END = 0.70, 0.85


def fraction_of(key: str) -> float:
    """A number in [0, 1) from a cryptographic hash of `key`: the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(key: str) -> str:
    """The split of `key`: 70 % train, 15 % validation, 15 % test."""
    fraction = fraction_of(key)
    if fraction < _TRAIN_END:
        return "train"
    return "validation" if fraction < _VALIDATION_END else "test"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer that should follow it.

    `group` is the row of the accuracy table it counts in; `contrast` a prompt to compare with
    (editing); with `choices`, the answer is right when it is likelier than the other choices;
    `key` is what the split hashes (default: prompt and answer), so that wordings of one fact can
    be kept in one split.
    """

    prompt: str
    answer: str
    group: str = ""
    contrast: str | None = None
    choices: tuple[str, ...] = ()
    key: str = ""

    @property
    def split_key(self) -> str:
        """What decides the split."""
        return self.key or f"{self.prompt}\x1f{self.answer}"

    @property
    def split(self) -> str:
        """`train`, `validation` or `test`."""
        return split_of(self.split_key)

    @property
    def rank(self) -> float:
        """A place in the canonical order, which does not depend on how examples were listed."""
        return fraction_of(f"order\x1f{self.prompt}\x1f{self.answer}\x1f{self.contrast}")


@dataclass(frozen=True)
class Task:
    """Named examples. Raises TaskError when there are none.

    A task that `adapts` is cut or extended to what a model can write and do. `source` is what
    loads it again: a built-in name or a file.
    """

    name: str
    examples: tuple[Example, ...]
    about: str = ""
    adapts: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples; give at least one")

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order of name."""
        return tuple(sorted({example.group for example in self.examples}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the examples, whatever their order."""
        lines = sorted(
            repr((e.prompt, e.answer, e.group, e.contrast, e.choices, e.key)) for e in self.examples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def _splits(self) -> dict[str, tuple[Example, ...]]:
        ordered = sorted(self.examples, key=lambda example: example.rank)
        splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
        for example in ordered:
            splits[example.split].append(example)
        _fill_empty(splits)
        return {name: tuple(members) for name, members in splits.items()}

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split (`all` for every one), in canonical order.

        Raises TaskError for a split that stays empty: fewer than three different examples.
        """
        if name == "all":
            return tuple(sorted(self.examples, key=lambda example: example.rank))
        members = self._splits[name]
        if not members:
            raise TaskError(
                f"task {self.name!r} has {len(self.examples)} examples, too few for a {name} "
                "split; give at least three different ones"
            )
        return members

    def sample(self, split: str, limit: int | None) -> tuple[Example, ...]:
        """At most `limit` examples of a split (None: all), the groups in turn."""
        members = self.split(split)
        return tuple(even(members, len(members) if limit is None else limit))


def even(
    members: Iterable[Member], limit: int, group: Callable[[Member], str] = attrgetter("group")
) -> list[Member]:
    """At most `limit` members, the groups in turn, each in the order given."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(group(member), []).append(member)
    picked: list[Member] = []
    place, limit = 0, min(limit, sum(map(len, groups.values())))
    while len(picked) < limit:
        for name in sorted(groups):
            if place < len(groups[name]) and len(picked) < limit:
                picked.append(groups[name][place])
        place += 1
    return picked


def _fill_empty(splits: dict[str, list[Example]]) -> None:
    """Give an empty split of a tiny task one key of the largest split, by hash and not by order."""
    for name in SPLITS:
        donor = max(splits.values(), key=lambda part: len({e.split_key for e in part}))
        keys = sorted({e.split_key for e in donor}, key=fraction_of)
        if splits[name] or len(keys) < 2:
            continue
        moved = keys[-1]  # the one nearest to the validation and test end of the hash's range
        splits[name].extend(e for e in donor if e.split_key == moved)
        donor[:] = [e for e in donor if e.split_key != moved]
