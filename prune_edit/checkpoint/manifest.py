"""manifest.json: the SHA-256 of every file of a written checkpoint, and where it comes from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.safety import read_json
from prune_edit.errors import ModelError

NAME = "manifest.json"
SIGNATURE = "model.sig"
SCHEMA_VERSION = 1
_PROVENANCE = ("base_model", "base_digest", "plan_digest", "tool_version", "format", "recover")


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Describe all that the folder holds now. The same files give the same bytes.

    `known`: the entries of files that were read already.
    """
    files = digests(folder, known or {})
    text = json.dumps(
        {
            "schema": SCHEMA_VERSION,
            "algorithm": "sha256",
            "files": files,
            "provenance": provenance_of(folder),
        },
        indent=1,
        sort_keys=True,
    )
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def provenance_of(folder: Path) -> dict[str, Any]:
    """Where config.json says that the checkpoint comes from; empty where it says nothing."""
    try:
        config = read_json(folder / "config.json")
    except (ModelError, FileNotFoundError):
        return {}
    block = config.get("prune_edit") if isinstance(config, dict) else None
    block = block if isinstance(block, dict) else {}
    return {key: block[key] for key in _PROVENANCE if key in block}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest. Raises ModelError where there is none, or none of ours."""
    path = folder / NAME
    try:
        found = read_json(path, strict=True)
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no {NAME}, so it says nothing that could be checked; write it with this "
            "version"
        ) from None
    try:
        if (found["schema"], found["algorithm"]) != (SCHEMA_VERSION, "sha256"):
            raise ModelError(
                f"{path}: schema {found['schema']}, {found['algorithm']}; this version reads "
                f"{SCHEMA_VERSION}, sha256"
            )
        for name, entry in found["files"].items():
            if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
                raise TypeError(f"of {name}")
        if not isinstance(found["provenance"], dict):
            raise TypeError("provenance")
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no manifest: {error!r:.200}") from None
    return dict(found)


def digests(folder: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file, by its path in the folder; not the manifest's own."""
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    names = sorted(set(paths) - {NAME, SIGNATURE, *known})
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashed = list(pool.map(lambda name: sha256(paths[name]), names))
    found = {
        name: {"bytes": size, "sha256": digest}
        for name, (size, digest) in zip(names, hashed, strict=True)
    }
    return {**known, **found}


def sha256(path: Path) -> tuple[int, str]:
    """A file's size and digest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return size, digest.hexdigest()


def differences(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is not as the manifest says, a sentence each."""
    wanted = manifest["files"]
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(set(wanted) - set(there)):
        yield f"{name} is missing"
    for name in sorted(set(there) - set(wanted) - {NAME, SIGNATURE}):
        yield f"{name} is not in the manifest"
    for name in sorted(set(wanted) & set(there)):
        path = there[name]
        if path.is_symlink():
            yield f"{name} is a link"
        elif path.stat().st_size != wanted[name]["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, not {wanted[name]['bytes']:,}"
        elif sha256(path)[1] != wanted[name]["sha256"]:
            yield f"{name} has other bytes (SHA-256)"


def _files(folder: Path) -> list[Path]:
    """Everything that is no folder; links are not followed."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
