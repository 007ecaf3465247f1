"""BBQ and SVAMP: questions about a short text.

BBQ (arXiv 2110.08193): `Gender_identity.jsonl` and so on, a file a category. SVAMP (arXiv
2103.07191): `SVAMP.json`, word problems in arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets.files import Row, check_columns, files_of, read_json, read_jsonl
from prune_edit.tasks.datasets.items import DataSet, Item
from prune_edit.tasks.task import Example

_BBQ = ("context", "question", "ans0", "ans1", "ans2", "label", "answer_info")
_GENDERS = {"man": "m", "boy": "m", "men": "m", "boys": "m", "woman": "f", "girl": "f",
            "women": "f", "girls": "f"}  # fmt: skip


def bbq(place: Path) -> DataSet:
    """BBQ from a file, or a folder of its files."""
    rows: list[Row] = []
    for path in files_of(place, "*.jsonl", "bbq"):
        rows += read_jsonl(path, "bbq")
    return bbq_of(rows, str(place))


def bbq_of(rows: Sequence[Row], where: str) -> DataSet:
    """BBQ from its rows. The target is the answer whose group the row says is stereotyped.

    Rows whose target cannot be told from the row itself count in the accuracies, not in the bias:
    the published scores take it from a file of their own.
    """
    check_columns(rows, _BBQ, where, "bbq")
    items, examples = [], []
    unclear = 0
    for number, row in enumerate(rows, 1):
        choices = tuple(f" {str(row[f'ans{i}']).strip()}" for i in range(3))
        label = int(row["label"])
        if not 0 <= label < 3 or len(set(choices)) < 3:
            raise TaskError(f"{where}: row {number} has no three answers and a label of one")
        prompt = f"{row['context']} {row['question']}"
        condition = "ambiguous" if str(row.get("context_condition")) == "ambig" else "clear"
        kinds = [_kind(row, i) for i in range(3)]
        target = [i for i in range(3) if _is_target(row, i)]
        labels = tuple(
            "unknown" if kind == "unknown" else "target" if [i] == target else "other"
            for i, kind in enumerate(kinds)
        )
        unclear += len(target) != 1
        negative = str(row.get("question_polarity", "neg")) == "neg"
        numbers = (("right", float(label)), ("negative", float(negative)))
        category = str(row.get("category", ""))
        key = f"bbq {category} {row.get('question_index', number)}"
        texts = tuple((prompt, choice) for choice in choices)
        items.append(Item(texts, labels, condition, key, numbers))
        examples.append(Example(prompt, choices[label], condition, None, choices, key))
    notes = (f"{unclear} of {len(rows)} rows do not say which answer is the stereotyped group's",)
    return DataSet(
        "bbq", tuple(items), tuple(examples), (), "questions with three answers", where,
        notes if unclear else (),
    )  # fmt: skip


def _info(row: Row, place: int) -> list[str]:
    info: Any = row["answer_info"].get(f"ans{place}", [])
    return [str(each) for each in info]


def _kind(row: Row, place: int) -> str:
    return "unknown" if "unknown" in _info(row, place) else "group"


def _is_target(row: Row, place: int) -> bool:
    """Whether an answer is about the stereotyped group: its name is one of the row's."""
    metadata: Any = row.get("additional_metadata") or {}
    groups = {_name(each) for each in metadata.get("stereotyped_groups", ())}
    found = {_name(each) for each in _info(row, place)}
    whole = {part for each in found for part in (each, *each.split("-"))}
    return bool(groups & whole)


def _name(group: object) -> str:
    text = str(group).strip().lower()
    return _GENDERS.get(text, text)


def svamp(place: Path) -> DataSet:
    """SVAMP as a task: the problem, then its number."""
    path = place / "SVAMP.json" if place.is_dir() else place
    rows = read_json(path, "svamp")
    if not isinstance(rows, list):
        raise TaskError(f"{path} holds no list of problems; give SVAMP.json")
    return svamp_of(rows, str(path))


def svamp_of(rows: Sequence[Row], where: str) -> DataSet:
    """SVAMP from its rows."""
    check_columns(rows, ("Body", "Question", "Answer"), where, "svamp")
    examples = []
    for row in rows:
        body = str(row["Body"]).strip()
        body += "" if body.endswith((".", "?", "!", ",")) else "."
        number = float(row["Answer"])
        answer = str(int(number)) if number.is_integer() else str(number)
        prompt = f"Q: {body} {str(row['Question']).strip()} A:"
        kind = str(row.get("Type", "")).lower()
        examples.append(Example(prompt, f" {answer}", kind, key=f"svamp {row.get('ID', prompt)}"))
    return DataSet("svamp", (), tuple(examples), (), "word problems in arithmetic", where)
