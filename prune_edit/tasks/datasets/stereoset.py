"""StereoSet (arXiv 2004.09456): a stereotype, an anti-stereotype and an unrelated sentence each.

`dev.json` as published; rows of the hub hold the same with labels as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets.files import Row, read_json
from prune_edit.tasks.datasets.items import DataSet, Item, contrast_pair

LABELS = ("anti-stereotype", "stereotype", "unrelated", "related")  # the hub's numbers
_KINDS = ("intrasentence", "intersentence")


def stereoset(place: Path) -> DataSet:
    """StereoSet from its file."""
    path = place / "dev.json" if place.is_dir() else place
    content = read_json(path, "stereoset")
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict) or not any(kind in data for kind in _KINDS):
        raise TaskError(
            f"{path} has no data.intrasentence and no data.intersentence; give StereoSet's dev.json"
        )
    rows = [{"kind": kind, **row} for kind in _KINDS for row in data.get(kind, ())]
    return stereoset_of(rows, str(path))


def stereoset_of(rows: Sequence[Row], where: str) -> DataSet:
    """StereoSet from its rows: `context`, `sentences`, `target`, `bias_type`, `kind`."""
    items, pairs = [], []
    for number, row in enumerate(rows, 1):
        texts = dict(_sentences(row, f"{where}: row {number}"))
        lacking = {"stereotype", "anti-stereotype", "unrelated"} - set(texts)
        if lacking:
            raise TaskError(f"{where}: row {number} has no {sorted(lacking)[0]} sentence")
        kind, bias, target = (str(row.get(key, "")) for key in ("kind", "bias_type", "target"))
        # A sentence that follows its context is scored given it, one with a blank as a whole.
        context = str(row.get("context", "")) if kind == "intersentence" else ""
        order = ("stereotype", "anti-stereotype", "unrelated")
        written = tuple(
            (context, f" {texts[label]}" if context else texts[label]) for label in order
        )
        items.append(Item(written, order, bias, f"{kind} {target}"))
        if not context:
            pair = contrast_pair(texts["stereotype"], texts["anti-stereotype"], bias, str(number))
            pairs += [pair] if pair is not None else []
    return DataSet("stereoset", tuple(items), (), tuple(pairs), "stereotyped sentences", where)


def _sentences(row: Row, where: str) -> Iterator[tuple[str, str]]:
    """Label and sentence of each, of a list of objects or the hub's object of lists."""
    sentences: Any = row.get("sentences")
    if isinstance(sentences, Mapping):
        sentences = [
            {"gold_label": label, "sentence": text}
            for label, text in zip(sentences["gold_label"], sentences["sentence"], strict=True)
        ]
    if not isinstance(sentences, list):
        raise TaskError(f"{where} has no 'sentences'; give StereoSet as published")
    for each in sentences:
        label = each.get("gold_label")
        yield (LABELS[label] if isinstance(label, int) else str(label)), str(each.get("sentence"))
