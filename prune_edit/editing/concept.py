"""Concepts as contrast pairs: what a model says after prompts that differ in the concept alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks import gender, jsonl
from prune_edit.tasks.datasets import is_data_set, load_data_set
from prune_edit.tasks.task import Example, fraction_of

BUILT_IN = ("gender", "gender-pronouns")
HELD_OUT = "held-out prompts and answers"
"""The name of the strictest view: neither its prompts nor its answers helped to find the edit."""

_FEWEST = 3  # values of a kind that can be dealt to three splits
_SHARES = (("train", 0.5), ("validation", 0.25), ("test", 0.25))
_ENOUGH = 12  # kinds of pair that share neither prompt nor answer, to be dealt as they are


@dataclass(frozen=True)
class Concept:
    """Pairs to find units on, to choose by, and to report on, which share no prompt and no answer.

    A pair is an Example whose bias is `s(prompt) - s(contrast)`, where `s` is the answer's log
    probability, less the mean of its other `choices`' where it has some; without a contrast,
    `s(prompt)` alone. `views` are all pairs that are reported on, by name; `factual` are pairs of
    the same form whose difference is right and must stay; `counted` are, per group, the words that
    the generation check counts.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    views: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    factual: tuple[Example, ...] = ()
    counted: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, tuple[Example, ...]]:
        """The views, the training pairs first, the strictest last."""
        return {"training": self.train, **self.views, HELD_OUT: self.held_out}

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer of any pair, once: what it is plausible to say after the prompts."""
        pairs = [pair for view in self.shown.values() for pair in view] + list(self.validation)
        return tuple(dict.fromkeys(text for pair in pairs for text in (pair.answer, *pair.choices)))


def load_concept(name: str) -> Concept:
    """A built-in concept, a data set's pairs (`winobias:PATH`), or those of a JSONL file.

    Its objects have `prompt, contrast, answer, group?, choices?, key?`. `contrast` may be a list,
    so that a group is compared with several others, or with a neutral form: the bias is then the
    mean over them. Pairs of one `key` are kept in one split. Raises TaskError.
    """
    if name == "gender":
        return _gender()
    if name == "gender-pronouns":
        return _pronouns()
    path = Path(name)
    if is_data_set(name) and not path.is_file():
        return _data_set(name)
    if not path.is_file() and path.suffix not in (".jsonl", ".json"):
        raise TaskError(
            f"unknown concept {name!r}; built in are {' and '.join(BUILT_IN)}, or give a .jsonl "
            "file, or a data set as NAME:PATH"
        )
    return concept_of(path.stem, _pairs_of(path), str(path))


def concept_of(name: str, pairs: Sequence[Example], where: str = "concept") -> Concept:
    """A Concept of these pairs, dealt to the splits by hash.

    Pairs that share a prompt or an answer stay together where there are enough such families.
    Otherwise prompts and answers are dealt each for itself, and pairs that mix splits are left out
    of all three: held-out prompts with seen answers and the like become views. Raises TaskError for
    groups of one pair, and for pairs too few to hold any out.
    """
    groups: dict[str, int] = {}
    for pair in pairs:
        groups[pair.group] = groups.get(pair.group, 0) + 1
    for group, count in groups.items():
        if count < 2:
            raise TaskError(
                f"{where}: group {group or 'without a name'!r} has one pair, and a bias of one "
                "pair cannot be told from chance; give it at least two, or drop it"
            )
    families = _families(pairs)
    kinds = {_context(pair): families[_context(pair)] for pair in pairs}
    if len(set(kinds.values())) >= _ENOUGH:
        of = _deal(set(kinds.values()))
        prompts = answers = {}
        split = [(of[kinds[_context(pair)]],) * 2 for pair in pairs]
    else:
        prompts = _deal({_context(pair) for pair in pairs})
        answers = _deal({pair.answer for pair in pairs})
        split = [(prompts[_context(pair)], answers[pair.answer]) for pair in pairs]
        if {*prompts.values(), *answers.values()} == {"all"}:
            raise TaskError(
                f"{where}: {len(prompts)} prompts and {len(answers)} answers leave none to hold "
                f"out; give at least {_FEWEST} prompts or answers"
            )

    def chosen(prompt: str, answer: str) -> tuple[Example, ...]:
        """Pairs of these splits; a kind too small to deal has the split `all`."""
        return tuple(
            pair
            for pair, (p, a) in zip(pairs, split, strict=True)
            if p in (prompt, "all") and a in (answer, "all")
        )

    train, validation, held_out = (chosen(name, name) for name, _ in _SHARES)
    for label, some in (("train", train), ("validation", validation), ("held-out", held_out)):
        if len(some) < 2:
            raise TaskError(
                f"{where}: {len(pairs)} pairs leave {len(some)} for the {label} split, whose "
                "prompts and answers must be its own; give more pairs, or more prompts an answer"
            )
    views = {
        "held-out prompts": chosen("test", "train"),
        "held-out answers": chosen("train", "test"),
    }
    alone = {"all"} & {*prompts.values(), *answers.values()} or not prompts
    shown = {} if alone else {key: rows for key, rows in views.items() if rows}
    counted = {
        group: tuple(dict.fromkeys(pair.answer.strip() for pair in pairs if pair.group == group))
        for group in groups
    }
    return Concept(name, train, validation, held_out, shown, counted=counted)


def _context(pair: Example) -> str:
    """What both sides of a pair share: the two prompts, whichever stands first."""
    return "\x1f".join(sorted((pair.prompt, pair.contrast or "")))


def _families(pairs: Sequence[Example]) -> dict[str, str]:
    """Of every context, the least context that shared answers lead to."""
    root: dict[str, str] = {}

    def find(key: str) -> str:
        while root.setdefault(key, key) != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    for pair in pairs:
        joined = [f"p{_context(pair)}", f"a{pair.answer}", *([f"k{pair.key}"] if pair.key else [])]
        least, *others = sorted(map(find, joined))
        root.update(dict.fromkeys(others, least))
    return {_context(pair): find(f"p{_context(pair)}") for pair in pairs}


def _deal(values: Iterable[str]) -> dict[str, str]:
    """A split for every value, half to train, by the order of their hashes; `all` if too few."""
    ordered = sorted(set(values), key=fraction_of)
    if len(ordered) < _FEWEST:
        return dict.fromkeys(ordered, "all")
    held = max(1, round(len(ordered) / 4))
    ends = len(ordered) - 2 * held, len(ordered) - held
    return {
        value: "train" if i < ends[0] else "validation" if i < ends[1] else "test"
        for i, value in enumerate(ordered)
    }


def _data_set(name: str) -> Concept:
    """The contrast pairs of a published test; of groups with one pair, that is left out."""
    data = load_data_set(name)
    if not data.pairs:
        raise TaskError(f"{data.name} gives no contrast pairs, so it is no concept to edit")
    counts = Counter(pair.group for pair in data.pairs)
    pairs = [pair for pair in dict.fromkeys(data.pairs) if counts[pair.group] > 1]
    return concept_of(data.name, pairs, name)


def _pairs_of(path: Path) -> list[Example]:
    """The pairs in a JSONL file; one for each contrast where a line has several."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"concept file {path} cannot be read: {error}") from None
    found: list[Example] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        several = isinstance(fields, dict) and isinstance(fields.get("contrast"), list)
        contrasts = fields["contrast"] if several else [None]
        if not contrasts:
            raise TaskError(f"{where}: the list of contrasts is empty; give at least one")
        for contrast in contrasts:
            text = json.dumps({**fields, "contrast": contrast}) if several else line
            pair = jsonl.parse(text, where)
            if pair.contrast is None and len(pair.choices) < 2:
                raise TaskError(
                    f"{where}: the pair with prompt {pair.prompt!r} has no contrast and no "
                    'choices; give every line {"prompt": ..., "contrast": ..., "answer": ...}'
                )
            if pair.contrast == pair.prompt:
                raise TaskError(
                    f"{where}: prompt and contrast are the same, {pair.prompt!r}; let them differ "
                    "in the concept"
                )
            found.append(pair)
    if not found:
        raise TaskError(f"concept file {path} is empty; give one pair a line")
    return list(dict.fromkeys(found))


# Gender


def _gender() -> Concept:
    """The paper's professions after the woman's and the man's form of each prompt."""
    own, other, last = (_professions(split) for split, _ in _SHARES)
    prompts, chosen_by = gender.PROMPTS[:-2], gender.PROMPTS[-2:]
    every = gender.PROFESSIONS
    return Concept(
        "gender",
        gender_pairs(prompts, own),
        gender_pairs(chosen_by, other),
        gender_pairs(gender.HELD_OUT_PROMPTS, last),
        {
            "all the paper's pairs": gender_pairs(gender.PROMPTS, every),
            "held-out answers": gender_pairs(prompts, last),
            "held-out prompts": gender_pairs(gender.HELD_OUT_PROMPTS, every),
            "new wordings": gender_pairs(gender.NEW_PROMPTS, every),
            "pronouns after professions": pronoun_pairs(every, range(len(gender.SENTENCES))),
        },
        factual=gender.factual_pairs("train"),
        counted=every,
    )


def _pronouns() -> Concept:
    """She or he after roles: `The nurse said that`."""
    own, other, last = (_professions(split, gender.ROLES) for split, _ in _SHARES)
    sentences = _deal(map(str, range(len(gender.SENTENCES))))
    places = {
        split: [i for i in range(len(gender.SENTENCES)) if sentences[str(i)] == split]
        for split, _ in _SHARES
    }
    return Concept(
        "gender-pronouns",
        pronoun_pairs(own, places["train"]),
        pronoun_pairs(other, places["validation"]),
        pronoun_pairs(last, places["test"]),
        {
            "held-out answers": pronoun_pairs(last, places["train"]),
            "held-out prompts": pronoun_pairs(own, places["test"]),
        },
        factual=gender.factual_pairs("train"),
        counted={name: gender.GENDERED[name] for name in gender.GENDERS},
    )


def _professions(
    split: str, names: dict[str, tuple[str, ...]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Those of one split, each gender's dealt for itself."""
    found = {}
    for person, words in (names or gender.PROFESSIONS).items():
        of = _deal(words)
        found[person] = tuple(word for word in words if of[word] == split)
    return found


def gender_pairs(
    prompts: Sequence[str], professions: dict[str, tuple[str, ...]]
) -> tuple[Example, ...]:
    """`log p(profession | its stereotyped gender) - log p(profession | the other)`."""
    woman, man = gender.GENDERS
    return tuple(
        Example(
            prompt.format(gender=stereotyped),
            f" {profession}",
            group=stereotyped,
            contrast=prompt.format(gender=other),
        )
        for stereotyped, other in ((woman, man), (man, woman))
        for profession in professions[stereotyped]
        for prompt in prompts
    )


def pronoun_pairs(
    professions: dict[str, tuple[str, ...]], sentences: Iterable[int]
) -> tuple[Example, ...]:
    """`log p(the stereotyped pronoun | profession) - log p(the other pronoun | profession)`."""
    places = list(sentences)
    return tuple(
        replace(gender.pronoun_example(f"The {profession}", person, sentence), key=profession)
        for person in gender.GENDERS
        for profession in professions[person]
        for sentence in places
    )
