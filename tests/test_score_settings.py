"""What `score` can be told, from the verb to the numbers, and what plans make of the scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import tuned
from test_scale import pico, prompts_of, streamed

import prune_edit
from prune_edit import loading as loading_room
from prune_edit import verbs
from prune_edit.errors import BudgetError, ModelError, PlanError, TaskError, UnsupportedFamilyError
from prune_edit.evaluation.comparison import Comparison
from prune_edit.loading import load_decoder
from prune_edit.planning import Plan, keep_top
from prune_edit.scoring import METHODS, Options, Scores, load_adapter, run
from prune_edit.scoring.cache import entry_of
from prune_edit.scoring.parallel import Workers
from prune_edit.scoring.run import check_settings, run_scoring, same_answers, unit_of
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Example

PADDED = "arithmetic/padded"


@pytest.fixture(scope="module")
def mathgpt_folder(shared: Path) -> str:
    return str(shared / "models" / "mathgpt-4l4h")


@pytest.fixture(scope="module")
def adapter(mathgpt_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of mathgpt with weights that matter."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    model: Any = get_peft_model(load_decoder(mathgpt_folder).model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def pairs(folder: Path, contrasts: Sequence[str | None]) -> str:
    """A task of six sums, all in the train split by being asked for as `all`."""
    rows = []
    sums = [(293, 480), (104, 377), (550, 231), (618, 127), (335, 402), (721, 118)]
    for (a, b), contrast in zip(sums, contrasts, strict=True):
        row = {"prompt": f"{a}{b}", "answer": str(a + b).zfill(4)[::-1]}
        rows.append(row if contrast is None else {**row, "contrast": contrast})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


OTHERS = ("111222", "333444", "100200", "305406", "222333", "400500")


# Settings


def test_settings_that_a_method_does_not_read_are_refused(mathgpt_folder: str) -> None:
    for settings, said in (
        ({"ablation": "mean"}, "--ablation mean means nothing to --score cna; it is for interv"),
        ({"method": "taylor", "norm": "true"}, "--norm true means nothing to --score taylor"),
        ({"method": "flap", "contrast": True}, "--contrast means nothing to --score flap"),
        ({"method": "importance", "adapter": "a"}, "--adapter a means nothing to --score import"),
        ({"method": "query", "top_heads": 2}, "--top-heads 2 means nothing to --score query"),
        ({"integrated_steps": 2}, "--integrated-steps 2 means nothing to --score cna"),
        ({"method": "flap", "top_neurons": 2}, "--top-neurons 2 means nothing to --score flap"),
        ({"query_neurons": 2}, "--query-neurons 2 means nothing to --score cna"),
        ({"adapter": "a", "contrast": True}, "--adapter and --contrast are two contrasts"),
        ({"contrast": True, "top_heads": 2}, "--contrast and --top-heads are two contrasts"),
    ):
        with pytest.raises(PlanError, match=said):
            verbs.score("no model is loaded", PADDED, **settings)  # type: ignore[arg-type]
    for method in METHODS:
        check_settings(method, Options(seed=3, batch_tokens=5, neurons=False))


@pytest.mark.parametrize(
    ("method", "settings", "options"),
    [
        ("importance", {"norm": "true"}, Options(norm="true")),
        ("taylor", {"integrated_steps": 3}, Options(integrated_steps=3)),
        ("query", {"query_neurons": 4}, Options(query_neurons=4)),
        ("intervention", {"ablation": "mean"}, Options(ablation="mean", neurons=False)),
        ("intervention", {"measure": "accuracy"}, Options(measure="accuracy", neurons=False)),
        ("flap", {"neurons": False}, Options()),
    ],
)
def test_every_setting_reaches_its_method(
    mathgpt_folder: str, method: str, settings: dict[str, Any], options: Options
) -> None:
    found = verbs.score(mathgpt_folder, PADDED, method=method, limit=3, **settings)
    plain = verbs.score(mathgpt_folder, PADDED, method=method, limit=3)
    decoder = load_decoder(mathgpt_folder)
    examples = prune_edit.load_task(PADDED).sample("train", 3)
    heads, neurons = METHODS[method](decoder, encode_all(decoder.tokenizer, examples, ""), options)
    torch.testing.assert_close(found.heads, heads, atol=2e-5, rtol=1e-4)
    if settings.get("neurons") is False or not options.neurons:
        assert found.neurons.isnan().all()
    else:
        torch.testing.assert_close(found.neurons, neurons, atol=2e-5, rtol=1e-4)
    if method != "flap":
        assert not torch.equal(plain.heads, found.heads) or not torch.equal(
            plain.neurons, found.neurons
        )
        ((name, value),) = settings.items()
        assert found.metadata[name] == str(value) and name not in plain.metadata


def test_scores_say_their_unit(mathgpt_folder: str) -> None:
    nats = ("cna", "importance", "intervention", "taylor")
    for method in METHODS:
        assert unit_of(method, Options()) == ("nats" if method in nats else "score")
    assert unit_of("intervention", Options(measure="accuracy")) == "share"
    found = verbs.score(mathgpt_folder, PADDED, method="wanda", limit=2)
    assert found.metadata["unit"] == "score"


# Contrasts


def test_contrasts_are_the_examples_own(mathgpt_folder: str, tmp_path: Path) -> None:
    task = pairs(tmp_path, OTHERS)
    found = verbs.score(mathgpt_folder, task, split="all", contrast=True)
    decoder = load_decoder(mathgpt_folder)
    examples = prune_edit.load_task(task).sample("all", None)
    sides = []
    for rows in (examples, [replace(row, prompt=str(row.contrast)) for row in examples]):
        encoded = encode_all(decoder.tokenizer, rows, "")
        sides.append(METHODS["importance"](decoder, encoded, Options()))
    for got, one, other in zip((found.heads, found.neurons), *sides, strict=True):
        assert (one - other).abs().max() > 1e-2
        torch.testing.assert_close(got, one - other, atol=2e-5, rtol=0)
    assert found.metadata["contrast"] == "task"


def test_predicted_answers_follow_the_contrast_too(mathgpt_folder: str, tmp_path: Path) -> None:
    decoder = load_decoder(mathgpt_folder)
    rows = encode_all(decoder.tokenizer, [Example("293480", "0773"), Example("104377", "1")], "")
    other = encode_all(decoder.tokenizer, [Example("111222", "5"), Example("100200", "77")], "")
    got = same_answers(other, rows)
    assert [row.answer for row in got] == [row.answer for row in rows]
    assert [row.ids[: row.start] for row in got] == [row.ids[: row.start] for row in other]
    found = verbs.score(
        mathgpt_folder, pairs(tmp_path, OTHERS), split="all", contrast=True, target="predicted"
    )
    assert found.heads.isfinite().all() and found.heads.abs().max() > 1e-3


def test_an_example_without_contrast_is_named(mathgpt_folder: str, tmp_path: Path) -> None:
    task = pairs(tmp_path, (*OTHERS[:5], None))
    with pytest.raises(TaskError, match="prompt '721118' has no contrast; give every example"):
        verbs.score(mathgpt_folder, task, split="all", contrast=True)


# Adapters


def test_an_adapter_is_the_other_model_and_decides_the_cache(
    mathgpt_folder: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes: list[str] = []
    settings: dict[str, Any] = {"limit": 3, "adapter": adapter, "cache": True, "note": notes.append}
    first = verbs.score(mathgpt_folder, PADDED, **settings)
    assert not notes
    again = verbs.score(mathgpt_folder, PADDED, **settings)
    assert "found finished scores in the cache" in notes[0]
    assert first.digest == again.digest
    decoder = load_decoder(mathgpt_folder)
    rows = encode_all(decoder.tokenizer, prune_edit.load_task(PADDED).sample("train", 3), "")
    want = METHODS["cna"](decoder, rows, Options(adapted=load_adapter(decoder, adapter)))
    torch.testing.assert_close((first.heads, first.neurons), want, atol=2e-5, rtol=0)
    assert first.heads.abs().max() > 1e-2
    before = load_adapter(decoder, adapter).digest
    assert before.startswith(decoder.digest) and before != decoder.digest
    assert first.metadata["adapted_digest"] == before
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert config.read_text() != text
    after = load_adapter(decoder, adapter)
    config.write_text(text)
    assert after.digest != before
    keys = [
        entry_of(decoder, rows, "cna", Options(adapted=adapted))
        for adapted in (load_adapter(decoder, adapter), after, None)
    ]
    assert len({entry.key for entry in keys if entry}) == 3


def test_an_adapter_needs_the_model_in_memory(tmp_path: Path) -> None:
    tuned("llama-gqa", tmp_path / "adapter")
    decoder = streamed(tmp_path / "m", "llama-gqa", 1.2)
    with pytest.raises(ModelError, match="needs the whole model in memory; raise --max-memory"):
        load_adapter(decoder, tmp_path / "adapter")


# Neurons that were not scored


@pytest.mark.parametrize("method", METHODS)
def test_left_out_neurons_are_nan_by_every_method(method: str, tmp_path: Path) -> None:
    decoder = pico(tmp_path / "m", "llama-gqa")
    notes: list[str] = []
    heads, neurons = run_scoring(
        decoder, prompts_of(3), method, Options(neurons=False), Workers(), False, notes.append
    )
    assert neurons.isnan().all() and heads.isfinite().all()


def test_plans_from_scores_without_neurons(mathgpt_folder: str) -> None:
    scores = verbs.score(mathgpt_folder, PADDED, method="intervention", limit=3)
    assert scores.neurons.isnan().all()
    with pytest.raises(PlanError, match=r"--keep-neurons 50%: these scores have no neurons; score"):
        verbs.plan(scores, keep_heads="50%", keep_neurons="50%")
    notes: list[str] = []
    for given in (None, "all"):
        plan = verbs.plan(scores, keep_heads="50%", keep_neurons=given, note=notes.append)
        assert (plan.kept_heads, plan.kept_neurons) == (8, 4 * 512)
    assert notes == ["the scores have no neurons: all neurons stay"] * 2
    stranger = Scores(scores.heads, scores.neurons, {**scores.metadata, "model_digest": "x"})
    with pytest.raises(PlanError, match="the scores are of another model"):
        verbs.plan(stranger, keep_heads="50%")


def test_the_best_neurons_alone_are_planned_by_count(mathgpt_folder: str) -> None:
    scores = verbs.score(mathgpt_folder, PADDED, limit=3, top_neurons=40)
    assert int((~scores.neurons.isnan()).sum()) == 40
    assert scores.metadata["top_neurons"] == "40"
    for given in (None, "all", "5%"):
        with pytest.raises(PlanError, match="the 40 best neurons alone; give --keep-neurons as a"):
            verbs.plan(scores, keep_heads="50%", keep_neurons=given)
    plan = verbs.plan(scores, keep_heads="50%", keep_neurons=25)
    whole = verbs.score(mathgpt_folder, PADDED, limit=3)
    assert plan.neurons == keep_top(whole.neurons, 25)
    with pytest.raises(BudgetError, match="has only 40"):
        verbs.plan(scores, keep_heads="50%", keep_neurons=41)


@pytest.mark.parametrize("method", ["cna", "wanda", "magnitude"])
def test_a_broken_weight_is_named_and_is_no_absent_unit(method: str, tmp_path: Path) -> None:
    decoder = pico(tmp_path / "m", "llama-gqa")
    with torch.no_grad():
        decoder.layers[1].mlp.down_proj.weight[:, 3] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match=r"of layer \d of .* scores nan by .* not finite; check"):
        run_scoring(decoder, prompts_of(3), method, Options(), Workers(), False, lambda _: None)


def test_prune_by_intervention_keeps_all_neurons_and_says_so(
    mathgpt_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = METHODS["intervention"]

    def asking(decoder: Any, prompts: Any, options: Options) -> Any:
        asked.append(options.neurons)
        return real(decoder, prompts, replace(options, neurons=False))

    monkeypatch.setitem(run.METHODS, "intervention", asking)
    notes: list[str] = []
    found = verbs.prune(
        mathgpt_folder,
        task=PADDED,
        keep_heads="75%",
        score="intervention",
        recover="mean",
        out=tmp_path / "slim",
        limit=8,
        speed=False,
        note=notes.append,
    )
    assert isinstance(found, Comparison)
    assert asked == [False]
    assert any("ranks heads alone: all neurons stay" in note for note in notes)
    plan = Plan.load(tmp_path / "slim" / "plan.json")
    assert (plan.kept_heads, plan.kept_neurons) == (12, 4 * 512)
    assert found.extra["plan"]["of_neurons"] == 4 * 512


# Refused before the work


def test_an_unsupported_family_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path) -> str:
        raise AssertionError("the weights were hashed")

    monkeypatch.setattr(loading_room, "model_digest", read)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for settings in ({}, {"device_map": "auto"}):
        with pytest.raises(UnsupportedFamilyError, match="is an encoder, not a decoder"):
            load_decoder(tmp_path, **settings)  # type: ignore[arg-type]
