"""CrowS-Pairs and BLiMP: pairs of sentences of which a model prefers one.

CrowS-Pairs (arXiv 2010.00133): `crows_pairs_anonymized.csv`. BLiMP (arXiv 1912.00582): one JSON
object a line with `sentence_good` and `sentence_bad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets.files import Row, check_columns, files_of, read_jsonl, read_table
from prune_edit.tasks.datasets.items import DataSet, Item, contrast_pair
from prune_edit.tasks.task import Example


def crows_pairs(place: Path) -> DataSet:
    """CrowS-Pairs from its file."""
    (path,) = files_of(place, "crows_pairs_anonymized.csv", "crows-pairs")
    return crows_pairs_of(read_table(path, "crows-pairs"), str(path))


def crows_pairs_of(rows: Sequence[Row], where: str) -> DataSet:
    """CrowS-Pairs from its rows: `sent_more` is the more stereotyped sentence of each."""
    check_columns(rows, ("sent_more", "sent_less", "bias_type"), where, "crows-pairs")
    items, pairs = [], []
    for number, row in enumerate(rows):
        more, less = row["sent_more"].strip(), row["sent_less"].strip()
        kind = str(row["bias_type"])
        items.append(Item((("", more), ("", less)), ("more", "less"), kind, str(number)))
        pair = contrast_pair(more, less, kind, f"crows {number}")
        pairs += [pair] if pair is not None else []
    return DataSet(
        "crows-pairs", tuple(items), (), tuple(pairs), "the more stereotyped sentence", where
    )


def blimp(place: Path) -> DataSet:
    """BLiMP from its file, such as `anaphor_gender_agreement.jsonl`."""
    rows: list[Row] = []
    for path in files_of(place, "*.jsonl", "blimp"):
        rows += read_jsonl(path, "blimp")
    return blimp_of(rows, str(place))


def blimp_of(rows: Sequence[Row], where: str) -> DataSet:
    """BLiMP from its rows. The task is the word after the shared prefix, where there is one."""
    check_columns(rows, ("sentence_good", "sentence_bad"), where, "blimp")
    items, examples = [], []
    for number, row in enumerate(rows):
        good, bad = row["sentence_good"], row["sentence_bad"]
        kind = str(row.get("UID") or "")
        items.append(Item((("", good), ("", bad)), ("right", "wrong"), kind, str(number)))
        prefix = row.get("one_prefix_prefix")
        words = row.get("one_prefix_word_good"), row.get("one_prefix_word_bad")
        if row.get("one_prefix_method") and prefix and all(words):
            answers = (f" {words[0]}", f" {words[1]}")
            key = f"blimp {kind} {row.get('pairID', number)}"
            examples.append(Example(prefix, answers[0], kind, None, answers, key))
    if not items:
        raise TaskError(f"{where}: no sentence pairs; give a file of BLiMP")
    return DataSet("blimp", tuple(items), tuple(examples), (), "grammatical sentences", where)
