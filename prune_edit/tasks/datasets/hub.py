"""The data sets that the hub has in their published columns, through the `datasets` package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.datasets import questions, sentence_pairs, stereoset
from prune_edit.tasks.datasets.files import Row
from prune_edit.tasks.datasets.items import DataSet

PREFIX = "hub"


@dataclass(frozen=True)
class _Home:
    """Where a data set is: repository, configurations, split, and what reads its rows."""

    repository: str
    read: Callable[[Sequence[Row], str], DataSet]
    configurations: tuple[str | None, ...] = (None,)
    split: str = "test"


HOMES = {
    "blimp": _Home(
        "nyu-mll/blimp", sentence_pairs.blimp_of, ("anaphor_gender_agreement",), "train"
    ),
    "crows-pairs": _Home("jannalu/crows_pairs_multilingual", sentence_pairs.crows_pairs_of,
                         ("english",)),
    "stereoset": _Home("McGill-NLP/stereoset", stereoset.stereoset_of,
                       ("intrasentence", "intersentence"), "validation"),
    "bbq": _Home("heegyu/bbq", questions.bbq_of, ("Gender_identity",)),
    "svamp": _Home("ChilleD/SVAMP", questions.svamp_of),
}  # fmt: skip


def load(name: str, place: str) -> DataSet:
    """`crows-pairs:hub`, or `crows-pairs:hub:OWNER/NAME` for a copy. Raises TaskError."""
    home = HOMES.get(name)
    if home is None:
        raise TaskError(
            f"{name} is not on the hub in its published format; give a file: {name}:PATH (on the "
            f"hub are {', '.join(HOMES)})"
        )
    _, _, own = place.partition(":")
    repository = own or home.repository
    rows: list[Row] = []
    for configuration in home.configurations:
        found = _rows(repository, configuration, home.split)
        rows += [{"kind": configuration, **row} for row in found]
    return home.read(rows, f"{PREFIX}:{repository}")


def _rows(repository: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise TaskError(
            "data sets of the hub need the package `datasets`: pip install 'prune-edit[eval]', or "
            "give a file"
        ) from None
    try:
        table = load_dataset(repository, configuration, split=split)
    except Exception as error:  # whatever the package raises: network, names, formats
        said = " ".join(str(error).split())[:300]
        raise TaskError(
            f"{repository} could not be loaded from the hub: {type(error).__name__}: {said}; "
            "download its file and give the path"
        ) from None
    named = {
        column: feature.int2str
        for column, feature in table.features.items()
        if hasattr(feature, "int2str")
    }
    return [
        {key: named[key](value) if key in named else value for key, value in row.items()}
        for row in table
    ]
