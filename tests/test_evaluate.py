"""Perplexity, cost, speed, evaluation.json and the model card."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pico_checkpoint import N, constants, dense, family, hard_layout, ragged
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prune_edit import samples as samples_module
from prune_edit.checkpoint.card import model_card, ranges
from prune_edit.checkpoint.masked import masked_config, masked_tensors
from prune_edit.checkpoint.store import write_tensors
from prune_edit.checkpoint.write import build_model
from prune_edit.decoder import Decoder
from prune_edit.evaluation import speed as speed_module
from prune_edit.evaluation.comparison import (
    Comparison,
    Evaluation,
    compare_decoders,
    evaluate_decoder,
)
from prune_edit.evaluation.cost import (
    count_parameters,
    flops_per_token,
    weight_bytes,
    weight_folder,
)
from prune_edit.evaluation.perplexity import measure_perplexity
from prune_edit.evaluation.speed import measure_speed, measure_speed_pair
from prune_edit.layout import Layout
from prune_edit.planning import Plan
from prune_edit.scoring.options import Options
from prune_edit.tasks import Example, Task
from prune_edit.verbs import RECOVERIES

WORDS = tuple(f"w{number}" for number in range(38))
TEXTS = ("w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w30 w31 w30 w31 w32", "w5")


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def decoder(model: PreTrainedModel) -> Decoder:
    return Decoder(model.eval(), tokenizer())


def pico(name: str) -> Decoder:
    return decoder(dense(name))


def slim(name: str) -> Decoder:
    model = dense(name)
    return decoder(ragged(name, model, hard_layout(name, model)))


def task(name: str = "toy") -> Task:
    return Task(
        name,
        tuple(
            Example(f"{WORDS[i]} {WORDS[j]}", f" {WORDS[(i + j) % 38]}", "odd" if i % 2 else "even")
            for i in range(12)
            for j in range(6)
        ),
    )


def slow_perplexity(own: Decoder, texts: tuple[str, ...]) -> float:
    """One text at a time, one token at a time."""
    losses = []
    for text in texts:
        ids = own.tokenizer(text)["input_ids"]
        for place in range(1, len(ids)):
            with torch.no_grad():
                logits = own.model(torch.tensor([ids[:place]])).logits[0, -1]
            losses.append(-float(torch.log_softmax(logits.double(), -1)[ids[place]]))
    return math.exp(sum(losses) / len(losses))


# Perplexity


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_perplexity_is_exp_of_the_mean_loss_of_every_token_but_the_first(name: str) -> None:
    own = pico(name)
    found = measure_perplexity(own, TEXTS)
    assert found == pytest.approx(slow_perplexity(own, TEXTS), rel=1e-4)


def test_perplexity_does_not_depend_on_batches_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pico("llama")
    expected = measure_perplexity(own, TEXTS)
    assert measure_perplexity(own, TEXTS[::-1], Options(batch_tokens=3)) == pytest.approx(expected)
    monkeypatch.setattr("prune_edit.evaluation.perplexity._LOGITS", 80)  # two positions at once
    assert measure_perplexity(own, TEXTS) == pytest.approx(expected)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    own = pico("llama")
    assert measure_perplexity(own, TEXTS) != pytest.approx(40)
    own.model.lm_head.weight.data.zero_()
    assert measure_perplexity(own, TEXTS) == pytest.approx(40)


def test_texts_longer_than_the_positions_are_read_in_windows_that_miss_no_token() -> None:
    own = pico("gpt2")
    long = " ".join(WORDS) + " " + " ".join(WORDS)  # 76 tokens, 64 positions
    ids = torch.tensor([own.tokenizer(long)["input_ids"]])
    losses = []
    for start, stop in ((0, 65), (64, 76)):
        part = ids[:, start:stop]
        with torch.no_grad():
            logits = own.model(part[:, :-1]).logits[0]
        losses.append(nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
    expected = math.exp(float(sum(losses)) / 75)
    assert measure_perplexity(own, [long]) == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_none_where_the_tokenizer_cannot_write_the_text() -> None:
    own = pico("llama")
    assert measure_perplexity(own, ["w1 w2", "w1 elephant"]) is None
    assert measure_perplexity(own) is None  # the stories
    assert measure_perplexity(own, ["w1"]) is None  # nothing to predict


# Cost


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "mistral", "gpt2"])
@pytest.mark.parametrize("make", [pico, slim])
def test_flops_are_what_a_run_with_eager_attention_does(name: str, make: Any) -> None:
    own: Decoder = make(name)
    own.model.requires_grad_(False).set_attn_implementation("eager")
    context = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own.model(torch.arange(context)[None], use_cache=False)
    counts = counter.get_flop_counts()
    rotary = {name: sum(ops.values()) for name, ops in counts.items() if "rotary" in name}
    expected = counter.get_total_flops() - max(rotary.values(), default=0)
    assert flops_per_token(own, context) * context == expected


def test_a_masked_model_costs_what_the_dense_one_does_and_a_ragged_one_less() -> None:
    name = "llama-gqa"
    model = dense(name)
    layout = hard_layout(name, model)
    small = ragged(name, model, layout, constants(layout))
    config = small.config.to_dict()
    masked = decoder(
        build_model(
            masked_config(config, family(name), layout, provenance={}),
            {
                key: tensor
                for key, tensor in masked_tensors(family(name), config, small.state_dict(), layout)
                if key != "lm_head.weight"
            },
        )
    )
    whole = flops_per_token(pico(name), 16)
    assert flops_per_token(masked, 16) == whole
    assert flops_per_token(decoder(small), 16) < whole


def test_a_tied_embedding_is_counted_once() -> None:
    tied = pico("llama-gqa")
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
    per_layer = 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * N + 2 * 32
    assert count_parameters(tied) == 40 * 32 + 3 * per_layer + 32


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100), "b": torch.ones(300)}
    (tmp_path / "one").mkdir()
    write_tensors(tmp_path / "one", tensors.items())
    (tmp_path / "one" / "tokenizer.json").write_text("x" * 5000)
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert weight_bytes(tmp_path / "one") == size > 1600
    (tmp_path / "two").mkdir()
    write_tensors(tmp_path / "two", tensors.items(), max_shard_bytes=1300)
    shards = sorted((tmp_path / "two").glob("*.safetensors"))
    assert len(shards) == 2
    assert weight_bytes(tmp_path / "two") == sum(path.stat().st_size for path in shards)


def test_weights_are_found_in_a_folder_or_the_hub_cache(tmp_path: Path) -> None:
    assert weight_folder(str(tmp_path)) == tmp_path
    assert weight_folder("nobody/has-this-model") is None
    assert weight_folder("not a hub id") is None


# Speed


def test_speed_says_tokens_and_seconds_that_agree() -> None:
    found = measure_speed(slim("gpt2"), batch_sizes=(1, 3), seconds=0.05)
    assert list(found) == ["prompt_tokens", "decode_steps", "batch_1", "batch_3"]
    for batch in (1, 3):
        row = found[f"batch_{batch}"]
        prefill, decode = row["prefill"], row["decode"]
        tokens = batch * found["prompt_tokens"]
        assert prefill["tokens_per_second"] * prefill["seconds"] == pytest.approx(tokens)
        assert decode["tokens_per_second"] * decode["seconds"] == pytest.approx(batch)
        assert row["repeats"] >= 5
    assert found["batch_3"]["peak_memory_bytes"] > found["batch_1"]["peak_memory_bytes"]


def test_models_are_timed_in_turns_and_the_median_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    times = {"dense": [100.0, 100.0, 9.0, 1.0, 3.0, 2.0, 8.0], "pruned": [100.0] * 2 + [0.5] * 5}

    def repeat(run: Any) -> None:
        name = run.decoder.source
        run.prefill.append(times[name][order.count(name)])
        run.decode.append(1.0)
        order.append(name)

    monkeypatch.setattr(speed_module.Run, "repeat", repeat)
    monkeypatch.setattr(speed_module, "_peak_memory", lambda run: 0)
    models = [replace(pico("llama"), source=name) for name in ("dense", "pruned")]
    first, second = measure_speed_pair(*models, batch_sizes=(2,), seconds=0)
    assert order == ["dense", "pruned"] * (2 + 5)
    assert first["batch_2"]["prefill"]["seconds"] == 3.0  # warm-up left out
    assert second["batch_2"]["prefill"]["seconds"] == 0.5


def test_a_model_with_nine_positions_is_not_asked_for_more() -> None:
    lengths: list[int] = []
    own = pico("gpt2")
    own.model.config.n_positions = 9

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        before = cache.get_seq_length() if cache is not None else 0
        lengths.append(before + args[0].shape[1])

    own.model.register_forward_pre_hook(watch, with_kwargs=True)
    found = measure_speed(own, batch_sizes=(1,), seconds=0)
    assert max(lengths) == found["prompt_tokens"] + found["decode_steps"] == 9


def test_decoding_uses_the_cache() -> None:
    widths: list[int] = []
    own = pico("llama")
    own.model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    measure_speed(own, batch_sizes=(1,), seconds=0)
    assert set(widths) == {32, 1}


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    class Allocating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, ids: torch.Tensor, **rest: Any) -> SimpleNamespace:
            torch.empty(500_000)  # 2 MB, gone before the next
            both = torch.empty(250_000), torch.empty(500_000)
            return SimpleNamespace(past_key_values=len(both))

    fake: Any = SimpleNamespace(model=Allocating(), device=torch.device("cpu"))
    run = speed_module.Run(fake, torch.zeros(1, 4), torch.zeros(1, 2))
    peak = speed_module._peak_memory(run)
    assert 4000 + 3_000_000 <= peak < 4000 + 3_100_000


# Evaluation


def test_every_figure_comes_from_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Example] = []
    encode_all = samples_module.encode_all

    def recording(tokenizer: Any, examples: Any, *rest: Any) -> Any:
        read.extend(examples)
        return encode_all(tokenizer, examples, *rest)

    monkeypatch.setattr(samples_module, "encode_all", recording)
    other = task("other")
    found = evaluate_decoder(pico("llama"), task(), retain=[other], texts=TEXTS)
    assert sorted(read, key=repr) == sorted(2 * task().split("test"), key=repr)
    assert found.retained["other"]["examples"] == len(task().split("test"))
    assert sum(row["examples"] for row in found.groups.values()) == len(task().split("test"))
    assert set(found.groups) == {"even", "odd"}
    low, high = found.accuracy_interval
    assert 0 <= low <= found.accuracy <= high <= 1


def test_limit_holds_and_batches_change_nothing() -> None:
    own = pico("llama")
    found = evaluate_decoder(own, task(), limit=4, texts=TEXTS)
    assert sum(row["examples"] for row in found.groups.values()) == 4
    again = evaluate_decoder(own, task(), limit=4, texts=TEXTS, options=Options(batch_tokens=4))
    assert again.perplexity == pytest.approx(found.perplexity)
    assert replace(again, perplexity=found.perplexity) == found


@pytest.fixture(scope="module")
def compared() -> Comparison:
    found = compare_decoders(
        task(), pico("llama-gqa"), slim("llama-gqa"), retained=[task("other")], texts=TEXTS,
        speed=False, seed=5,
    )  # fmt: skip
    return replace(found, extra={**found.extra, "plan": {"format": "ragged", "recover": "mean"}})


def test_a_comparison_has_the_keys_of_the_contract_and_survives_json(compared: Comparison) -> None:
    values = json.loads(compared.to_json())
    assert list(values) == ["task", "dense", "pruned", "environment", "plan"]
    keys = {
        "accuracy", "accuracy_interval", "groups", "retained", "perplexity", "parameters", "bytes",
        "flops_per_token", "speed",
    }  # fmt: skip
    assert keys <= set(values["dense"]) == set(values["pruned"])
    assert values == compared.to_dict()
    assert Comparison.from_json(compared.to_json()) == compared
    assert values["environment"]["seed"] == 5
    assert values["environment"]["torch"] == torch.__version__
    assert values["pruned"]["parameters"] < values["dense"]["parameters"]


def test_an_evaluation_cannot_be_changed(compared: Comparison) -> None:
    with pytest.raises(AttributeError):
        compared.dense.accuracy = 1.0  # type: ignore[misc]
    assert Evaluation.from_dict(compared.dense.to_dict()) == compared.dense


# The model card


def plan() -> Plan:
    layout = Layout.of_config(dense("llama-gqa").config)
    hard = hard_layout("llama-gqa", dense("llama-gqa"))
    return Plan(hard.heads, hard.neurons, layout.n_heads, layout.n_neurons, "cna", "toy|x", seed=3)


PROVENANCE = {"tool_version": "9.9", "base_model": 'an "odd" name', "recover": "mean"}


def test_the_card_says_what_was_kept_and_what_it_cost(compared: Comparison) -> None:
    values = compared.to_dict()
    card = model_card(values, plan(), PROVENANCE)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "an \\"odd\\" name"\n' in card
    assert "5 of 24 (20.8%) heads" in card
    assert "| 1 | 4 | 0-2, 5 | 1 |" in card
    assert "| 0 | 0 | none | 2 |" in card
    row = f"| parameters | {values['dense']['parameters']:,} | {values['pruned']['parameters']:,} |"
    assert row in card
    assert f"retained: other | {values['dense']['retained']['other']['accuracy']:.1%} |" in card
    assert f"{values['pruned']['perplexity']:.3f}" in card
    assert "trust_remote_code=True" in card


def test_the_card_of_a_masked_checkpoint_asks_for_no_remote_code(compared: Comparison) -> None:
    card = model_card(compared.to_dict(), plan(), {**PROVENANCE, "format": "masked"})
    assert "trust_remote_code" not in card
    assert "import prune_edit" not in card


def test_the_card_has_the_same_bytes_whatever_the_clock_says(compared: Comparison) -> None:
    card = model_card(compared.to_dict(), plan(), PROVENANCE)
    timed = replace(compared.dense, speed={"batch_1": {"prefill": {"seconds": 0.123}}})
    other = replace(compared, dense=timed, extra={**compared.extra, "environment": {"cpus": 99}})
    assert model_card(other.to_dict(), plan(), PROVENANCE) == card
    assert "evaluation.json" in card
    assert os.sep + "tmp" not in card


def test_a_card_without_figures_leaves_them_out() -> None:
    card = model_card(None, plan(), {})
    assert "## Measured" not in card
    assert "## Kept" in card
    assert "base_model" not in card


def test_the_card_names_every_recovery() -> None:
    said = {
        recover: model_card(None, plan(), {**PROVENANCE, "recover": recover})
        for recover in RECOVERIES
        if recover != "auto"
    }
    assert len(set(said.values())) == len(said)
    assert all("replaced by" in card for card in said.values())


def test_ranges() -> None:
    assert ranges(()) == ""
    assert ranges((4,)) == "4"
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
