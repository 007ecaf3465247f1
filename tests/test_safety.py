"""What a model folder may not do: headers that lie, links that lead out, pickles, NaN, code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_checkpoint import dense, hard_layout
from safetensors.torch import load_file, save_file

from prune_edit.checkpoint.reading import model_digest, open_tensors
from prune_edit.checkpoint.safety import inside, read_header
from prune_edit.checkpoint.source import open_source
from prune_edit.checkpoint.write import write_companions
from prune_edit.cli import main
from prune_edit.errors import ModelError, PruneEditError, UnsafeCheckpointError
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.planning import Plan
from prune_edit.trust import trusted, trusting
from prune_edit.verbs import apply


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole pico Llama with a tokenizer."""
    path = tmp_path / "model"
    dense("llama").save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((REFERENCE_MODEL / name).read_bytes())
    return path


def a_plan(digest: str = "") -> Plan:
    layout = hard_layout("llama", dense("llama"))
    return Plan(layout.heads, layout.neurons, layout.n_heads, layout.n_neurons, model_digest=digest)


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensor(begin: int, end: int, shape: Any = (1,), kind: Any = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x02", "in a file of 1"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "a header of 4,611,686"),
        (file_of(b"[]"), "no object"),
        (file_of(b"{" * 5000), "not a whole"),
        (file_of(b'{"a":' * 100_000), "not a whole"),
        (file_of(b"\xff\xfe"), "not a whole"),
        (file_of(b'{"a":1,"a":2}'), "'a' is given twice"),
        (file_of(b'{"\\ud800":1}'), "surrogates"),
        (file_of(json.dumps({"a": {"dtype": "F32"}}).encode()), "is not described"),
        (file_of(json.dumps({"a": tensor(0, 4, kind="F31")}).encode(), b"0000"), "unknown dtype"),
        (file_of(json.dumps({"a": tensor(0, 4, (-1,))}).encode(), b"0000"), "no shape"),
        (file_of(json.dumps({"a": tensor(0, 4, (1.0,))}).encode(), b"0000"), "no shape"),
        (file_of(json.dumps({"a": tensor(0, 8)}).encode(), b"0" * 8), "8 bytes"),
        (
            file_of(json.dumps({"a": tensor(0, 4), "b": tensor(0, 4)}).encode(), b"0" * 4),
            "tensor b overlaps another",
        ),
        (
            file_of(json.dumps({"a": tensor(0, 4), "b": tensor(8, 12)}).encode(), b"0" * 12),
            "tensor b leaves a hole",
        ),
        (file_of(json.dumps({"a": tensor(0, 4)}).encode(), b"0" * 9), "the tensors end at"),
        (file_of(json.dumps({"a": tensor(0, 1 << 40, (1 << 38,))}).encode(), b"0"), "end at"),
        (file_of(b'{"__metadata__":{"a":1}}'), "metadata"),
    ],
)
def test_headers_that_lie_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_header(path)


def test_a_true_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.ones(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}, path)
    found = read_header(path)
    assert list(found) == ["b", "a"] and found["b"].shape == (2, 3)
    assert found["a"].end == path.stat().st_size


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("x", "y"):
        save_file({"a": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"x": "x.safetensors", "y": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"tensor a is in x\.safetensors and in y\.safetensors"):
        open_tensors(tmp_path)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="'a' is given twice"):
        open_tensors(tmp_path)


# Links


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_may_not_lead_out(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="leads out of the folder") as found:
        apply(folder, a_plan(), tmp_path / "out", recover="none")
    assert found.value.exit_code == 5
    assert not (tmp_path / "out").exists()
    if name != "tokenizer.json":  # that one is read, and only copying it would give a file away
        with pytest.raises(UnsafeCheckpointError, match="leads out of the folder"):
            load_decoder(folder)


def test_links_of_the_hubs_cache_work(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    digest = model_digest(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert model_digest(snapshot) == digest
    apply(snapshot, a_plan(digest), tmp_path / "out", recover="none")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    secret = tmp_path / "secret"  # another repository, another file of the machine
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    with pytest.raises(UnsafeCheckpointError, match="leads out"):
        model_digest(snapshot)


def test_a_link_to_itself_and_a_pipe_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to(tmp_path / "round")
    if os.stat not in os.supports_follow_symlinks:  # pragma: no cover
        pytest.skip("no links here")
    with pytest.raises(ModelError):
        read_header(inside(tmp_path, "round"))
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UnsafeCheckpointError, match="no plain file"):
        open_tensors(tmp_path)
    with pytest.raises(UnsafeCheckpointError, match="not a file name"):
        inside(tmp_path, "x" * 300)


def test_companions_that_lead_out_are_not_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/hostname")
    source = open_source(folder)
    with pytest.raises(UnsafeCheckpointError, match="leads out"):
        write_companions(tmp_path, "masked", source.family, {}, folder)


# Pickles and code


@pytest.fixture
def pickled(folder: Path) -> Path:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_pickles_need_trust(pickled: Path, tmp_path: Path) -> None:
    for work in (
        lambda: load_decoder(pickled),
        lambda: apply(pickled, a_plan(), tmp_path / "out", recover="none"),
    ):
        with pytest.raises(UnsafeCheckpointError, match="--allow-pickle"):
            work()
    with trusting(pickle=True):
        decoder = load_decoder(pickled)
        apply(pickled, a_plan(decoder.digest), tmp_path / "out", recover="none")
    assert not trusted().pickle
    expected = dense("llama").state_dict()["model.layers.2.self_attn.q_proj.weight"]
    found = open_tensors(tmp_path / "out")["model.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(found, expected)  # a layer that the plan keeps whole


def test_the_command_line_trusts_for_one_command(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(a_plan().to_json())
    arguments = ["apply", str(tmp_path / "plan.json"), "--model", str(pickled), "--recover", "none"]
    arguments += ["--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 5 and "--allow-pickle" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--allow-pickle"]).exit_code == 0
    assert not trusted().pickle


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_with_code_in_it_is_refused_with_trust_too(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, pickled / "pytorch_model.bin")
    with trusting(pickle=True):
        for work in (open_tensors, load_decoder):
            with pytest.raises(ModelError):
                work(pickled)
    assert not (tmp_path / "exploded").exists()


def test_a_models_own_code_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / "evil.py").write_text(code + "class Config: pass\nclass Tok: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_decoder(folder)
    with pytest.raises(ModelError):
        apply(folder, a_plan(), tmp_path / "out", recover="none")
    assert not mark.exists()


# Weights and configuration


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(
    value: float, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        state = {key: each.to(dtype) for key, each in dense("llama").state_dict().items()}
        state[name].view(-1)[7] = value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"tensor {name} holds NaN or infinity"):
            apply(folder, a_plan(), tmp_path / "out", recover="none")
        assert not (tmp_path / "out").exists()
        if value != value:
            with pytest.raises(ModelError, match=f"tensor {name} holds NaN or infinity"):
                load_decoder(folder)


def test_what_does_not_fit_the_narrower_format_is_said(folder: Path, tmp_path: Path) -> None:
    state = dict(dense("llama").state_dict())
    state["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="once it is float16"):
        apply(folder, a_plan(), tmp_path / "out", recover="none", dtype="float16")


def test_shapes_must_be_the_configurations(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"intermediate_size": 13}, r"is \(32, 12\), the configuration says \(32, 13\)"),
        ({"num_hidden_layers": 5}, "weights do not fill the architecture"),
        ({"num_hidden_layers": 3}, "weights of layer 3"),
        ({"num_attention_heads": 0}, "config"),
        ({"hidden_size": "wide"}, "config"),
        ({"num_hidden_layers": -1}, "config|layer"),
        ({"model_type": "bert"}, "not supported"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(PruneEditError, match=said):
            apply(folder, a_plan(), tmp_path / "out", recover="none")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
