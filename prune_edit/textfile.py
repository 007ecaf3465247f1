"""Text files of their own, whole or not at all; without importing torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prune_edit.errors import OutputWriteError


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises OutputWriteError."""
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputWriteError(
            f"{path} could not be written: {error.strerror}; give another --out"
        ) from None
