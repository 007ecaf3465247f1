"""Read published files row by row; every error names the file and the row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError

Row = Mapping[str, Any]


def read_text(path: Path, what: str) -> str:
    """A text file. Raises TaskError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{what} file {path} cannot be read: {error}") from None


def read_json(path: Path, what: str) -> Any:
    """A JSON file. Raises TaskError."""
    try:
        return json.loads(read_text(path, what))
    except ValueError as error:
        raise TaskError(f"{path} is not JSON ({error}); give {what} as published") from None


def read_jsonl(path: Path, what: str) -> list[Row]:
    """One JSON object a line. Raises TaskError naming the line."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{path} line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise TaskError(f"{path} line {number}: a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def read_table(path: Path, what: str, delimiter: str = ",") -> list[Row]:
    """A file of columns with their names in its first row. Raises TaskError."""
    return list(csv.DictReader(io.StringIO(read_text(path, what)), delimiter=delimiter))


def check_columns(rows: Sequence[Row], names: Iterable[str], where: object, what: str) -> None:
    """Raise TaskError for the first row that lacks one of the columns."""
    for number, row in enumerate(rows, 1):
        for name in names:
            if row.get(name) is None:
                raise TaskError(
                    f"{where}: row {number} has no {name!r}; give {what} in the format it was "
                    "published in"
                )


def files_of(place: Path, pattern: str, what: str) -> list[Path]:
    """The file itself, or a folder's files by name. Raises TaskError where there is none."""
    if place.is_file():
        return [place]
    found = sorted(place.glob(pattern)) if place.is_dir() else []
    if not found:
        raise TaskError(f"{what}: {place} is neither a file nor a folder with {pattern}")
    return found
