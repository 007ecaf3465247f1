"""Add to a finished checkpoint what describes it, such as a card or a page, and keep its manifest.

The weights and the configuration are never touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from prune_edit.checkpoint.locking import locked
from prune_edit.checkpoint.manifest import NAME, SIGNATURE, read_manifest, sha256
from prune_edit.errors import ModelError, OutputWriteError


def check_open(folder: Path) -> None:
    """Raise OutputWriteError where a signature covers the folder as it is."""
    if (folder / SIGNATURE).exists():
        raise OutputWriteError(
            f"{folder} is signed ({SIGNATURE}), and another file in it would break that; give a "
            "place elsewhere with --out, or write first and sign then"
        )


def put(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts by file name, each whole or not at all, and their entries in the manifest.

    A file that was not as the manifest said keeps its entry, so that `verify` still tells. A kill
    between two files leaves a manifest that does not fit; the same call mends it. Raises
    OutputWriteError, OutputExistsError while another run writes the folder.
    """
    check_open(folder)
    partials = {name: folder / f".{name}.tmp-{os.getpid()}" for name in (*texts, NAME)}
    try:
        with locked(folder):
            manifest = _manifest(folder)
            for name, text in texts.items():
                partials[name].write_text(text, encoding="utf-8")
            if manifest is not None:
                for name in texts:
                    if _fits(folder / name, manifest["files"].get(name)):
                        size, digest = sha256(partials[name])
                        manifest["files"][name] = {"bytes": size, "sha256": digest}
                text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
                partials[NAME].write_text(text, encoding="utf-8")
            for name, partial in partials.items():
                if partial.exists():
                    partial.replace(folder / name)
    except (OSError, UnicodeEncodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise OutputWriteError(
            f"{folder} could not be written: {said}; give a place elsewhere with --out"
        ) from None
    finally:
        for partial in partials.values():
            if partial.parent.is_dir() and os.access(partial.parent, os.W_OK):
                partial.unlink(missing_ok=True)


def _manifest(folder: Path) -> dict[str, dict[str, dict[str, object]]] | None:
    try:
        return read_manifest(folder)
    except ModelError:  # there is none, or none of ours
        return None


def _fits(path: Path, entry: Mapping[str, object] | None) -> bool:
    """Whether a file is as its entry says, or neither is there."""
    if entry is None:
        return not path.exists()
    if not path.is_file():
        return False
    size, digest = sha256(path)
    return entry == {"bytes": size, "sha256": digest}
