"""WinoBias and Winogender: who a pronoun means, and which pronoun a sentence takes.

WinoBias (arXiv 1804.06876): a folder of `pro_stereotyped_type1.dev.txt` and so on, one sentence a
line with the pronoun and what it means in brackets. Winogender (arXiv 1804.09301): a file
`all_sentences.tsv`, beside it `occupations-stats.tsv`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets.files import check_columns, files_of, read_table, read_text
from prune_edit.tasks.datasets.items import DataSet, Item, contrast_pair
from prune_edit.tasks.task import Example

_BRACKETS = re.compile(r"\[([^\]]*)\]")
_FILE = re.compile(r"(pro|anti)_stereotyped_(type\d)\.(\w+)\.txt(?:\.\w+)?")
_ARTICLES = ("the ", "a ", "an ")


@dataclass(frozen=True)
class _Sentence:
    """One line: the sentence without brackets, its pronoun, and the noun that it means."""

    text: str
    pronoun: str
    noun: str
    side: str  # pro or anti
    kind: str  # type1 or type2

    @property
    def question(self) -> str:
        """What whom the pronoun means is the answer to."""
        return f'{self.text} The pronoun "{self.pronoun}" refers to the'


def winobias(place: Path) -> DataSet:
    """WinoBias: sentences in both stereotypes, paired by line. Raises TaskError naming the line."""
    files = {}
    for path in files_of(place, "*_stereotyped_type*.txt*", "winobias"):
        name = _FILE.fullmatch(path.name)
        if name is None:
            raise TaskError(
                f"winobias: {path.name} is not named as published "
                "(pro_stereotyped_type1.dev.txt); give the folder of the files"
            )
        files[name[1], name[2], name[3]] = path
    sentences: dict[tuple[str, str, str], list[_Sentence]] = {
        key: _lines(path, key[0], key[1]) for key, path in sorted(files.items())
    }
    nouns = {each.noun for rows in sentences.values() for each in rows}
    items: list[Item] = []
    examples: list[Example] = []
    pairs: list[Example] = []
    for side, kind, split in sorted(sentences):
        if side == "anti":
            continue
        both = [sentences[side, kind, split], sentences.get(("anti", kind, split), [])]
        if len(both[0]) != len(both[1]):
            raise TaskError(
                f"winobias: {files[side, kind, split].name} has {len(both[0])} sentences, its anti "
                f"file {len(both[1])}; give both files as published"
            )
        for number, (pro, anti) in enumerate(zip(*both, strict=True), 1):
            cluster = f"{kind}.{split} {number}"
            asked = [_example(each, nouns, cluster) for each in (pro, anti)]
            pair = contrast_pair(pro.text, anti.text, kind, cluster)
            pairs += [pair] if pair is not None else []
            items.append(
                Item((("", pro.text), ("", anti.text)), ("pro", "anti"), kind, cluster)
            )  # fmt: skip
            for each in asked:
                if each is None:
                    continue
                examples.append(each)
                texts = tuple((each.prompt, choice) for choice in each.choices)
                items.append(Item(texts, ("right", "wrong"), f"{kind} {each.group}", cluster))
    return DataSet(
        "winobias", tuple(items), tuple(examples), tuple(pairs), "whom a pronoun means", str(place)
    )


def _lines(path: Path, side: str, kind: str) -> list[_Sentence]:
    found = []
    for number, line in enumerate(read_text(path, "winobias").splitlines(), 1):
        if not line.strip():
            continue
        text = re.sub(r"^\d+\s+", "", line.strip())
        marked = _BRACKETS.findall(text)
        if len(marked) < 2:
            raise TaskError(
                f"{path} line {number}: {len(marked)} bracketed words, not the noun and its pronoun"
            )
        # The noun comes first in every published line, then its pronouns.
        plain = " ".join(_BRACKETS.sub(r"\1", text).split()).replace(" '", "'")
        found.append(_Sentence(plain, marked[1].strip(), _bare(marked[0]), side, kind))
    return found


def _bare(noun: str) -> str:
    noun = noun.strip()
    for article in _ARTICLES:
        if noun.lower().startswith(article):
            noun = noun[len(article) :]
    return noun.lower()


def _example(sentence: _Sentence, nouns: set[str], key: str) -> Example | None:
    """The question of whom the pronoun means; None where the sentence's other noun is unknown."""
    text = sentence.text.lower()
    there = [noun for noun in nouns if re.search(rf"\b{re.escape(noun)}\b", text)]
    # `guard` is in `security guard`: only the longest count.
    there = [noun for noun in there if not any(noun != o and noun in o for o in there)]
    others = sorted(noun for noun in there if noun != sentence.noun)
    if len(others) != 1:
        return None
    answers = (f" {sentence.noun}", f" {others[0]}")
    return Example(sentence.question, answers[0], sentence.side, None, answers, key)


def winogender(place: Path) -> DataSet:
    """Winogender: each sentence with he, she and they, and the occupation's share of women."""
    (path,) = files_of(place, "all_sentences.tsv", "winogender")
    rows = read_table(path, "winogender", "\t")
    check_columns(rows, ("sentid", "sentence"), path, "winogender")
    shares: dict[str, float] = {}
    beside = path.with_name("occupations-stats.tsv")
    if beside.is_file():
        stats = read_table(beside, "winogender", "\t")
        check_columns(stats, ("occupation", "bls_pct_female"), beside, "winogender")
        shares = {row["occupation"]: float(row["bls_pct_female"]) for row in stats}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        parts = row["sentid"].removesuffix(".txt").split(".")
        if len(parts) != 4 or parts[3] not in ("male", "female", "neutral"):
            raise TaskError(
                f"{path}: {row['sentid']!r} is not of the form "
                "occupation.participant.answer.gender.txt"
            )
        found.setdefault(".".join(parts[:3]), {})[parts[3]] = row["sentence"]
    items, pairs = [], []
    for name, texts in found.items():
        if not {"male", "female"} <= set(texts):
            raise TaskError(f"{path}: {name} lacks its male or its female sentence")
        occupation, _, answer = name.split(".")
        share = shares.get(occupation)
        about_it = answer == "0"  # the pronoun means the occupation, not the participant
        numbers = (("share", share / 100),) if share is not None and about_it else ()
        order = tuple(key for key in ("male", "female", "neutral") if key in texts)
        items.append(
            Item(tuple(("", texts[key]) for key in order), order,
                 "occupation" if about_it else "participant", occupation, numbers)
        )  # fmt: skip
        if numbers and share != 50:
            sides = ("female", "male") if share and share > 50 else ("male", "female")
            pair = contrast_pair(texts[sides[0]], texts[sides[1]], sides[0], occupation)
            pairs += [pair] if pair is not None else []
    return DataSet(
        "winogender", tuple(items), (), tuple(pairs), "which pronoun an occupation takes", str(path)
    )
