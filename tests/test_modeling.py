"""Ragged models compute what the dense model with zeroed units computes, however they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_checkpoint import (
    NAMES,
    D,
    V,
    close,
    constants,
    dense,
    family,
    hard_layout,
    oracle,
    ragged,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_edit.caching import decode, prefill
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.layout import Layout
from prune_edit.modeling import register

ROOT = Path(__file__).parents[1]
PROMPT = torch.tensor([[3, 9, 27, 4, 12, 36], [5, 25, 8, 1, 2, 3]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_zeroed_dense_model(name: str, compensated: bool, attention: str) -> None:
    layout = hard_layout(name, dense(name))
    compensation = constants(layout) if compensated else None
    want = oracle(name, layout, compensation)
    got = ragged(name, dense(name), layout, compensation)
    got.set_attn_implementation(attention)
    modules = [m for m in got.modules() if hasattr(m, "layer_idx")]
    assert {m.config._attn_implementation for m in modules} == {attention}
    with torch.no_grad():
        logits = want(PROMPT).logits
        assert not close(logits, dense(name)(PROMPT).logits)
        assert close(got(PROMPT).logits, logits)
        _, past = prefill(got, PROMPT[:, :4])
        assert past.get_seq_length() == 4
        for t in (4, 5):
            step = decode(got, PROMPT[:, t : t + 1], past)
            assert close(step.logits[:, 0], logits[:, t])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generates_alike_with_left_padding(name: str, cache: str) -> None:
    layout = hard_layout(name, dense(name))
    want, got = oracle(name, layout), ragged(name, dense(name), layout)
    ids = PROMPT.clone()
    ids[1, :3] = 0
    mask = (ids != 0).long()
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "disable_compile": True,
        "pad_token_id": 0,
    }
    made = got.generate(ids, cache_implementation=cache, **options)
    assert torch.equal(made, want.generate(ids, **options))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        inputs = {"attention_mask": mask, "position_ids": positions}
        assert close(got(ids, **inputs).logits[:, -1], want(ids, **inputs).logits[:, -1])


def test_a_static_cache_fits_layers_of_unequal_kv_heads() -> None:
    name = "llama"
    layout = hard_layout(name, dense(name))
    got = ragged(name, dense(name), layout)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    whole = got.generate(PROMPT, **options)
    chunked = got.generate(PROMPT, cache_implementation="static", prefill_chunk_size=3, **options)
    assert torch.equal(whole, chunked)


def test_nothing_removed_is_the_identity() -> None:
    model = dense("llama-gqa")
    got = ragged("llama-gqa", model, Layout.of_config(model.config))
    assert torch.equal(got(PROMPT).logits, model(PROMPT).logits)


def test_training_reaches_the_kept_units_and_the_constants() -> None:
    name = "llama"
    layout = hard_layout(name, dense(name))
    got: Any = ragged(name, dense(name), layout, constants(layout))
    got.train()
    got(PROMPT, labels=PROMPT).loss.backward()
    removed = got.model.layers[0].self_attn.o_proj.bias
    assert removed.grad.abs().sum() > 0
    still = {name for name, p in got.named_parameters() if p.grad is None}
    # Only the norms whose output nothing reads any more.
    assert still == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }


def _write(folder: Path, name: str, layout: Layout | None = None) -> None:
    layout = layout or hard_layout(name, dense(name))
    model = ragged(name, dense(name), layout, constants(layout))
    folder.mkdir()
    own = family(name)
    write_checkpoint(folder, "ragged", own, model.config.to_dict(), model.state_dict(), layout)
    with torch.no_grad():
        save_file({"logits": model(PROMPT).logits}, folder / "expected")


def _python(script: str, cwd: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_loads_with_remote_code_and_without_prune_edit(tmp_path: Path) -> None:
    names = ("llama", "mistral", "gpt2")
    folders = [tmp_path / f"{name}.slim" for name in names]
    for name, folder in zip(names, folders, strict=True):
        _write(folder, name)
    _python(
        f"""
import sys
sys.modules["prune_edit"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in {[str(folder) for folder in folders]!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("loaded as something else")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__
    with torch.no_grad():
        logits = model(torch.tensor({PROMPT.tolist()})).logits
    assert torch.allclose(logits, load_file(folder + "/expected")["logits"], atol=1e-4)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__.endswith("Model"), type(base)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).is_heterogeneous
""",
        tmp_path,
    )


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM",
        "from transformers import LlamaForCausalLM",  # imports the Auto classes half-way
    ],
)
def test_import_is_enough_and_cheap(first: str, tmp_path: Path) -> None:
    folder = tmp_path / "slim"
    _write(folder, "gpt2")
    _python(
        f"""
import sys
import prune_edit.modeling
prune_edit.modeling.register_on_import()
prune_edit.modeling.register_on_import()
assert not {{"torch", "transformers"}} & set(sys.modules)
ours = lambda: [f for f in sys.meta_path if type(f).__module__ == "prune_edit.modeling"]
assert len(ours()) == 1
{first}
assert not ours()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
assert type(model).__module__ == "prune_edit.modeling.pruned_gpt2"
import torch
from safetensors.torch import load_file
with torch.no_grad():
    logits = model(torch.tensor({PROMPT.tolist()})).logits
want = load_file({str(folder / "expected")!r})["logits"]
assert torch.allclose(logits, want, atol=1e-4)
model.save_pretrained("again")
assert AutoModelForCausalLM.from_pretrained("again")
import pathlib
assert {{"pruned_gpt2.py", "ragged.py"}} <= {{p.name for p in pathlib.Path("again").iterdir()}}
""",
        tmp_path,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_checkpoint_can_be_saved_again(name: str, tmp_path: Path) -> None:
    _write(tmp_path / "first", name)
    _saves_again(tmp_path)


def test_a_checkpoint_whose_heads_do_not_divide_the_hidden_size_can_be_saved_again(
    tmp_path: Path,
) -> None:
    kept = ((), (1, 3), (0, 1, 2), (2,))
    layout = Layout.of_config(dense("llama").config).keep(kept, ((0,),) * 4)
    assert D % max(map(len, layout.slots))
    _write(tmp_path / "first", "llama", layout)
    _saves_again(tmp_path)


def _saves_again(tmp_path: Path) -> None:
    register()
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    first.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(first(PROMPT).logits, again(PROMPT).logits)
    assert Layout.of_config(again.config) == Layout.of_config(first.config)


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    register()
    _write(tmp_path / "slim", "llama")
    weights = tmp_path / "slim" / "model.safetensors"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "slim") is not None
    tensors = load_file(weights)
    del tensors["model.layers.0.self_attn.o_proj.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lacks model\.layers\.0\.self_attn\.o_proj\.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "slim")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_trains_saves_and_merges() -> None:
    peft = pytest.importorskip("peft")
    name = "gpt2"
    got = ragged(name, dense(name), hard_layout(name, dense(name)))
    before = got(PROMPT).logits.detach()
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True)
    tuned = peft.get_peft_model(got, config)
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.constant_(parameter, 0.1)
    tuned.eval()
    changed = tuned(PROMPT).logits.detach()
    assert not close(changed, before)
    assert close(tuned.merge_and_unload()(PROMPT).logits, changed)


def test_vocabulary_is_untouched() -> None:
    model = dense("gpt2")
    got = ragged("gpt2", model, hard_layout("gpt2", model))
    assert got(PROMPT).logits.shape[-1] == V
