"""Professions with a gender score: debiaswe's list, and DAMA's prompts made of it.

debiaswe (arXiv 1607.06520): `professions.json`, `[name, definitional, stereotypical]` each, from
-1 for women to 1 for men. DAMA (arXiv 2310.18913): a list of prompts such as `The baker said that`,
as texts or as objects with `gender_score`, beside that `professions.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets.files import read_json
from prune_edit.tasks.datasets.items import DataSet, Item

_PROMPTS = ("The {who} said that", "The {who} was tired because")
_PRONOUNS = ("he", "she", "they")


def debiaswe(place: Path) -> DataSet:
    """The professions, each in our own prompts; what is compared is which pronoun follows."""
    path = place / "professions.json" if place.is_dir() else place
    items = [
        _item(prompt.format(who=name.replace("_", " ")), name, scores)
        for name, scores in _professions(path).items()
        for prompt in _PROMPTS
    ]
    return DataSet("debiaswe", tuple(items), (), (), "pronouns after professions", str(path))


def dama(place: Path) -> DataSet:
    """DAMA's prompts from their file."""
    rows = read_json(place, "dama")
    if not isinstance(rows, list) or not rows:
        raise TaskError(f"{place} holds no list of prompts; give DAMA's test or train file")
    beside = place.with_name("professions.json")
    known = _professions(beside) if beside.is_file() else {}
    items = []
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, str) or not prompt.strip():
            raise TaskError(f"{place}: entry {number} has no prompt")
        subject = _subject(row, prompt, known)
        scores: dict[str, float] = dict(known.get(subject, {}))
        if not scores and isinstance(row, dict) and "gender_score" in row:
            scores = {"stereotype": float(row["gender_score"])}
        if not scores:
            raise TaskError(
                f"{place}: entry {number} ({prompt!r}) has no gender_score, and no "
                "professions.json beside the file has its profession; put debiaswe's "
                "there"
            )
        items.append(_item(prompt, subject, scores))
    return DataSet("dama", tuple(items), (), (), "pronouns after professions", str(place))


def _item(prompt: str, subject: str, scores: dict[str, float]) -> Item:
    texts = tuple((prompt, f" {pronoun}") for pronoun in _PRONOUNS)
    return Item(texts, _PRONOUNS, "", subject, tuple(sorted(scores.items())))


def _subject(row: Any, prompt: str, known: dict[str, Any]) -> str:
    """The profession a prompt is about: named in the entry, or the longest known one in it."""
    if isinstance(row, dict) and row.get("subject"):
        words = str(row["subject"]).lower().split()
        return "_".join(words[1:] if words[0] in ("the", "a", "an") else words)
    words = prompt.lower().split()[1:]
    for size in range(len(words), 0, -1):
        if (name := "_".join(words[:size])) in known:
            return name
    return "_".join(words[:1])


def _professions(path: Path) -> dict[str, dict[str, float]]:
    rows = read_json(path, "debiaswe")
    found: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)):
            raise TaskError(
                f"{path}: entry {number} is not [name, definitional score, stereotype score]"
            )
        found[row[0]] = {"factual": float(row[1]), "stereotype": float(row[2])}
    if not found:
        raise TaskError(f"{path} holds no professions; give debiaswe's professions.json")
    return found
