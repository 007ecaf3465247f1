"""What was written is read from the disk again, and every byte is looked at."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy
import pytest
from pico_checkpoint import dense, hard_layout

from prune_edit.checkpoint import blocks, files
from prune_edit.checkpoint.files import OnceRead, aligned
from prune_edit.checkpoint.manifest import digests, read_manifest
from prune_edit.checkpoint.pieces import Piece, cut
from prune_edit.checkpoint.readback import read_back
from prune_edit.checkpoint.source import Source, open_source
from prune_edit.checkpoint.stream import Written, write_pieces
from prune_edit.checkpoint.verify import verify_pieces
from prune_edit.checkpoint.write import write_companions
from prune_edit.errors import ModelError, VerificationError
from prune_edit.loading import REFERENCE_MODEL
from prune_edit.planning import Plan
from prune_edit.verbs import apply
from prune_edit.verbs import cut as cut_verb


def written(tmp_path: Path, fmt: str = "masked") -> tuple[Path, Source, list[Piece], Written]:
    dense("llama-gqa").save_pretrained(tmp_path / "model")
    source, want = open_source(tmp_path / "model"), hard_layout("llama-gqa", dense("llama-gqa"))
    fields, pieces = cut(source, want, fmt, {})
    (tmp_path / "out").mkdir()
    found = write_pieces(tmp_path / "out", source, pieces, 7_000)
    write_companions(tmp_path / "out", fmt, source.family, fields, None)
    return tmp_path / "out", source, pieces, found


@pytest.mark.parametrize("size", [64, 8 << 20])
@pytest.mark.parametrize("fmt", ["masked", "ragged"])
def test_every_byte_is_looked_at(
    fmt: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _, found = written(tmp_path, fmt)
    assert len(found.segments) > 2
    monkeypatch.setattr(blocks, "BLOCK", size)
    entries = read_back(folder, found)
    assert entries.items() <= digests(folder, {}).items()
    name = sorted(found.segments)[1]
    whole = (folder / name).read_bytes()
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        wrong = bytearray(whole)
        wrong[place] ^= 4
        (folder / name).write_bytes(wrong)
        with pytest.raises(VerificationError, match="does not read back as it was written"):
            read_back(folder, found)
    for wrong_size in (whole[:-8], whole + b"\1"):
        (folder / name).write_bytes(wrong_size)
        with pytest.raises(VerificationError, match="does not read back as it was written"):
            read_back(folder, found)


def test_what_was_left_out_must_be_zero(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * 100)
    read_back(tmp_path, Written("", {"weights": 100}, {"weights": []}))
    path.write_bytes(b"\0" * 99 + b"\1")
    with pytest.raises(VerificationError, match="from byte 0 on"):
        read_back(tmp_path, Written("", {"weights": 100}, {"weights": []}))


def test_a_sample_tells_a_tensor_of_other_units(tmp_path: Path) -> None:
    folder, source, pieces, _ = written(tmp_path, "ragged")
    verify_pieces(folder, source, pieces, sample=True)
    number = next(i for i, piece in enumerate(pieces) if piece.positions is not None)
    other = pieces[number]
    assert other.positions is not None
    pieces[number] = Piece(
        other.name, other.dtype, other.shape, other.source, other.axis, other.positions[::-1].copy()
    )
    with pytest.raises(VerificationError, match="is not the slice of the source"):
        verify_pieces(folder, source, pieces, sample=True)


def test_a_large_model_is_written_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense("llama-gqa").save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((REFERENCE_MODEL / file).read_bytes())
    want = hard_layout("llama-gqa", dense("llama-gqa"))
    plan = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons)
    notes: list[str] = []
    for limit, name in ((cut_verb.LIMIT, "small"), (0, "large")):
        monkeypatch.setattr(cut_verb, "LIMIT", limit)
        apply(tmp_path / "model", plan, tmp_path / name, recover="none", note=notes.append)
    assert len(notes) == 1 and "--against" in notes[0]
    manifests = [read_manifest(tmp_path / name) for name in ("small", "large")]
    assert manifests[0] == manifests[1]
    weights = (tmp_path / "large" / "model.safetensors").read_bytes()
    entry = manifests[1]["files"]["model.safetensors"]
    assert entry["sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_reading_past_the_cache_reads_the_same(
    direct: bool, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(files, "_DIRECT", 0)
    whole = numpy.random.default_rng(0).bytes(100_001)
    path = tmp_path / "file"
    path.write_bytes(whole)
    if not cached and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with OnceRead(path) as once:
        assert once.size == len(whole)
        home = aligned(30_000)
        for begin, size in ((0, 8), (8, 30_000), (4096, 4096), (30_009, 30_000), (72_000, 28_001)):
            assert once.read(home, begin, size).tobytes() == whole[begin : begin + size]
        with pytest.raises(ModelError, match="changed while it was read"):
            once.read(home, 100_000, 2)
