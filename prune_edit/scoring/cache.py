"""Cache: finished scores, and the sums of runs that were killed, under the user's cache folder.

`$XDG_CACHE_HOME/prune-edit/scores` (`~/.cache/prune-edit/scores`): one `KEY.scores.safetensors`
for a finished run or one `KEY.part.safetensors` for an unfinished one. KEY is the SHA-256 of
everything that decides the numbers: model, prompts as tokens, method, options, seed where one is
drawn from, number format, attention implementation, kind of device, and the versions of torch,
transformers and this package's own code. How much runs at once does not: after an error for want of
memory the same run with smaller --batch-tokens goes on. At most 64 files and
256 MiB stay, the least recently used go first; the folder may be deleted at any time. A file that
cannot be read, or whose digest is not its content's, is ignored and made again; a folder that
cannot be written means no cache, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from prune_edit import __version__
from prune_edit.decoder import Decoder
from prune_edit.scoring.options import Options
from prune_edit.scoring.scores import in_order
from prune_edit.scoring.shards import Part, Sums
from prune_edit.tasks.prompts import Encoded

MOST_FILES = 64
MOST_BYTES = 256 << 20
_INERT = ("progress", "batch_tokens", "means", "share", "gather")
"""What changes no number by more than rounding, or follows from the rest."""
_SCORES, _PART = ".scores.safetensors", ".part.safetensors"


def cache_folder() -> Path:
    """Where the cache is."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "prune-edit" / "scores"


def entry_of(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    method: str,
    options: Options,
    **more: str | int | None,
) -> Entry | None:
    """The entry of this run, or None where something that decides it has no digest."""
    if not decoder.digest or decoder.digest.endswith("@"):
        return None
    named: dict[str, Any] = {
        "model": decoder.digest,
        "prompts": _digest(repr([(row.ids, row.start, row.example) for row in prompts])),
        "method": method,
        "dtype": str(decoder.unembedding.dtype),
        "device": decoder.device.type,
        "attention": str(getattr(decoder.model.config, "_attn_implementation", "")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "version": __version__,
        "code": code_digest(),
        **more,
    }
    for option in fields(options):
        if option.name not in (*_INERT, *(() if method == "random" else ("seed",))):
            text = _stable(getattr(options, option.name), decoder)
            if text is None:
                return None
            named[f"option {option.name}"] = text
    return Entry(cache_folder(), _digest(json.dumps(named, sort_keys=True)))


@dataclass(frozen=True)
class Entry:
    """One run's files in the cache."""

    folder: Path
    key: str

    def load_scores(self) -> Part | None:
        """Heads (L, H) and neurons (L, N) of a finished run."""
        found = self._load(_SCORES)
        return None if found is None else (found[0]["heads"], found[0]["neurons"])

    def save_scores(self, part: Part) -> None:
        """Keep a finished run, and its unfinished form no longer."""
        self._save(_SCORES, {"heads": part[0], "neurons": part[1]}, {})
        with suppress(OSError):
            (self.folder / (self.key + _PART)).unlink(missing_ok=True)

    def load_sums(self) -> Sums | None:
        """What a killed run had finished."""
        found = self._load(_PART)
        if found is None:
            return None
        return Sums(found[0], **found[1])

    def save_sums(self, sums: Sums) -> None:
        """Keep what is finished so far."""
        self._save(_PART, sums.tensors, sums.counts())

    def _save(
        self, kind: str, tensors: Mapping[str, torch.Tensor], counts: Mapping[str, int]
    ) -> None:
        from safetensors.torch import save

        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(counts), sort_keys=True)
        metadata = {"counts": text, "digest": _content(self.key, whole, text)}
        data = in_order(save(whole, metadata=metadata))
        target = self.folder / (self.key + kind)
        partial = self.folder / f"{self.key}.tmp-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(target)
            _trim(self.folder, target)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _load(self, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / (self.key + kind)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["digest"] != _content(self.key, tensors, metadata["counts"]):
                return None
            os.utime(path)  # used just now
            return tensors, json.loads(metadata["counts"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None


def _trim(folder: Path, newest: Path) -> None:
    """Remove the least recently used files beyond the limits, but not the one just written."""
    known = []
    for path in folder.iterdir():
        with suppress(OSError):  # another run may have removed it
            known.append((path.stat().st_mtime, path.stat().st_size, path))
    size = newest.stat().st_size
    count = 1
    for _, bytes_, path in sorted(known, key=lambda row: row[0], reverse=True):
        if path == newest:
            continue
        size, count = size + bytes_, count + 1
        if size > MOST_BYTES or count > MOST_FILES:
            with suppress(OSError):
                path.unlink()


def _content(key: str, tensors: Mapping[str, torch.Tensor], counts: str) -> str:
    hasher = hashlib.sha256(f"{key}\0{counts}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _stable(value: Any, decoder: Decoder) -> str | None:
    """A text that is equal for equal values, whatever the process; None where there is none."""
    if isinstance(value, Decoder):
        # A tuned copy goes by the digests of the model and of what it was tuned with.
        return None if value.digest in ("", decoder.digest) else value.digest
    text = repr(value)
    return None if " at 0x" in text else text


@cache
def code_digest() -> str:
    """Of this package's modules: a changed formula must not find the old one's scores."""
    root = Path(__file__).parents[1]
    return _digest("".join(p.read_text("utf-8") for p in sorted(root.rglob("*.py"))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
