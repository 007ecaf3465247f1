"""Layouts, slicing, masking, and folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_checkpoint import NAMES, close, constants, dense, family, hard_layout, oracle, ragged
from safetensors.torch import save_file

from prune_edit.arrange import Canonical
from prune_edit.checkpoint.masked import masked_config, masked_tensors
from prune_edit.checkpoint.slim import slim_config, slim_tensors
from prune_edit.checkpoint.store import (
    check_output,
    model_digest,
    open_tensors,
    read_config,
    replacing,
    write_tensors,
)
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import build_model, write_checkpoint
from prune_edit.errors import (
    ModelError,
    OutputExistsError,
    OutputWriteError,
    PlanError,
    UnsafeCheckpointError,
    VerificationError,
)
from prune_edit.families import family_of
from prune_edit.layout import Layout

SHARED = Path(os.environ.get("PRUNE_EDIT_SHARED", Path(__file__).parents[2] / "shared")) / "models"
PROMPT = torch.tensor([[3, 9, 27, 4, 12, 36], [5, 25, 8, 1, 2, 3]])


def written(folder: Path, fmt: str, name: str, model: Any, **options: Any) -> Path:
    layout = Layout.of_config(model.config)
    folder.mkdir()
    write_checkpoint(
        folder, fmt, family(name), model.config.to_dict(), model.state_dict(), layout, **options
    )
    return folder


# Layout


def test_short_groups_are_padded_and_empty_ones_dropped() -> None:
    layout = Layout(8, 4, 3, ((0, 1, 5), (), (2, 4, 6)), ((0,), (), (1, 2)))
    assert layout.kv_heads == ((0, 2), (), (1, 2, 3))
    assert layout.slots == ((0, 1, 5, None), (), (2, 4, 6))
    assert not layout.full


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_survives_the_configuration(name: str) -> None:
    model = dense(name)
    assert Layout.of_config(model.config).full
    layout = hard_layout(name, model)
    got = ragged(name, model, layout)
    assert Layout.of_config(got.config) == layout
    assert Layout.of_config(json.loads(got.config.to_json_string())) == layout


def test_a_pruned_configuration_must_say_what_it_kept() -> None:
    with pytest.raises(PlanError, match="without a whole prune_edit block"):
        Layout.of_config({"model_type": "pruned_llama", "num_hidden_layers": 2})
    with pytest.raises(ModelError, match="lacks 'num_attention_heads'"):
        Layout.of_config({"model_type": "llama", "num_hidden_layers": 2})
    with pytest.raises(PlanError, match="schema 7, this version reads 1"):
        Layout.of_config({"model_type": "pruned_llama", "prune_edit": {"schema": 7}})


# Slicing


@pytest.mark.parametrize("name", NAMES)
def test_slicing_twice_is_slicing_once(name: str) -> None:
    model = dense(name)
    have, want = Layout.of_config(model.config), hard_layout(name, model)
    half = have.keep(
        tuple(tuple(sorted({*kept, 0, have.n_heads - 1})) for kept in want.heads),
        tuple(tuple(sorted({*kept, 8, 9})) for kept in want.neurons),
    )
    state, own = model.state_dict(), family(name)
    whole = constants(have)
    once = dict(slim_tensors(own, state, have, want, whole))
    twice = dict(slim_tensors(own, dict(slim_tensors(own, state, have, half)), half, want, whole))
    assert list(once) == list(twice) == sorted(once)
    assert all(torch.equal(once[key], twice[key]) for key in once)
    key = f"{own.layers}.0.{own.attention_output}.bias"
    again = dict(slim_tensors(own, once, want, want, whole))
    assert torch.allclose(again[key], once[key] + whole.attention[0])  # constants add up


def test_pads_are_zero_and_every_tensor_is_read_once() -> None:
    model = dense("llama-gqa")
    have, want = Layout.of_config(model.config), hard_layout("llama-gqa", model)
    assert want.slots[1] == (0, 1, 2, 5, None, None)
    read: list[str] = []

    class Counting(dict[str, torch.Tensor]):
        def __getitem__(self, key: str) -> torch.Tensor:
            read.append(key)
            return super().__getitem__(key)

    tensors = dict(slim_tensors(family("llama"), Counting(model.state_dict()), have, want))
    # The final norm says what created biases look like.
    assert all(read.count(key) == 1 for key in read if key != "model.norm.weight")
    assert not any(".layers.0.self_attn.q_proj" in key for key in read)
    queries = tensors["model.layers.1.self_attn.q_proj.weight"]
    outputs = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert queries.shape == (24, 32) and outputs.shape == (32, 24)
    assert queries[16:].abs().max() == 0 and outputs[:, 16:].abs().max() == 0
    dense_queries = model.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(queries[12:16], dense_queries[20:24])  # head 5


def test_units_that_are_gone_cannot_be_kept() -> None:
    model = dense("gpt2")
    have = hard_layout("gpt2", model)
    want = have.keep(((), (0, 1, 2), (1,)), have.neurons)
    with pytest.raises(PlanError, match=r"layer 1: the plan keeps heads \[1\]"):
        next(slim_tensors(family("gpt2"), {}, have, want))
    other = Layout(4, 4, 99, have.heads, have.neurons)
    with pytest.raises(PlanError, match="n_neurons 99, this one has 128"):
        other.check_within(have)


def test_a_model_without_any_head_is_refused() -> None:
    model = dense("gpt2")
    have = Layout.of_config(model.config)
    want = have.keep(((),) * 3, have.neurons)
    with pytest.raises(PlanError, match="no attention head in any layer"):
        slim_config(
            model.config.to_dict(), family("gpt2"), have, want, output_bias=False, provenance={}
        )


def test_base_model_names_and_old_masks_are_understood() -> None:
    state = dense("gpt2").state_dict()
    bare = {
        key.removeprefix("transformer."): value
        for key, value in state.items()
        if key != "lm_head.weight"
    }
    bare |= {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)}
    assert set(Canonical(family("gpt2"), bare)) == set(state) - {"lm_head.weight"}
    llama = Canonical(family("llama"), dense("llama").state_dict())
    assert set(llama) == set(dense("llama").state_dict())


def test_half_precision_stays() -> None:
    model = dense("llama").to(torch.bfloat16)
    layout = hard_layout("llama", model)
    got = ragged("llama", model, layout, constants(layout))
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}


# Masked


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_masked_is_stock_and_equals_ragged(name: str, compensated: bool, tmp_path: Path) -> None:
    layout = hard_layout(name, dense(name))
    compensation = constants(layout) if compensated else None
    model = ragged(name, dense(name), layout, compensation)
    if name == "mistral" and compensated:
        with pytest.raises(PlanError, match="--format ragged, or --recover none"):
            written(tmp_path / "m", "masked", name, model)
        return
    folder = written(tmp_path / "m", "masked", name, model, provenance={"plan_digest": "abc"})
    config = read_config(folder)
    assert config["prune_edit"]["plan_digest"] == "abc"
    assert not {"auto_map", "per_layer_config"} & set(config)
    script = f"""
import sys, torch
sys.modules["prune_edit"] = None
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__.startswith("transformers."), type(model)
"""
    if name == "llama" and compensated:  # one is enough, verify loads the others
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    verify(folder, model, PROMPT)
    verify(folder, oracle(name, layout, compensation), PROMPT)
    stock = {key: tuple(value.shape) for key, value in dense(name).state_dict().items()}
    tensors = open_tensors(folder)
    assert all(tuple(tensors[key].shape) == stock[key] for key in stock if key in tensors)


def test_masking_what_is_whole_changes_nothing() -> None:
    model = dense("llama-biased")
    layout = Layout.of_config(model.config)
    config = model.config.to_dict()
    fields = masked_config(config, family("llama"), layout, provenance={})
    assert {key: fields[key] for key in config if key != "_name_or_path"} == {
        **{key: config[key] for key in config if key != "_name_or_path"},
        "architectures": ["LlamaForCausalLM"],
    }
    state = model.state_dict()
    masked = dict(masked_tensors(family("llama"), config, state, layout))
    assert masked.keys() == state.keys()
    assert all(torch.equal(masked[key], state[key]) for key in state)


# Writing and verifying


@pytest.mark.parametrize("fmt", ["ragged", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_gives_the_same_bytes_and_verifies(
    fmt: str, name: str, tmp_path: Path
) -> None:
    model = ragged(name, dense(name), hard_layout(name, dense(name)))
    a = written(tmp_path / "a", fmt, name, model, max_shard_bytes=5_000)
    b = written(tmp_path / "b", fmt, name, model, max_shard_bytes=5_000)
    files = sorted(path.name for path in a.iterdir())
    assert "model.safetensors.index.json" in files
    assert files == sorted(path.name for path in b.iterdir())
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    assert model_digest(a) == model_digest(b)
    verify(a, model, PROMPT)
    assert ("lm_head.weight" in open_tensors(a)) == (not model.config.tie_word_embeddings)


def test_a_stock_model_can_be_written_ragged(tmp_path: Path) -> None:
    model = dense("gpt2")
    folder = written(tmp_path / "whole", "ragged", "gpt2", model)
    assert read_config(folder)["model_type"] == "pruned_gpt2"
    verify(folder, model, PROMPT)
    verify(folder, model, PROMPT[:, :1])


def test_verify_notices_a_wrong_weight_and_a_missing_one(tmp_path: Path) -> None:
    model: Any = ragged("llama", dense("llama"), hard_layout("llama", dense("llama")))
    folder = written(tmp_path / "slim", "ragged", "llama", model)
    tensors = dict(open_tensors(folder))
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    write_tensors(folder, sorted(tensors.items()))
    with pytest.raises(VerificationError, match="logits differ"):
        verify(folder, model, PROMPT)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    write_tensors(folder, sorted(tensors.items()))
    with pytest.raises(VerificationError, match="lacks"):
        verify(folder, model, PROMPT)
    masked = written(tmp_path / "masked", "masked", "llama", model)
    tensors = dict(open_tensors(masked))
    del tensors["model.layers.2.mlp.down_proj.weight"]
    write_tensors(masked, sorted(tensors.items()))
    with pytest.raises(VerificationError, match="missing keys"):
        verify(masked, model, PROMPT)


def test_verify_notices_a_cache_that_goes_wrong(tmp_path: Path) -> None:
    model = ragged("gpt2", dense("gpt2"), hard_layout("gpt2", dense("gpt2")))
    folder = written(tmp_path / "slim", "ragged", "gpt2", model)
    from prune_edit.modeling.pruned_gpt2 import PrunedGPT2LMHeadModel

    stock_init = PrunedGPT2LMHeadModel.__init__

    def numbered_by_layer(self: Any, config: Any) -> None:
        stock_init(self, config)
        for index, block in enumerate(self.transformer.h):
            block.attn.layer_idx = index

    PrunedGPT2LMHeadModel.__init__ = numbered_by_layer  # type: ignore[method-assign]
    try:
        with pytest.raises(VerificationError, match="cached decode step"):
            verify(folder, model, PROMPT)
    finally:
        PrunedGPT2LMHeadModel.__init__ = stock_init  # type: ignore[method-assign]


def test_build_model_is_strict() -> None:
    model = dense("llama")
    state = dict(model.state_dict())
    config = model.config.to_dict()
    built = build_model(config, state)
    assert torch.equal(built(PROMPT).logits, model(PROMPT).logits)
    with torch.no_grad():
        next(built.parameters()).zero_()
    assert next(model.parameters()).abs().sum() > 0  # a copy
    with pytest.raises(ModelError, match="unexpected keys extra"):
        build_model(config, {**state, "extra": torch.ones(1)})
    shape = {**state, "model.norm.weight": torch.ones(3)}
    with pytest.raises(ModelError, match="do not fit"):
        build_model(config, shape)
    del state["model.norm.weight"]
    with pytest.raises(ModelError, match=r"missing keys model\.norm\.weight"):
        build_model(config, state)
    with pytest.raises(ModelError, match="not valid"):
        build_model({**config, "num_hidden_layers": "three"}, state)


def test_companions_go_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "LICENSE", "generation_config.json", "notes.txt"):
        (source / name).write_text("{}")
    folder = written(tmp_path / "out", "ragged", "gpt2", dense("gpt2"), source_folder=source)
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "LICENSE", "generation_config.json", "ragged.py"} <= names
    assert "notes.txt" not in names


@pytest.mark.parametrize("name", ["stories260K", "mathgpt-4l4h"])
def test_real_models(name: str, tmp_path: Path) -> None:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{name} is not here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, config = open_tensors(folder), read_config(folder)
    own = family_of(config["model_type"])
    have = Layout.of_config(config)
    want = have.keep(
        ((), *(((0, 2, 3),) * (have.n_layers - 1))),
        ((), *((tuple(range(0, have.n_neurons, 3)),) * (have.n_layers - 1))),
    )
    fields = slim_config(config, own, have, want, output_bias=False, provenance={})
    tensors = dict(slim_tensors(own, source, have, want))
    model = build_model(fields, tensors)
    ids = torch.tensor([[1, 4, 7, 2, 9, 3]])
    for fmt in ("ragged", "masked"):
        with replacing(tmp_path / fmt) as temporary:
            write_checkpoint(temporary, fmt, own, fields, tensors, want, source_folder=folder)
            verify(temporary, model, ids)
        assert AutoTokenizer.from_pretrained(tmp_path / fmt).vocab_size > 0
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert not close(whole(ids).logits, model(ids).logits)


# Reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(4.0)}, path / "model.safetensors")
    return path


def test_tensors_are_read_by_name(folder: Path) -> None:
    tensors = open_tensors(folder)
    assert list(tensors) == ["a"] and "b" not in tensors
    assert torch.equal(tensors["a"], torch.arange(4.0))


def test_a_folder_must_be_there_with_a_configuration(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_tensors(tmp_path / "nowhere")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no JSON object"):
        open_tensors(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        open_tensors(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_digest(folder)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", b"\xff" * 64, whole[:-4]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            open_tensors(folder)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        open_tensors(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_tensors(folder)


@pytest.mark.parametrize("entry", ["../x.safetensors", "/x.safetensors", "a/b", "..", "", 3])
def test_an_index_may_not_leave_the_folder(folder: Path, entry: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": entry}}))
    for read in (open_tensors, model_digest):
        with pytest.raises(ModelError, match="not a file name inside the folder"):
            read(folder)


def test_an_index_must_tell_the_truth(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "s.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    assert "a" in open_tensors(folder)
    index.write_text(json.dumps({"weight_map": {"b": "s.safetensors"}}))
    with pytest.raises(ModelError, match="lacks tensor b"):
        open_tensors(folder)
    index.write_text(json.dumps({"weight_map": {"b": "t.safetensors"}}))
    with pytest.raises(ModelError, match="missing"):
        open_tensors(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="not a weight index"):
        open_tensors(folder)


def test_the_digest_follows_the_bytes(folder: Path) -> None:
    before = model_digest(folder)
    assert before == model_digest(folder) and len(before) == 64
    save_file({"a": torch.arange(4.0) + 1}, folder / "model.safetensors")
    assert model_digest(folder) != before


# Replacing


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


def test_the_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with replacing(out) as temporary:
        (temporary / "config.json").write_text("new")
        assert not out.exists()
    assert (out / "config.json").read_text() == "new"
    assert beside(out) == {"out"}


def test_an_existing_output_is_kept_unless_it_may_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite"), replacing(out):
        raise AssertionError("the block ran")
    check_output(out, overwrite=True)  # empty
    (out / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="no folder of this kind"):
        check_output(out, overwrite=True)
    (out / "config.json").write_text("old")
    with replacing(out, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert {path.name for path in out.iterdir()} == {"config.json", "manifest.json"}
    assert (out / "config.json").read_text() == "new"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputExistsError):
        check_output(file, overwrite=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(error), replacing(out, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
        raise error
    assert (out / "config.json").read_text() == "old"
    assert beside(out) == {"out"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_named(number: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = r"out could not be written.*choose another"
    with pytest.raises(OutputWriteError, match=message), replacing(out) as temporary:
        raise OSError(number, os.strerror(number), str(temporary / "model.safetensors"))
    assert not beside(out)
    with pytest.raises(FileNotFoundError), replacing(out):  # a read that fails is something else
        Path("/nonexistent/model").read_bytes()


def test_an_error_inside_safetensors_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputWriteError, match="could not be written"), replacing(out) as temporary:
        (temporary / "shard-0").mkdir()  # a file cannot be made there
        write_tensors(temporary, [("a", torch.ones(3))])
    assert not beside(out)


def test_what_killed_runs_left_is_cleaned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.tmp-{dead.pid}").mkdir()
    (tmp_path / f".out.tmp-{os.getppid()}").mkdir()  # of another machine: no one holds the lock
    moved = tmp_path / f".out.old-{dead.pid}"  # killed between its two renames
    moved.mkdir()
    (moved / "config.json").write_text("old")
    with pytest.raises(RuntimeError), replacing(out, overwrite=True):
        raise RuntimeError
    assert beside(out) == {"out"}
    assert (out / "config.json").read_text() == "old"


def test_one_shard_is_held_at_a_time(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(4):
            yield f"t{index}", torch.full((10,), float(index))

    write_tensors(tmp_path, stream(), max_shard_bytes=80)
    (tmp_path / "config.json").write_text("{}")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (tmp_path / shards[0]).stat().st_mode == (tmp_path / "config.json").stat().st_mode
    assert [float(t[0]) for t in open_tensors(tmp_path).values()] == [0, 1, 2, 3]
