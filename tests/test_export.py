"""Exports say what the model says, in the runtimes they are for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pico_families
import pytest
import torch
from click.testing import CliRunner
from pico_families import CONFIGS
from test_formats import constants, dense, ragged
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prune_edit import verbs
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.cli import main
from prune_edit.decoder import Decoder
from prune_edit.errors import (
    ModelError,
    OutputExistsError,
    PlanError,
    PruneEditError,
    UnsupportedFamilyError,
)
from prune_edit.exporting import gguf as gguf_writer
from prune_edit.exporting.gguf_tokenizer import read_vocabulary
from prune_edit.layout import Layout
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.modeling import register
from prune_edit.recover.shrink import shrink
from prune_edit.running import Running

register()
STORY = "Tom and Mia went to the park."
# Layer 0 without heads, layer 3 without neurons, layer 5 without either, one whole; no two alike.
_HEADS = ((), (0, 3, 15), tuple(range(16)), (7,), (1, 2), (), (4, 5, 6, 8), (0, 2, 4, 6, 8))
_NEURONS = tuple(tuple(range(layer, 384, 3 + layer)) for layer in range(8))
_NEURONS = tuple(() if layer in (3, 5) else kept for layer, kept in enumerate(_NEURONS))


def written(folder: Path, form: str, decoder: Decoder) -> Path:
    """The model with the reference tokenizer beside it."""
    folder.mkdir(parents=True)
    write_checkpoint(
        folder,
        form,
        decoder.family,
        decoder.model.config.to_dict(),
        decoder.model.state_dict(),
        decoder.layout,
        source_folder=REFERENCE_MODEL,
    )
    return folder


def llama_cpp(path: Path, prompt: str, tokens: int = 64) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities, by llama.cpp; an end of text is passed over."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not here: no xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
    parameters.verbosity = 0
    # Attention has half precision unless told.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    reply = xllamacpp.Server(parameters).handle_completions(
        {"prompt": prompt, "n_predict": tokens, "temperature": 0, "top_k": 1, "logprobs": 1,
         "ignore_eos": True}
    )  # fmt: skip
    steps = reply["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in steps], [step["logprob"] for step in steps]


def greedy(folder: Path, prompt: str, tokens: int = 64) -> tuple[list[int], list[float]]:
    """The same by transformers."""
    # Not AutoTokenizer's choice for some stock model_type, which cuts text its own way.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    end = tokenizer.eos_token_id
    found = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=tokens,
        suppress_tokens=[end],
        pad_token_id=end,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = found.sequences[0, ids.shape[1] :]
    logprobs = torch.cat(found.logits).log_softmax(-1)
    return new.tolist(), logprobs.gather(1, new[:, None])[:, 0].tolist()


def assert_same(
    folder: Path, path: Path, prompt: str = STORY, tokens: int = 64, tolerance: float = 1e-4
) -> None:
    got, want = llama_cpp(path, prompt, tokens), greedy(folder, prompt, tokens)
    assert got[0] == want[0]
    assert len(set(want[0])) > 1, "the text is too plain to tell anything"
    assert max(abs(a - b) for a, b in zip(got[1], want[1], strict=True)) <= tolerance


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_writes_the_reference_models_text(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    found = verbs.export(REFERENCE_MODEL, "gguf", out, type=kind)
    assert found["architecture"] == "llama" and found["bytes"] == out.stat().st_size
    if kind == "f32":
        assert_same(REFERENCE_MODEL, out)
    else:  # rounded weights: at first the same words
        got, want = llama_cpp(out, STORY)[0], greedy(REFERENCE_MODEL, STORY)[0]
        assert got[:8] == want[:8]


@pytest.mark.parametrize("compensated", [False, True])
def test_llama_cpp_runs_layers_that_all_differ(compensated: bool, tmp_path: Path) -> None:
    decoder = load_decoder()
    small = shrink(decoder, _HEADS, _NEURONS, None, Running())
    if compensated:
        state = small.model.config.to_dict() | {"attention_output_bias": True,
                                                "ffn_output_bias": True}  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        tensors = dict(small.model.state_dict())
        for layer in range(8):
            for path in (small.family.attention_output, small.family.ffn_output):
                name = f"{small.family.layers}.{layer}.{path}.bias"
                tensors[name] = torch.randn(128, generator=generator) * 0.1
        folder = tmp_path / "slim"
        folder.mkdir()
        write_checkpoint(folder, "ragged", small.family, state, tensors, small.layout,
                         source_folder=REFERENCE_MODEL)  # fmt: skip
    else:
        folder = written(tmp_path / "slim", "ragged", small)
    out = tmp_path / "m.gguf"
    assert verbs.export(folder, "gguf", out, type="f32")["architecture"] == "deci"
    assert_same(folder, out)


_ABLE = (
    "llama", "mistral-full", "qwen2-full", "qwen3", "smollm3-full", "phi3-full", "olmo2", "gemma2",
    "gemma3_text-6", "gpt2", "gpt_neox", "gpt_neox-sequential", "falcon-untied", "falcon-one-norm",
    "falcon-two-norms",
)  # fmt: skip
_CHANGED: dict[str, dict[str, Any]] = {  # from tests/pico_families.py
    "mistral-full": {"sliding_window": None},
    "qwen2-full": {"sliding_window": None, "use_sliding_window": False},
    "smollm3-full": {
        "sliding_window": None, "use_sliding_window": False, "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "phi3-full": {"sliding_window": None},
    "gemma3_text-6": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "falcon-untied": {"tie_word_embeddings": False},
    "falcon-two-norms": {"new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip
_TABLES = ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "falcon")  # GELU in half precision


@pytest.mark.parametrize("form", ["ragged", "uniform"])
@pytest.mark.parametrize("name", _ABLE)
def test_families_run_in_llama_cpp(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem, fields = CONFIGS[name if name in CONFIGS else name.partition("-")[0]]
    fields = {**fields, "vocab_size": 648, "eos_token_id": 2, **_CHANGED.get(name, {})}
    monkeypatch.setitem(CONFIGS, name, (stem, fields))
    monkeypatch.setattr(pico_families, "NAMES", tuple(CONFIGS))
    decoder = Decoder(pico_families.family_model(name), None)  # type: ignore[arg-type]
    more = decoder.n_layers - 2
    layout = decoder.layout.keep(
        ((0, 1, 3), (2,), *((0, 3),) * more), ((0, 5, 11), (1, 2, 3, 4), *((2, 7),) * more)
    )
    small = decoder.with_model(ragged(decoder, layout, None))
    folder = written(tmp_path / "model", form, small)
    out = tmp_path / "m.gguf"
    verbs.export(folder, "gguf", out, type="f32")
    # Of 64 positions.
    stem = name.partition("-")[0]
    assert_same(folder, out, tokens=48, tolerance=5e-3 if stem in _TABLES else 1e-4)


def test_a_sentencepiece_tokenizer_and_a_real_model(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "stories260K"
    verbs.export(folder, "gguf", tmp_path / "m.gguf", type="f32")
    assert_same(folder, tmp_path / "m.gguf", "Once upon a time, there was a little girl named")


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    for name, error, text in (
        ("opt", UnsupportedFamilyError, "GGUF is written for llama,.* not for opt"),
        ("mistral", PlanError, "no sliding attention in layer 0"),
    ):
        folder = written(tmp_path / name, "masked", dense(name))
        with pytest.raises(error, match=text):
            verbs.export(folder, "gguf", out)
    with pytest.raises(PruneEditError, match="unknown target 'ggml'; known are gguf, onnx"):
        verbs.export(REFERENCE_MODEL, "ggml", out)
    assert not out.exists()


def test_outputs_are_whole_and_never_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="or --overwrite"):
        verbs.export(REFERENCE_MODEL, "gguf", out)

    def fails(*args: Any) -> Any:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer, "_encoded", fails)
        with pytest.raises(RuntimeError):
            verbs.export(REFERENCE_MODEL, "gguf", out, overwrite=True)
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    verbs.export(REFERENCE_MODEL, "gguf", out, overwrite=True)
    once = out.read_bytes()
    verbs.export(REFERENCE_MODEL, "gguf", out, overwrite=True)
    assert once[:4] == b"GGUF" and out.read_bytes() == once


def test_the_command(tmp_path: Path) -> None:
    arguments = ["export", str(REFERENCE_MODEL), "--to", "gguf", "--type", "q8_0", "--out"]
    shown = CliRunner().invoke(main, [*arguments, str(tmp_path / "m.gguf"), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)["type"] == "q8_0"
    shown = CliRunner().invoke(main, [*arguments, str(tmp_path / "m.gguf")])
    assert shown.exit_code == 8 and "or --overwrite" in shown.output


def test_tokenizers(tmp_path: Path, shared: Path) -> None:
    words = read_vocabulary(REFERENCE_MODEL)
    assert (words.model, words.add_bos, words.space_prefix) == ("t5", True, True)
    assert words.special == {"bos": 1, "eos": 2, "unk": 0}
    pieces = read_vocabulary(shared / "models" / "stories260K")
    assert pieces.model == "llama" and pieces.types[:4] == [2, 3, 3, 6]
    digits = read_vocabulary(shared / "models" / "mathgpt-4l4h")
    assert digits.tokens == list("0123456789") and not digits.add_bos
    fields = json.loads((REFERENCE_MODEL / "tokenizer.json").read_text())
    fields["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    fields["added_tokens"] = []
    for cut, error in (
        ({"type": "ByteLevel"}, None),
        (
            {"type": "Split", "pattern": {"Regex": "x+"}},
            "'x\\+' that tokenizer.json cuts text by is not known",
        ),
    ):
        fields["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [cut, {"type": "ByteLevel"}],
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        if error is None:
            found = read_vocabulary(tmp_path)
            assert (found.model, found.pre, found.merges) == ("gpt2", "gpt-2", ["a b"])
        else:
            with pytest.raises(ModelError, match=error):
                read_vocabulary(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match="is missing"):
        read_vocabulary(tmp_path)


def test_onnx_gives_the_same_logits(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    decoder = dense("smollm3")
    kept = ((), (0, 1, 3), (2,)), ((0, 5, 11), (), (1,))
    small = decoder.with_model(ragged(decoder, decoder.layout.keep(*kept), constants()))
    folder = written(tmp_path / "slim", "ragged", small)
    found = verbs.export(folder, "onnx", tmp_path / "onnx")
    assert found["difference"] <= 1e-4
    assert (tmp_path / "onnx" / "model.onnx").stat().st_size <= found["bytes"]
    with pytest.raises(OutputExistsError):
        verbs.export(folder, "onnx", tmp_path / "onnx")


def test_layout_of_an_exported_plan_is_unequal() -> None:
    assert Layout.of_config(load_decoder().model.config).full
    assert len({(len(h), len(n)) for h, n in zip(_HEADS, _NEURONS, strict=True)}) == 8
