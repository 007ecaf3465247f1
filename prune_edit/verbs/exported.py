"""Verb `export`: a checkpoint folder for another runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.errors import OutputExistsError, OutputWriteError
from prune_edit.exporting.gguf import TYPES, export_gguf
from prune_edit.verbs.common import check_known

TARGETS = ("gguf", "onnx")


def export(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    type: str = "f16",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model folder as a GGUF file for llama.cpp, or as a folder with an ONNX graph.

    `type` is of GGUF's matrices. What was written, as JSON. The output is whole or not there.
    Raises PruneEditError where the packages are missing, UnsupportedFamilyError and PlanError for
    what the runtime cannot compute, OutputExistsError, OutputWriteError, VerificationError.
    """
    check_known("target", to, TARGETS)
    check_known("type", type, TYPES)
    out = Path(out)
    if to == "onnx":
        from prune_edit.exporting.onnx import FILE, export_onnx

        check_output(out, overwrite, FILE)
        with replacing(out, overwrite, FILE) as temporary:
            found = export_onnx(folder, temporary)
        return {**found, "to": to, "out": str(out)}
    if out.is_dir() or (os.path.lexists(out) and not overwrite):
        remedy = "give another --out" if out.is_dir() else "give another --out, or --overwrite"
        raise OutputExistsError(f"{out} exists; {remedy}")
    partial = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = export_gguf(folder, partial, type)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise OutputWriteError(
            f"{out} could not be written: {error.strerror or error}; give another --out"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return {**found, "to": to, "out": str(out)}
