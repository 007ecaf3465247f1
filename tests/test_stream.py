"""Surgery from the disk: the bytes of surgery in memory, whatever the format, with little held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pico_checkpoint import NAMES, constants, dense, hard_layout, ragged
from safetensors.torch import save_file

from prune_edit.checkpoint import blocks, stream
from prune_edit.checkpoint.blocks import Block
from prune_edit.checkpoint.pieces import Piece, cut, plan_shards
from prune_edit.checkpoint.reading import model_digest, open_tensors
from prune_edit.checkpoint.source import Source, open_source
from prune_edit.checkpoint.store import replacing, write_tensors
from prune_edit.checkpoint.stream import write_pieces
from prune_edit.checkpoint.verify import verify_pieces
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.errors import ModelError, OutputWriteError, PlanError, VerificationError
from prune_edit.layout import Layout
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.planning import Plan
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import Options
from prune_edit.streamed import weight_bytes
from prune_edit.verbs import apply
from prune_edit.verbs.common import write


def saved(name: str, folder: Path, shards: int = 10**9, dtype: Any = torch.float32) -> Path:
    model = dense(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((REFERENCE_MODEL / file).read_bytes())
    return folder


def streamed(folder: Path, out: Path, fmt: str, want: Layout, shard: int = 10**9) -> Source:
    source = open_source(folder)
    out.mkdir()
    _, pieces = cut(source, want, fmt, {})
    assert write_pieces(out, source, pieces, shard).digest == model_digest(folder)
    return source


@pytest.fixture(params=[300, 8 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes read at once: a few rows, or everything."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("fmt", ["ragged", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_surgery_in_memory(
    name: str, fmt: str, block: int, tmp_path: Path
) -> None:
    folder = saved(name, tmp_path / "model", shards=10_000)
    want = hard_layout(name, dense(name))
    streamed(folder, tmp_path / "a", fmt, want, 5_000)
    small = ragged(name, dense(name), want)
    (tmp_path / "b").mkdir()
    write_checkpoint(
        tmp_path / "b", fmt, open_source(folder).family, small.config.to_dict(),
        small.state_dict(), want, max_shard_bytes=5_000,
    )  # fmt: skip
    weights = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(weights) > 2
    for file in weights:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("fmt", ["ragged", "masked"])
def test_apply_writes_what_it_wrote_with_the_model_in_memory(fmt: str, tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    want = hard_layout("gpt2", dense("gpt2"))
    decoder = load_decoder(folder)
    plan = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons, model_digest=decoder.digest)
    apply(folder, plan, tmp_path / "a", format=fmt, recover="none")
    small = shrink(decoder, plan.heads, plan.neurons, None, Options())
    with replacing(tmp_path / "b") as temporary:
        write(temporary, small, decoder, plan, fmt, "none")
    for path in (tmp_path / "b").iterdir():
        if path.name != "manifest.json":
            assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_other_formats_are_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved("llama", tmp_path / "model", shards=10_000, dtype=dtype)
    assert len(list(folder.glob("*.safetensors"))) > 1
    want = hard_layout("llama", dense("llama"))
    plan = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons)
    apply(folder, plan, tmp_path / "own", recover="none")
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "own").values()} == {dtype}
    apply(folder, plan, tmp_path / "wide", recover="none", dtype="float32")
    narrow, wide = open_tensors(tmp_path / "own"), open_tensors(tmp_path / "wide")
    assert all(torch.equal(narrow[name].float(), wide[name]) for name in wide)


def test_a_ragged_source_is_cut_again(tmp_path: Path) -> None:
    folder = saved("llama-gqa", tmp_path / "model")
    have = open_source(folder).have
    half = have.keep(((0, 1, 5), (0, 1, 2, 5), (7,)), ((1, 2, 3), (3,), (0,)))
    want = hard_layout("llama-gqa", dense("llama-gqa"))
    plans = [Plan(each.heads, each.neurons, 8, 12) for each in (half, want)]
    apply(folder, plans[0], tmp_path / "half", recover="none")
    apply(tmp_path / "half", plans[1], tmp_path / "twice", recover="none")
    apply(folder, plans[1], tmp_path / "once", recover="none")
    file = "model.safetensors"
    assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    with pytest.raises(PlanError, match="no longer has"):
        apply(tmp_path / "once", plans[0], tmp_path / "back", recover="none")


def test_a_compensation_is_added(tmp_path: Path) -> None:
    folder = saved("llama-biased", tmp_path / "model")
    source, want = open_source(folder), hard_layout("llama-biased", dense("llama-biased"))
    _, pieces = cut(source, want, "ragged", {}, constants(want))
    (tmp_path / "out").mkdir()
    write_pieces(tmp_path / "out", source, pieces)
    (tmp_path / "out" / "config.json").write_text("{}")
    expected = ragged("llama-biased", dense("llama-biased"), want, constants(want)).state_dict()
    found = open_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_shards_are_planned_as_they_are_written(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16]
    tensors = {f"t{i}é\n": torch.ones(3 + i, 2, dtype=kinds[i % 5]) for i in range(12)}
    write_tensors(tmp_path, sorted(tensors.items()), 60)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    names |= {torch.bool: "BOOL", torch.float16: "F16"}
    pieces = [
        Piece(name, names[tensor.dtype], tuple(tensor.shape), value=tensor)
        for name, tensor in sorted(tensors.items())
    ]
    shards = plan_shards(pieces, 60)
    assert len(shards) > 3
    for shard in shards:
        whole = (tmp_path / shard.name).read_bytes()
        assert whole.startswith(shard.header) and len(whole) == shard.size


def test_little_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many blocks there are, the reader is a few ahead of the writer and no more."""
    monkeypatch.setattr(blocks, "BLOCK", 256)
    folder = saved("llama", tmp_path / "model")
    made, most, real = 0, 0, Block.__init__

    def counted(self: Block, *args: Any) -> None:
        nonlocal made
        made += 1
        real(self, *args)

    given = 0
    back = blocks.Reader.give_back

    def given_back(self: Any, found: Block) -> None:
        nonlocal given, most
        most = max(most, made - given)
        given += 1
        back(self, found)

    monkeypatch.setattr(Block, "__init__", counted)
    monkeypatch.setattr(blocks.Reader, "give_back", given_back)
    streamed(folder, tmp_path / "out", "ragged", hard_layout("llama", dense("llama")))
    assert made > 50 and most <= blocks.AHEAD + 1 + blocks._READS


def test_the_plan_must_be_of_this_model(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    want = hard_layout("llama", dense("llama"))
    other = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons, model_digest="f" * 64)
    with pytest.raises(PlanError, match="another model"):
        apply(folder, other, tmp_path / "out", recover="none")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_too_little_room_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path / "model")
    want = hard_layout("llama", dense("llama"))

    class Full:
        f_bavail, f_frsize = 1, 512

    monkeypatch.setattr(stream.os, "statvfs", lambda path: Full)
    plan = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons)
    with pytest.raises(OutputWriteError, match="bytes are needed, 512 are free; free some space"):
        apply(folder, plan, tmp_path / "out", recover="none")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_source_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path / "model")
    source = open_source(folder)
    _, pieces = cut(source, hard_layout("llama", dense("llama")), "ragged", {})
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="changed while it was read"):
        write_pieces(tmp_path / "out", source, pieces)


@pytest.mark.parametrize("fmt", ["ragged", "masked"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_every_wrong_tensor_is_found_by_reading_back(
    name: str, fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_edit.checkpoint.verify._BLOCK", 900)
    folder = saved(name, tmp_path / "model")
    want = hard_layout(name, dense(name))
    plan = Plan(want.heads, want.neurons, want.n_heads, want.n_neurons)
    apply(folder, plan, tmp_path / "out", recover="none", format=fmt)
    source = open_source(folder)
    _, pieces = cut(source, want, fmt, {})
    verify_pieces(tmp_path / "out", source, pieces)
    whole = dict(open_tensors(tmp_path / "out"))
    for piece in pieces[::3]:
        wrong = {key: tensor.clone() for key, tensor in whole.items()}
        flat = wrong[piece.name].view(-1)
        flat[-1] += 1
        save_file(wrong, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(VerificationError, match="is not the slice of the source"):
            verify_pieces(tmp_path / "out", source, pieces)
    wrong = dict(whole)
    wrong.pop(pieces[0].name)
    save_file(wrong, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="the configuration says"):
        verify_pieces(tmp_path / "out", source, pieces)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_finite_is_told_from_bits(dtype: str) -> None:
    kind = stream.DTYPES[dtype]
    raw = blocks.raw(dtype)

    def bits(values: list[float]) -> numpy.ndarray[Any, Any]:
        tensor = torch.tensor(values, dtype=kind).view(torch.uint8)
        found: numpy.ndarray[Any, Any] = tensor.numpy().view(raw)
        return found

    most = torch.finfo(kind).max
    assert stream._finite(bits([0.0, -0.0, most, -most, torch.finfo(kind).tiny]), dtype)
    for odd in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        assert not stream._finite(bits([1.0, odd, -1.0]), dtype)


@pytest.mark.parametrize(("heads", "neurons"), [("few", "few"), ("all", "few"), ("few", "all")])
def test_means_of_a_model_on_disk_are_those_in_memory(
    heads: str, neurons: str, tmp_path: Path
) -> None:
    layout, size = load_decoder().layout, weight_bytes(REFERENCE_MODEL, torch.float32)
    plan = Plan(
        ((), *((1, 2, 8),) * 7) if heads == "few" else layout.heads,
        (*((3, 5, 100),) * 7, ()) if neurons == "few" else layout.neurons,
        layout.n_heads,
        layout.n_neurons,
    )
    settings: dict[str, Any] = {"task": "arithmetic", "limit": 6}
    apply(None, plan, tmp_path / "memory", **settings)
    disk = {"device_map": "auto", "max_memory": str(int(size * 0.9))}
    apply(None, plan, tmp_path / "disk", **settings, **disk)
    there, here = (open_tensors(tmp_path / name) for name in ("memory", "disk"))
    assert set(there) == set(here)
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-6)
    bias = here["model.layers.3.self_attn.o_proj.bias"]
    assert float(bias.abs().max()) > 1e-2 or heads == "all"
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in
               ("memory", "disk")]  # fmt: skip
    assert configs[0] == configs[1]
    with pytest.raises(ModelError, match="give --recover mean or none, or more --max-memory"):
        apply(None, plan, tmp_path / "lora", recover="lora", **settings, **disk)
    assert not (tmp_path / "lora").exists()
