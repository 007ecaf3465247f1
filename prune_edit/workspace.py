"""Workspace: where a run keeps its finished stages until its output is whole.

A hidden folder beside the output, named by the digest of everything that decides the result. A
killed run leaves it, and the same command goes on from there; a finished run removes it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, OutputWriteError, PlanError
from prune_edit.scoring.scores import Scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Workspace:
    """Finished stages under `folder`, or nowhere for None."""

    folder: Path | None = None

    @classmethod
    def beside(cls, out: Path, made_of: Mapping[str, Any]) -> Workspace:
        """The workspace of an output for these inputs; those of other inputs are removed."""
        text = json.dumps(made_of, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = out.parent / f".{out.name}.work-{digest}"
        for stale in out.parent.glob(f".{glob.escape(out.name)}.work-*"):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
        return cls(folder)

    def within(self, name: str) -> Workspace:
        """A part of this workspace with stages of its own."""
        return Workspace(self.folder and self.folder / name)

    def save_scores(self, scores: Scores) -> None:
        """Keep the scores of the dense model."""
        if self.folder is not None:
            scores.save(self.folder / "scores.safetensors")

    def load_scores(self) -> Scores | None:
        """The scores an earlier run finished."""
        if self.folder is None or not (self.folder / "scores.safetensors").is_file():
            return None
        try:
            return Scores.load(self.folder / "scores.safetensors")
        except PlanError:
            return None  # cut off while it was written: scored again

    def save_model(self, name: str, decoder: Decoder) -> None:
        """Keep a model as one file. Raises OutputWriteError."""
        config = json.dumps(decoder.model.config.to_dict(), default=str)
        self._save(name, decoder.model.state_dict(), {"config": config})

    def load_model(self, name: str, like: Decoder) -> Decoder | None:
        """A model that an earlier run finished, with the tokenizer and origin of `like`."""
        from prune_edit.checkpoint.write import build_model

        state, metadata = self._load(name) or ({}, {})
        try:
            return like.with_model(build_model(json.loads(metadata["config"]), state))
        except (KeyError, ValueError, ModelError):
            return None  # not there, or cut off while it was written: made again

    def save_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the state of work under way as one file. Raises OutputWriteError."""
        self._save(name, tensors, about or {})

    def load_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """The state of work that an earlier run had under way."""
        found = self._load(name)
        return None if found is None else found[0]

    def find_tensors(
        self, ending: str, key: str, value: str
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """What was kept under a name with this ending, about which `key` is `value`."""
        for path in sorted(self.folder.glob(f"*{ending}.safetensors")) if self.folder else ():
            found = self._load(path.stem)
            if found is not None and found[1].get(key) == value:
                return found
        return None

    def _save(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        from safetensors.torch import save

        if self.folder is None:
            return
        whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{name}.tmp"
            partial.write_bytes(save(whole, metadata=dict(metadata)))
            partial.replace(self.folder / f"{name}.safetensors")
        except OSError as error:
            self.remove()  # a full disk needs the room more than the next run the stages
            raise self._refused(error) from None

    def place(self, name: str) -> Path:
        """Where a folder of this name belongs, in a folder that is there. Raises OutputWriteError.

        Asked before the work, so that an output that cannot be is known at once.
        """
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from None
        return self.folder / name

    def _refused(self, error: OSError) -> OutputWriteError:
        return OutputWriteError(
            f"{self.folder} cannot be written: {error.strerror}; free some space or give another "
            "--out"
        )

    def _load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return found, dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return None  # not there, or cut off while it was written

    def drop(self, name: str) -> None:
        """Remove what was kept under a name, once it serves no more."""
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything, once the output is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
