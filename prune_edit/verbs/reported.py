"""Verb `report`: everything known of a checkpoint on one page, and the model card links it."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.amend import check_open, put
from prune_edit.checkpoint.card import with_report
from prune_edit.errors import ModelError, OutputExistsError, OutputWriteError
from prune_edit.report.beside import MEDIA
from prune_edit.report.gather import CARD, PAGE, gather
from prune_edit.report.page import MARK, page
from prune_edit.textfile import write_text


def report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    gate: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Gather what a checkpoint's files and those beside it say, and write it as one HTML page.

    Without `out` the page is the folder's report.html, which the folder's card then links and its
    manifest lists; an earlier report is replaced. `gate` is the verdict to show (gate.json or its
    folder), by default those found that judged these very weights. Returns the page's content;
    nothing is measured. Raises ModelError for no model folder, GateError for a verdict on another
    model, OutputExistsError, OutputWriteError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is no folder; a report is of a model's files, download it first"
        )
    target = folder / PAGE if out is None else Path(out)
    found, places = gather(folder, None if gate is None else Path(gate))
    if out is None:
        check_open(folder)
    _check_free(target, overwrite)
    images = {digest: _uri(path) for digest, path in places.items()}
    text = page(found, images)
    if out is None:
        put(folder, {PAGE: text, **_card(folder, found)})
    else:
        write_text(target, text)
    return {**found, "page": str(target)}


def _card(folder: Path, found: Mapping[str, Any]) -> dict[str, str]:
    """The card with its link, where prune-edit wrote the folder and there is one."""
    path = folder / CARD
    if found["kind"] == "model" or not path.is_file():
        return {}
    try:
        return {CARD: with_report(path.read_text(encoding="utf-8"), PAGE)}
    except (OSError, UnicodeDecodeError):
        return {}


def _check_free(path: Path, overwrite: bool) -> None:
    """Raise OutputExistsError for a file that is no report, or not to be replaced."""
    if not os.path.lexists(path) or (overwrite and path.is_file() and not path.is_symlink()):
        return
    try:
        ours = not path.is_symlink() and MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise OutputExistsError(f"{path} exists and is no report; give another --out")


def _uri(path: Path) -> str:
    try:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise OutputWriteError(f"{path} could not be read: {error.strerror}") from None
    return f"data:{MEDIA[path.suffix]};base64,{content}"
