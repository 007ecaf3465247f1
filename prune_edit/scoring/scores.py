"""Scores: how much every head and neuron matters for a task, a frozen value with a file form."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prune_edit.errors import OutputWriteError, PlanError

SCHEMA_VERSION = 1
FILE_NAME = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """`heads` (L, H) and `neurons` (L, N), float32; larger matters more.

    NaN is a unit that the model does not have, or that was not scored. `metadata` names method,
    `unit` (nats; share of examples; or score, a size that means nothing beside another method's),
    task, model digest, seed, version, and the settings that are not the defaults.
    """

    heads: torch.Tensor
    neurons: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers and the metadata, places on this machine left out."""
        named = {k: v for k, v in self.metadata.items() if k not in ("model", "task_source")}
        hasher = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
        for tensor in (self.heads, self.neurons):
            hasher.update(repr(tuple(tensor.shape)).encode())
            hasher.update(tensor.float().contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file, or one into a folder. Raises OutputWriteError."""
        from safetensors.torch import save

        data = in_order(
            save(
                {
                    "heads": self.heads.float().contiguous(),
                    "neurons": self.neurons.float().contiguous(),
                },
                metadata={"format": "pt", "schema": str(SCHEMA_VERSION), **self.metadata},
            )
        )
        target = _file(path)
        new = not target.parent.exists()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.tmp")
            partial.write_bytes(data)
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                target.with_name(f".{target.name}.tmp").unlink(missing_ok=True)
                if new:
                    target.parent.rmdir()
            raise OutputWriteError(
                f"scores cannot be written to {target}: {error.strerror}; give another --out"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises PlanError."""
        from safetensors import SafetensorError, safe_open

        target = _file(path)
        try:
            with safe_open(target, framework="pt") as file:
                metadata: dict[str, Any] = dict(file.metadata() or {})
                heads, neurons = file.get_tensor("heads"), file.get_tensor("neurons")
        except (OSError, SafetensorError) as error:
            raise PlanError(
                f"scores {target} cannot be read: {error}; make them with prune-edit score"
            ) from None
        if metadata.pop("schema", None) != str(SCHEMA_VERSION):
            raise PlanError(f"scores {target} are of another schema; make them again")
        metadata.pop("format", None)
        return cls(heads, neurons, metadata)


def in_order(data: bytes) -> bytes:
    """A safetensors file with its header's keys sorted; the library's order is by chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME
