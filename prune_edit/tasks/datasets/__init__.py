"""Published bias and agreement tests from the user's files: `winobias:FOLDER` and so on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets import (
    coreference,
    hub,
    professions,
    questions,
    sentence_pairs,
    stereoset,
)
from prune_edit.tasks.datasets.items import DataSet, Item

__all__ = ["DATA_SETS", "DataSet", "Item", "is_data_set", "load_data_set"]

DATA_SETS: dict[str, Callable[[Path], DataSet]] = {
    "winobias": coreference.winobias,
    "winogender": coreference.winogender,
    "crows-pairs": sentence_pairs.crows_pairs,
    "stereoset": stereoset.stereoset,
    "bbq": questions.bbq,
    "blimp": sentence_pairs.blimp,
    "debiaswe": professions.debiaswe,
    "dama": professions.dama,
    "svamp": questions.svamp,
}
"""Readers by name; each takes the file, or the folder of the files, as published."""


def is_data_set(text: str) -> bool:
    """Whether `text` is a data set's name, with or without a place."""
    return text.partition(":")[0] in DATA_SETS


def load_data_set(text: str) -> DataSet:
    """`NAME:PATH`, or `NAME:hub` where the hub has it. Raises TaskError."""
    name, _, place = text.partition(":")
    if name not in DATA_SETS:
        raise TaskError(f"unknown data set {name!r}; known are {', '.join(DATA_SETS)}")
    if not place:
        also = f", or {name}:hub" if name in hub.HOMES else ""
        raise TaskError(
            f"{name} is not shipped; give its file or folder: {name}:PATH{also} (README, Data sets)"
        )
    return _load(name, place)


@lru_cache(maxsize=16)
def _load(name: str, place: str) -> DataSet:
    if place.partition(":")[0] == hub.PREFIX and not Path(place).exists():
        return hub.load(name, place)
    return DATA_SETS[name](Path(place))
