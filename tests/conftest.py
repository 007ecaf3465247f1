"""Settings of every test: no network, few threads, and where the reference material is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any Hugging Face library is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from prune_edit.decoder import Decoder
from prune_edit.loading import load_decoder

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connecting to anything but this machine is an error."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise RuntimeError(f"a test tried to reach {address}; tests use no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scores are cached in the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the repository; without it the test is skipped."""
    folder = os.environ.get("PRUNE_EDIT_SHARED")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no reference material at {path}; set PRUNE_EDIT_SHARED to its folder")
    return path


def _model(shared: Path, name: str) -> Decoder:
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return load_decoder(folder)


@pytest.fixture(scope="session")
def reference_model() -> Decoder:
    """The bundled model."""
    return load_decoder()


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Decoder:
    """A Llama with grouped queries that tells stories."""
    return _model(shared, "stories260K")


@pytest.fixture(scope="session")
def mathgpt(shared: Path) -> Decoder:
    """A GPT-2 that adds three-digit numbers."""
    return _model(shared, "mathgpt-4l4h")
