"""Uniform checkpoints: one size in every layer, loaded by stock code, no larger than need be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_families import family_model
from test_formats import dense, distance, ragged, steps, written

from prune_edit.checkpoint.store import read_config
from prune_edit.checkpoint.uniform import fit, uniform_config
from prune_edit.decoder import Decoder
from prune_edit.layout import Layout
from prune_edit.planning import Plan
from prune_edit.recover.shrink import without_dead
from prune_edit.rules import Rules


def fitted(name: str, heads: Any, neurons: Any, kv: str = "pad") -> tuple[str, tuple[int, ...]]:
    decoder = dense(name)
    layout = Layout(4, decoder.layout.n_kv_heads, 12, heads, neurons, kv)
    stock, padded = fit(decoder.model.config.to_dict(), decoder.family, layout)
    for slots, kv_heads in zip(padded.slots, padded.kv_heads, strict=True):
        size = len(slots) // len(kv_heads)
        for place, head in enumerate(slots):
            group = kv_heads[place // size]
            assert head is None or head // (4 // decoder.layout.n_kv_heads) == group
    return stock.family.model_type, padded.sizes


FEW = ((0, 1, 5), (), (2,))


def test_every_layer_is_as_wide_as_the_widest() -> None:
    assert fitted("mistral", ((0,), (), (2,)), FEW) == ("mistral", (1, 1, 3))
    assert fitted("qwen3", ((0, 1), (3,), (2,)), FEW) == ("qwen3", (2, 1, 3))
    assert fitted("qwen3", ((0, 1, 2), (3,), ()), FEW) == ("qwen3", (4, 2, 3))
    assert fitted("phi3", ((0,), (1,), (2,)), ((), (), ())) == ("phi3", (1, 1, 1))


def test_duplicates_spare_pads() -> None:
    heads = ((0, 1, 2), (3,), ())
    assert fitted("qwen3", heads, FEW) == ("qwen3", (4, 2, 3))
    assert fitted("qwen3", heads, FEW, "duplicate") == ("qwen3", (3, 3, 3))


def test_where_stock_code_ties_heads_to_the_hidden_size_they_stay() -> None:
    for name in ("gpt2", "gptj", "gpt_neox", "opt", "falcon", "olmo2"):
        assert fitted(name, ((0,), (), (2,)), FEW)[1][0] == 4, name
    # Gemma takes any number of heads that divides the hidden size of 32, Llama becomes Mistral.
    assert fitted("gemma2", ((0, 2, 3), (), ()), FEW)[1][:2] == (4, 2)
    assert fitted("llama", ((0, 2), (), ()), FEW) == ("llama", (2, 2, 3))


def test_a_llama_of_an_odd_number_of_heads_becomes_a_mistral(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    decoder = Decoder(LlamaForCausalLM(config).eval(), None)  # type: ignore[arg-type]
    small = decoder.with_model(
        ragged(decoder, decoder.layout.keep(((0, 1, 3), (), (2,)), FEW), None)
    )
    folder = tmp_path / "uniform"
    model = written(folder, "uniform", small)
    fields = read_config(folder)
    assert fields["model_type"] == "mistral" and fields["num_attention_heads"] == 3
    assert fields["sliding_window"] is None and fields["architectures"] == ["MistralForCausalLM"]
    assert distance(steps(model), steps(small.model)) <= 1e-5
    script = f"""
import sys
sys.modules["prune_edit"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=False)
assert type(model).__module__.startswith("transformers."), type(model)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_a_mistral_with_output_biases_becomes_a_llama(tmp_path: Path) -> None:
    decoder = dense("mistral")
    fields = decoder.model.config.to_dict() | {"sliding_window": None}
    biased = {"attention_output_bias": True, "ffn_output_bias": True}
    stock, _ = fit({**fields, **biased}, decoder.family, decoder.layout)
    assert stock.family.model_type == "llama"
    assert stock.fields["attention_bias"] and stock.fields["mlp_bias"]


def test_a_uniform_model_can_be_pruned_on(tmp_path: Path) -> None:
    decoder = dense("qwen3")
    kept = ((0, 1, 2), (3,), ()), ((0, 5), (), (1, 2, 3))
    small = decoder.with_model(ragged(decoder, decoder.layout.keep(*kept), None))
    model = written(tmp_path / "uniform", "uniform", small)
    alive = without_dead(Decoder(model, None))  # type: ignore[arg-type]
    assert [len(heads) for heads in alive.layout.heads] == [3, 1, 0]
    assert [len(neurons) for neurons in alive.layout.neurons] == [2, 0, 3]
    assert distance(steps(alive.model), steps(small.model)) <= 1e-5
    block = uniform_config(
        small.model.config.to_dict(), small.family, small.layout, provenance={"plan_digest": "x"}
    )["prune_edit"]
    assert block["plan_digest"] == "x" and block["heads"] == [[0, 1, 2], [3], []]


# Grouped queries as part of the plan


def scores(layers: int = 3, heads: int = 8) -> torch.Tensor:
    return torch.rand(layers, heads, generator=torch.Generator().manual_seed(3)) - 0.3


def test_equal_groups_are_the_best_choice() -> None:
    from itertools import combinations

    values = scores(2, 6)
    for count in range(1, 9):
        kept = Rules(kv="equal", group_size=3).heads(values, count)
        for units in kept:
            sizes = {sum(head // 3 == group for head in units) for group in (0, 1)} - {0}
            assert len(sizes) <= 1
        best = -1e9
        allowed = []
        for row in range(2):
            fitting = []
            for size in range(7):
                for units in combinations(range(6), size):
                    sizes = {sum(head // 3 == group for head in units) for group in (0, 1)} - {0}
                    if len(sizes) <= 1:
                        fitting.append((size, float(values[row, list(units)].sum())))
            allowed.append(fitting)
        total = sum(map(len, kept))
        fullest = max(a + b for a, _ in allowed[0] for b, _ in allowed[1] if a + b <= count)
        best = max(x + y for a, x in allowed[0] for b, y in allowed[1] if a + b == fullest)
        assert total == fullest
        got = sum(float(values[row, list(units)].sum()) for row, units in enumerate(kept))
        assert got == pytest.approx(best)


@pytest.mark.parametrize("kv", ["pad", "keep-groups", "equal", "duplicate"])
def test_serving_keeps_a_group_in_every_layer(kv: str) -> None:
    from prune_edit.errors import BudgetError

    values = scores()
    values[1] -= 5  # a layer that nothing would be kept of
    rules = Rules(kv=kv, group_size=4, every_layer=3)
    free = Rules(kv=kv, group_size=4).heads(values, 12)
    kept = rules.heads(values, 12)
    assert all(kept) and not all(free)
    assert sum(map(len, kept)) <= 12
    with pytest.raises(BudgetError, match="a KV group in each of 3 layers; keep more heads, or le"):
        rules.check_counts(2, None)


def test_a_plan_holds_its_policy() -> None:
    plan = Plan(((0,),), ((0,),), 4, 4, kv="duplicate", serve="vllm")
    assert Plan.from_json(plan.to_json()) == plan
    assert '"serve"' not in Plan(((0,),), ((0,),), 4, 4).to_json()


def test_a_duplicated_layout_has_no_pads_and_knows_copies() -> None:
    layout = Layout(8, 2, 3, ((0, 1, 2, 3, 4, 5), (0, 7), (1, 2, 3, 4)), ((),) * 3, "duplicate")
    assert layout.kv_heads == ((0, 0, 1), (0, 1), (0, 0, 0, 1))
    assert layout.slots == ((0, 1, 2, 3, 4, 5), (0, 7), (1, 2, 3, 4))


def test_copies_that_were_tuned_apart_are_not_joined(tmp_path: Path) -> None:
    from prune_edit.checkpoint.masked import masked_tensors
    from prune_edit.errors import PlanError

    decoder = Decoder(family_model("qwen3", 3), None)  # type: ignore[arg-type]
    layout = decoder.layout.keep(((0, 1, 2),) * 3, ((0,),) * 3)
    small = decoder.with_model(ragged(decoder, layout, None))
    model = written(tmp_path / "slim", "ragged", small, "duplicate")
    again = Decoder(model, None)  # type: ignore[arg-type]
    assert again.layout.kv == "duplicate" and again.layout.kv_heads[0] == (0, 0, 1)
    fields, state = model.config.to_dict(), dict(model.state_dict())
    assert dict(masked_tensors(again.family, fields, state, again.layout))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(PlanError, match="the copies that --kv duplicate made of KV head 0"):
        dict(masked_tensors(again.family, fields, model.state_dict(), again.layout))


def test_apply_writes_every_form_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pico_families
    from pico_families import CONFIGS
    from test_export import written as with_tokenizer

    from prune_edit import load_decoder, verbs

    stem, fields = CONFIGS["qwen3"]
    wide = {**fields, "vocab_size": 648, "tie_word_embeddings": False}
    monkeypatch.setitem(CONFIGS, "qwen3", (stem, wide))
    decoder = Decoder(pico_families.family_model("qwen3", 3), None)  # type: ignore[arg-type]
    base = with_tokenizer(tmp_path / "base", "masked", decoder)
    plan = Plan(((0, 1, 2), (3,), ()), ((0, 5), (), (1, 2, 3)), 4, 12, kv="duplicate")
    found = {}
    for form in ("masked", "uniform", "ragged"):
        out = verbs.apply(base, plan, tmp_path / form, format=form, recover="none")
        found[form] = steps(load_decoder(out).model)
        assert ("remote code" in (out / "README.md").read_text()) == (form != "masked")
    assert distance(found["uniform"], found["masked"]) <= 1e-5
    assert distance(found["ragged"], found["masked"]) <= 1e-5
    assert read_config(tmp_path / "uniform")["num_key_value_heads"] == 3
    assert read_config(tmp_path / "ragged")["prune_edit"]["kv"] == "duplicate"
