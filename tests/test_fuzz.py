"""Configurations, indexes and headers of any kind: a PruneEditError or a folder, nothing else.

`PRUNE_EDIT_FUZZ=10000` tries as many inputs in all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from pico_checkpoint import dense, hard_layout, ragged

from prune_edit.checkpoint.pieces import cut
from prune_edit.checkpoint.reading import model_digest, open_tensors
from prune_edit.checkpoint.source import open_source
from prune_edit.checkpoint.store import replacing
from prune_edit.checkpoint.stream import write_pieces
from prune_edit.checkpoint.verify import verify_pieces
from prune_edit.checkpoint.write import write_companions
from prune_edit.errors import PruneEditError

INPUTS = int(os.environ.get("PRUNE_EDIT_FUZZ", "120"))
pytestmark = pytest.mark.timeout(max(900, INPUTS))
_QUICK = settings(
    max_examples=max(1, INPUTS // 4),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_NUMBERS = some.one_of(
    some.integers(-3, 100),
    some.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
    some.floats(allow_nan=True),
)
_TEXTS = some.one_of(
    some.text(max_size=8),
    some.sampled_from(
        [
            "../x",
            "/etc/passwd",
            "..",
            "a/b",
            "model.safetensors",
            "nan\0",
            "\ud800",
            "llama",
            "x" * 300,
        ]
    ),
)
_VALUES = some.recursive(
    some.none() | some.booleans() | _NUMBERS | _TEXTS,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock and a pruned model."""
    home = tmp_path_factory.mktemp("fuzz")
    model = dense("llama-gqa")
    model.save_pretrained(home / "dense")
    ragged("llama-gqa", dense("llama-gqa"), hard_layout("llama-gqa", model)).save_pretrained(
        home / "ragged"
    )
    return {name: home / name for name in ("dense", "ragged")}


def survives(folder: Path, spoil: Callable[[Path], None]) -> None:
    """Spoil a copy of the folder, then read, digest and cut it: only our errors, only our files."""
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        shutil.copytree(folder, room / "model")
        spoil(room / "model")
        before = {path.name for path in (room / "model").iterdir()}
        out, said = room / "out", []

        def apply_all() -> None:
            source = open_source(room / "model")
            fields, pieces = cut(source, source.alive, "ragged", {})
            with replacing(out) as target:
                write_pieces(target, source, pieces)
                write_companions(target, "ragged", source.family, fields, room / "model")
                verify_pieces(target, source, pieces)

        for work in (
            lambda: open_tensors(room / "model"),
            lambda: model_digest(room / "model"),
            apply_all,
        ):
            try:
                work()
            except PruneEditError as error:
                said.append(str(error))
        assert not any("\n" in text or len(text) > 2000 for text in said)
        assert {path.name for path in (room / "model").iterdir()} == before
        assert {path.name for path in room.iterdir()} <= {"model", "out"}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@_QUICK
@given(data=some.data())
def test_configurations(folders: dict[str, Path], data: some.DataObject) -> None:
    folder = folders[data.draw(some.sampled_from(sorted(folders)))]
    fields = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(some.integers(1, 3))):
        key = data.draw(some.sampled_from(sorted(fields)) | _TEXTS)
        where = fields.get(key)
        value = data.draw(_VALUES)
        if isinstance(where, dict) and where and data.draw(some.booleans()):
            where[data.draw(some.sampled_from(sorted(where)))] = value
        else:
            fields[key] = value
    survives(folder, lambda model: _write(model / "config.json", json.dumps(fields)))


@_QUICK
@given(data=some.data())
def test_indexes(folders: dict[str, Path], data: some.DataObject) -> None:
    names = sorted(header_of(folders["dense"] / "model.safetensors")[0])
    index: Any = {
        "metadata": data.draw(_VALUES),
        "weight_map": data.draw(
            some.dictionaries(some.sampled_from(names) | _TEXTS, _TEXTS | _VALUES, max_size=5)
            | _VALUES
        ),
    }
    text = json.dumps(data.draw(some.just(index) | _VALUES))

    def spoil(model: Path) -> None:
        (model / "model.safetensors").rename(model / "part.safetensors")
        _write(model / "model.safetensors.index.json", text)

    survives(folders["dense"], spoil)


@_QUICK
@given(data=some.data())
def test_headers(folders: dict[str, Path], data: some.DataObject) -> None:
    header, rest = header_of(folders["dense"] / "model.safetensors")
    for _ in range(data.draw(some.integers(1, 3))):
        name = data.draw(some.sampled_from(sorted(header)) | _TEXTS)
        value = header.get(name)
        if isinstance(value, dict) and value and data.draw(some.booleans()):
            value[data.draw(some.sampled_from(sorted(value)))] = data.draw(_VALUES)
        else:
            header[name] = data.draw(_VALUES)
    text = json.dumps(header).encode()
    length = data.draw(some.just(len(text)) | some.integers(0, 2**64 - 1))
    content = length.to_bytes(8, "little") + text + rest
    survives(folders["dense"], lambda model: _write(model / "model.safetensors", content))


@_QUICK
@given(data=some.data())
def test_bytes(folders: dict[str, Path], data: some.DataObject) -> None:
    """Any bytes at any place of any file, and files that end early."""
    folder = folders[data.draw(some.sampled_from(sorted(folders)))]
    name = data.draw(some.sampled_from(["config.json", "model.safetensors"]))
    whole = bytearray((folder / name).read_bytes())
    place = data.draw(some.integers(0, min(len(whole), 4000)))
    new = data.draw(some.binary(min_size=1, max_size=12))
    whole[place : place + len(new)] = new
    end = data.draw(some.just(len(whole)) | some.integers(0, len(whole)))
    survives(folder, lambda model: _write(model / name, bytes(whole[:end])))


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
