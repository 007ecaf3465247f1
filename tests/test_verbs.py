"""The whole line, from task to checkpoint to evaluation, on real models."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import prune_edit
from prune_edit import verbs
from prune_edit.errors import (
    BudgetError,
    ModelError,
    OutputExistsError,
    PlanError,
    PruneEditError,
    TaskError,
)
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import Comparison
from prune_edit.frontier import knee_of
from prune_edit.loading import load_decoder
from prune_edit.planning import Plan, keep_top
from prune_edit.recover import gradual as gradual_room
from prune_edit.recover.gradual import Schedule
from prune_edit.recover.tuning import Tuning
from prune_edit.samples import Samples
from prune_edit.scoring import Options, Scores
from prune_edit.selection import gates
from prune_edit.selection import run as selection_run
from prune_edit.selection.gates import learn_gates
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import encode_all
from prune_edit.verbs.common import pruning_method

QUICK: dict[str, Any] = {"limit": 48, "speed": False}
BRIEF = Schedule(round_tuning=Tuning(steps=2, batch=16), final_tuning=Tuning(steps=3, batch=16))


@pytest.fixture(scope="module")
def mathgpt(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "mathgpt-4l4h")


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "stories260K")


def story_task(folder: Path) -> str:
    """Pronouns in little stories, which stories260K completes."""
    names = {"she": ("Lily", "Mia", "Sue", "Anna"), "he": ("Tom", "Tim", "Ben", "Max")}
    rows = [
        {"prompt": f"One day, {name} went to the {place}. {name} was happy and", "answer": word}
        for word, people in names.items()
        for name in people
        for place in ("park", "store", "beach", "house", "garden")
    ]
    path = folder / "pronouns.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def accuracy(folder: Path | str, task: str) -> float:
    decoder = load_decoder(folder)
    rows = encode_all(decoder.tokenizer, load_task(task).sample("test", 48), task)
    return measure_accuracy(decoder, rows, Options()).value


def test_prune_writes_what_it_reports(mathgpt: str, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    found = verbs.prune(
        mathgpt, task="arithmetic/padded", keep_heads="75%", recover="mean", out=out, **QUICK
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (out / name).is_file(), name
    plan = Plan.load(out / "plan.json")
    assert plan.kept_heads == 12
    assert Comparison.from_json((out / "evaluation.json").read_text()) == found
    assert found.dense.accuracy > 0.9
    assert found.pruned.accuracy == pytest.approx(accuracy(out, "arithmetic/padded"))
    assert found.pruned.parameters < found.dense.parameters
    assert not list(tmp_path.glob(".slim*")), "temporary folders stayed behind"


def test_without_a_budget_the_knee_is_taken(mathgpt: str, tmp_path: Path) -> None:
    notes: list[str] = []
    found = verbs.prune(
        mathgpt, task="arithmetic/padded", recover="mean", out=tmp_path / "o", max_drop=100.0,
        note=lambda text: notes.append(str(text)), **QUICK,
    )  # fmt: skip
    steps, knee = found.extra["knee"]["steps"], found.extra["knee"]["knee"]
    assert [step["heads"] for step in steps] == [16, 12, 8, 4, 1]
    points = [(step["parameters"], step["accuracy"]) for step in steps]
    assert steps[knee_of(points)]["heads"] == knee == found.extra["plan"]["kept_heads"]
    assert 1 < knee < 16, "neither end is a knee here"
    assert any(f"the knee is taken: {knee} of 16 heads" in note for note in notes)


@pytest.mark.parametrize("select", ["greedy", "gates", "one-shot"])
def test_searches_choose_at_a_budget(
    mathgpt: str, tmp_path: Path, select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "GateTraining", partial(gates.GateTraining, steps=30, batch=16))
    settings: dict[str, Any] = {
        "task": "arithmetic/padded", "keep_heads": 10, "keep_neurons": "all", "seed": 1,
        "recover": "least-squares", "select": select, "limit": 96, "speed": False,
    }  # fmt: skip
    found = verbs.prune(mathgpt, out=tmp_path / "a", random=2, **settings)
    assert found.extra["plan"]["kept_heads"] == 10
    by_chance = found.extra["random"]["accuracies"]
    assert len(by_chance) == 2 and found.extra["random"]["recover"] == "least-squares"
    if select == "greedy":
        assert found.pruned.accuracy > max(by_chance)


def test_greedy_leaves_neurons_to_gates(
    mathgpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = partial(gates.GateTraining, steps=20, batch=16)
    monkeypatch.setattr(gates, "GateTraining", brief)

    def prune() -> None:
        verbs.prune(
            mathgpt, task="arithmetic/padded", keep_heads=14, keep_neurons="25%", seed=1, limit=64,
            recover="least-squares", select="greedy", out=tmp_path / "a", random=0, speed=False,
        )  # fmt: skip

    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(selection_run, "learn_gates", stop)
        prune()
    with monkeypatch.context() as patch:
        patch.setattr(selection_run, "Greedy", stop)  # the heads are not searched again
        prune()
    data = Samples(load_task("arithmetic/padded"), load_decoder(mathgpt), 64)
    scored = data.encoded("train", None)
    options = Options(seed=1)
    odds = learn_gates(data.decoder, data.train(), scored, None, 512, options)[1]
    plan = Plan.load(tmp_path / "a" / "plan.json")
    assert plan.neurons == keep_top(odds, 512)
    assert sum(map(len, plan.heads)) == 14


@pytest.mark.parametrize("how", [{"select": "gates"}, {"align": 4}])
def test_layers_outside_are_left_whole(
    stories: str, tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "GateTraining", partial(gates.GateTraining, steps=3, batch=8))
    verbs.prune(
        stories, task=story_task(tmp_path), keep_heads="75%", keep_neurons="20%", random=0,
        neuron_layers="2-4", recover="mean", out=tmp_path / "o", limit=24, speed=False, **how,
    )  # fmt: skip
    widths = [len(kept) for kept in Plan.load(tmp_path / "o" / "plan.json").neurons]
    assert widths[:2] == [172, 172] and 90 <= sum(widths[2:]) <= 103
    assert "align" not in how or not any(width % 4 for width in widths)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"select": "greedy"}, "--select greedy searches at a budget; give --keep-heads"),
        (
            {"select": "gates", "budget": "30%"},
            "--select gates searches at numbers of units; leave out --budget 30%",
        ),
        ({"select": "gates", "keep_accuracy": "90%"}, "leave out --select gates"),
        ({"keep_heads": 4, "random": -1}, "random -1 is no number of selections"),
        ({"keep_heads": 4, "select": "greed"}, "did you mean 'greedy'"),
        (
            {"keep_heads": 4, "select": "greedy", "kv": "keep-groups", "keep_neurons": "all"},
            "--select greedy takes heads one by one and cannot --kv keep-groups",
        ),
    ],
)
def test_searches_refuse_what_they_cannot_do(
    stories: str, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(PruneEditError, match=re.escape(text)):
        verbs.prune(
            stories, task=story_task(tmp_path), out=tmp_path / "o", **{"limit": 8, **settings}
        )
    assert not (tmp_path / "o").exists()


def test_masked_and_ragged_are_the_same_model(stories: str, tmp_path: Path) -> None:
    logits = []
    for form in ("ragged", "masked"):
        verbs.prune(
            stories,
            task=story_task(tmp_path),
            keep_heads="30%",
            keep_neurons="60%",
            recover="mean",
            format=form,
            out=tmp_path / form,
            **QUICK,
        )
        decoder = load_decoder(tmp_path / form)
        with torch.no_grad():
            logits.append(decoder.model(torch.arange(3, 23)[None]).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_pruned_model_is_pruned_again_whatever_its_format(stories: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task": story_task(tmp_path), "recover": "none", **QUICK}
    plans, logits = [], []
    for form in ("ragged", "masked"):
        once, twice = tmp_path / form, tmp_path / f"{form}-twice"
        first = {"keep_heads": 20, "keep_neurons": "50%", "format": form}
        verbs.prune(stories, out=once, **first, **settings)
        # Shares of what is left, not of the base model.
        again = {"keep_heads": "50%", "keep_neurons": "50%", "format": "ragged"}
        verbs.prune(str(once), out=twice, **again, **settings)
        before, after = (Plan.load(folder / "plan.json") for folder in (once, twice))
        assert (before.kept_heads, after.kept_heads) == (20, 10)
        assert after.kept_neurons == before.kept_neurons // 2
        for small, large in ((after.heads, before.heads), (after.neurons, before.neurons)):
            assert all(set(a) <= set(b) for a, b in zip(small, large, strict=True))
        plans.append((after.heads, after.neurons))
        with torch.no_grad():
            logits.append(load_decoder(twice).model(torch.arange(3, 23)[None]).logits)
    assert plans[0] == plans[1]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_least_squares_keeps_more_than_the_mean(mathgpt: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "task": "arithmetic/padded",
        "keep_heads": "50%",
        "keep_neurons": "50%",
        "speed": False,
        "limit": 200,
    }
    kept = {}
    for recover, select in (
        ("mean", "auto"), ("least-squares", "one-shot"), ("least-squares", "auto")
    ):  # fmt: skip
        out = tmp_path / f"{recover}-{select}"
        found = verbs.prune(mathgpt, recover=recover, select=select, out=out, **settings)
        kept[recover, select] = found.pruned.accuracy
        assert found.extra["plan"]["recover"] == recover
        assert not list(tmp_path.glob(".*")), "stages stayed behind"
    assert kept["least-squares", "one-shot"] > kept["mean", "auto"] + 0.05
    plans = [
        Plan.load(tmp_path / f"least-squares-{select}" / "plan.json")
        for select in ("one-shot", "auto")
    ]
    assert plans[0].neurons != plans[1].neurons, "gradual by default: scored again on the way"
    # A plan's units, refitted in one step.
    verbs.apply(
        mathgpt, plans[0], tmp_path / "again", recover="least-squares",
        task="arithmetic/padded", limit=200,
    )  # fmt: skip
    files = [
        (folder / "model.safetensors").read_bytes()
        for folder in (tmp_path / "again", tmp_path / "least-squares-one-shot")
    ]
    assert files[0] == files[1]


def lora_adapter(model: str, folder: Path) -> str:
    """A LoRA adapter of one early layer's attention, with weights that matter."""
    from peft import LoraConfig, get_peft_model

    decoder = load_decoder(model)
    family = decoder.family
    own = [family.queries, family.attention_output]
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules=[f"{family.layers}.1.{path}" for path in own],
        fan_in_fan_out=family.transposed,
    )
    adapted: Any = get_peft_model(decoder.model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return str(folder)


def test_neurons_of_deep_layers_by_cases_against_a_tuned_model(
    mathgpt: str, tmp_path: Path
) -> None:
    adapter = lora_adapter(mathgpt, tmp_path / "adapter")
    settings: dict[str, Any] = {"task": "arithmetic/padded", "recover": "mean", **QUICK}
    plans = {}
    for name, more in {
        "plain": {"score": "cna-cases"},
        "tuned": {"score": "cna-cases", "adapter": adapter},
        "mean": {"score": "cna", "adapter": adapter},
    }.items():
        found = verbs.prune(
            mathgpt, keep_neurons="25%", neuron_layers="2-3", out=tmp_path / name,
            **more, **settings,
        )  # fmt: skip
        plans[name] = Plan.load(tmp_path / name / "plan.json")
        sizes = [len(units) for units in plans[name].neurons]
        assert sizes[:2] == [512, 512], "the other layers' neurons were to stay"
        assert sum(sizes[2:]) == 256, "25 % of the neurons of layers 2 and 3"
        assert found.extra["plan"]["kept_neurons"] == 1280
    assert len({plan.neurons for plan in plans.values()}) == 3
    # The same in two steps, through the scores' file.
    score_settings = {"limit": 48, "task": "arithmetic/padded", "method": "cna-cases"}
    verbs.score(mathgpt, adapter=adapter, **score_settings).save(tmp_path / "scores")
    scores = Scores.load(tmp_path / "scores")
    assert scores.metadata["unit"] == "score" and scores.metadata["adapted_digest"]
    plan = verbs.plan(scores, keep_neurons="25%", neuron_layers="2-3")
    assert plan.neurons == plans["tuned"].neurons
    assert plan.scores_digest == plans["tuned"].scores_digest
    everywhere = verbs.plan(scores, keep_neurons="25%")
    assert len(everywhere.neurons[0]) < 512 and everywhere.kept_neurons == 512


def test_the_neuron_search_leaves_other_layers_alone(mathgpt: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task": "arithmetic/padded", **QUICK}
    verbs.prune(mathgpt, neuron_layers="3", recover="mean", out=tmp_path / "s", **settings)
    sizes = [len(units) for units in Plan.load(tmp_path / "s" / "plan.json").neurons]
    assert sizes[:3] == [512] * 3 and sizes[3] < 512
    scores = verbs.score(mathgpt, task="arithmetic/padded", limit=48)
    plan = verbs.plan(scores, neuron_layers="3", limit=48, task="arithmetic/padded")
    assert [len(units) for units in plan.neurons[:3]] == [512] * 3 and len(plan.neurons[3]) < 512


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"neuron_layers": "4"}, BudgetError, "the model has layers 0 to 3, and no layer 4"),
        ({"neuron_layers": "deep"}, BudgetError, "--neuron-layers 'deep' names no layers"),
        ({"adapter": "a", "select": "gradual", "recover": "mean"}, PlanError, "--select gradual"),
        ({"adapter": "a", "keep_accuracy": "90%"}, PlanError, "--keep-accuracy 90% scores"),
        ({"adapter": "a", "score": "wanda"}, PlanError, "means nothing to --score wanda"),
        ({"adapter": "nowhere"}, ModelError, "adapter nowhere has no adapter_config.json"),
    ],
)
def test_layers_and_adapters_that_cannot_be_are_refused(
    mathgpt: str, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        verbs.prune(mathgpt, task="arithmetic/padded", out=tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_the_best_neurons_alone_know_no_other_layers() -> None:
    neurons = torch.full((2, 4), torch.nan)
    neurons[1, 2] = 1.0
    scores = Scores(torch.ones(2, 2), neurons, {"top_neurons": "1"})
    with pytest.raises(PlanError, match="or leave out --neuron-layers"):
        verbs.plan(scores, keep_neurons=1, neuron_layers="1")
    assert verbs.plan(scores, keep_neurons=1).neurons == ((), (2,))


def test_the_smallest_model_that_keeps_the_accuracy(mathgpt: str, tmp_path: Path) -> None:
    notes: list[str] = []
    settings: dict[str, Any] = {"task": "arithmetic/padded", "speed": False, "limit": 200}
    found = verbs.prune(
        mathgpt, keep_accuracy="90%", recover="least-squares", out=tmp_path / "s",
        note=notes.append, **settings,
    )  # fmt: skip
    plan = Plan.load(tmp_path / "s" / "plan.json")
    said = found.extra["keep_accuracy"]
    assert said["floor"] == pytest.approx(0.9 * said["dense"])
    last = said["tries"][-1]
    assert (last["heads"], last["neurons"]) == (plan.kept_heads, plan.kept_neurons)
    assert last["enough"] and last["accuracy"] >= said["floor"]
    low, high = last["interval"]
    assert low < last["accuracy"] < high
    assert plan.kept_heads < 12 and plan.kept_neurons < 4 * 512
    half = (said["floor"] + said["dense"]) / 2
    assert [each["accuracy"] >= half for each in said["tries"][:-1]] == [
        each["enough"] for each in said["tries"][:-1]
    ]
    short = [each["heads"] for each in said["tries"] if not each["enough"]]
    assert short and max(short) < plan.kept_heads <= max(short) + max(1, 0.1 * plan.kept_heads)
    assert f"{plan.kept_heads} heads and {plan.kept_neurons} neurons keep" in notes[-1]
    decoder = load_decoder(tmp_path / "s")
    rows = encode_all(
        decoder.tokenizer, load_task("arithmetic/padded").sample("validation", 200), "t"
    )
    measured = 100 * measure_accuracy(decoder, rows, Options()).value
    assert measured == pytest.approx(last["accuracy"])


@pytest.mark.parametrize("given", ["", "99", "0%", "101%", "nan%", "high"])
def test_an_accuracy_to_keep_is_a_share(given: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="not a share of the dense model's accuracy; give one"):
        verbs.prune("no model", keep_accuracy=given, out=tmp_path / "s")


def test_what_select_cannot_mean_is_refused(tmp_path: Path) -> None:
    for settings, text in (
        ({"keep_accuracy": "99%", "select": "one-shot"}, "goes in rounds; leave out"),
        ({"recover": "auto", "select": "gradual"}, "--select gradual needs a --recover"),
    ):
        with pytest.raises(PlanError, match=text):
            verbs.prune("no model", out=tmp_path / "s", **settings)  # type: ignore[arg-type]


def test_an_accuracy_of_nothing_cannot_be_kept(mathgpt: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    rows = [{"prompt": f"{i:03}{i + 7:03}", "answer": "9999"} for i in range(100, 200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match="answers none of the validation examples"):
        verbs.prune(
            mathgpt, task=str(path), keep_accuracy="99%", recover="mean", out=tmp_path / "s",
            **QUICK,
        )  # fmt: skip
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("more", [{"keep_heads": "5%"}, {"keep_neurons": "all"}])
def test_an_accuracy_to_keep_and_a_budget_are_two_wishes(
    more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="finds the budgets; leave out --keep-heads and"):
        verbs.prune("no model", keep_accuracy="99%", out=tmp_path / "s", **more)


def test_pruning_ranks_neurons_by_both_sides_unless_told_otherwise() -> None:
    assert pruning_method("auto") == "circuit"
    assert pruning_method("auto", adapted=True) == "cna"
    assert pruning_method("taylor", adapted=True) == "taylor"
    with pytest.raises(PruneEditError, match="did you mean 'circuit'"):
        pruning_method("circuits")


def test_the_three_steps_are_prune_without_tuning(mathgpt: str, tmp_path: Path) -> None:
    scores = verbs.score(mathgpt, "arithmetic/padded", method="circuit", limit=48)
    scores.save(tmp_path / "s")
    plan = verbs.plan(
        prune_edit.Scores.load(tmp_path / "s"), keep_heads="50%", max_drop=2.0, limit=48
    )
    verbs.apply(
        mathgpt, plan, tmp_path / "steps", recover="mean", task="arithmetic/padded", limit=48
    )
    verbs.prune(
        mathgpt,
        task="arithmetic/padded",
        keep_heads="50%",
        max_drop=2.0,
        recover="mean",
        out=tmp_path / "prune",
        **QUICK,
    )
    assert Plan.load(tmp_path / "prune" / "plan.json") == plan
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (tmp_path / "steps" / name).read_bytes() == (
            tmp_path / "prune" / name
        ).read_bytes(), name


def test_same_command_same_bytes_and_a_killed_run_goes_on(
    mathgpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "task": "arithmetic/padded",
        "keep_heads": "25%",
        "keep_neurons": "all",
        "recover": "lora",
        "schedule": BRIEF,
        **QUICK,
    }
    verbs.prune(mathgpt, out=tmp_path / "whole", **settings)

    calls: list[str] = []
    real = gradual_room.tune

    def dies(*arguments: Any, **named: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append("tuned")
        return real(*arguments, **named)

    monkeypatch.setattr(gradual_room, "tune", dies)
    with pytest.raises(KeyboardInterrupt):
        verbs.prune(mathgpt, out=tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists()
    assert list(tmp_path.glob(".again.work-*")), "nothing was kept to go on from"

    rounds = len(BRIEF.counts(16, 4))
    count = iter(range(rounds))

    def counts(*arguments: Any, **named: Any) -> Any:
        next(count)
        return real(*arguments, **named)

    monkeypatch.setattr(gradual_room, "tune", counts)
    verbs.prune(mathgpt, out=tmp_path / "again", **settings)
    assert rounds - len(list(count)) == rounds - 2, "finished rounds were made again"
    for name in ("model.safetensors", "plan.json", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name
    assert not list(tmp_path.glob(".again*"))


def test_auto_tunes_only_where_the_mean_is_not_enough(mathgpt: str, tmp_path: Path) -> None:
    for share, drop, recovered in (("100%", 1.0, "mean"), ("25%", 1.0, "full")):
        notes: list[str] = []
        found = verbs.prune(
            mathgpt,
            task="arithmetic/padded",
            keep_heads=share,
            keep_neurons="all",
            max_drop=drop,
            schedule=BRIEF,
            out=tmp_path / share,
            note=notes.append,
            **QUICK,
        )
        assert found.extra["plan"]["recover"] == recovered
        assert len(notes) == 1
        assert ("tuning gradually" in notes[0]) == (recovered == "full")


def test_a_pruned_model_can_be_pruned_again(mathgpt: str, tmp_path: Path) -> None:
    for source, out, heads in ((mathgpt, "once", "12"), (tmp_path / "once", "twice", "8")):
        verbs.prune(
            source,
            task="arithmetic/padded",
            keep_heads=heads,
            keep_neurons="all",
            recover="mean",
            out=tmp_path / out,
            **QUICK,
        )
    once, twice = (Plan.load(tmp_path / name / "plan.json") for name in ("once", "twice"))
    assert twice.kept_heads == 8
    assert all(set(b) <= set(a) for a, b in zip(once.heads, twice.heads, strict=True))


def test_the_neuron_search_keeps_its_promise(mathgpt: str, tmp_path: Path) -> None:
    verbs.prune(
        mathgpt,
        task="arithmetic/padded",
        keep_heads="all",
        max_drop=10.0,
        recover="mean",
        out=tmp_path / "slim",
        limit=200,
        speed=False,
    )
    plan = Plan.load(tmp_path / "slim" / "plan.json")
    assert plan.kept_neurons < 4 * 512
    decoder, dense = load_decoder(tmp_path / "slim"), load_decoder(mathgpt)
    rows = encode_all(
        dense.tokenizer, load_task("arithmetic/padded").sample("validation", 200), "t"
    )
    before, after = (measure_accuracy(d, rows, Options()).value for d in (dense, decoder))
    assert before - after <= 0.10 + 1e-9


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"keep_heads": "abc"}, BudgetError, "--keep-heads 'abc' is not a budget"),
        ({"keep_heads": "17"}, BudgetError, "--keep-heads 17: the model has only 16"),
        ({"keep_neurons": "0%"}, BudgetError, "--keep-neurons 0%"),
        ({"task": "arithmetik"}, TaskError, "did you mean 'arithmetic'"),
        ({"task": "arithmetic/mul"}, TaskError, "give your own with --task FILE.jsonl"),
    ],
)
def test_bad_input_leaves_the_output_alone(
    mathgpt: str, tmp_path: Path, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        verbs.prune(
            mathgpt, out=tmp_path / "slim", **{"task": "arithmetic/padded", **settings}, **QUICK
        )
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept_unless_told(mathgpt: str, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        verbs.prune(mathgpt, task="arithmetic/padded", out=out, **QUICK)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    verbs.prune(
        mathgpt,
        task="arithmetic/padded",
        keep_neurons="all",
        recover="none",
        out=out,
        overwrite=True,
        **QUICK,
    )
    assert (out / "model.safetensors").exists()


def test_a_plan_of_another_model_is_refused(mathgpt: str, stories: str, tmp_path: Path) -> None:
    scores = verbs.score(mathgpt, "arithmetic/padded", method="random", limit=4)
    plan = verbs.plan(scores, keep_heads="50%", keep_neurons="50%")
    with pytest.raises(PlanError, match="use the model the plan was made for"):
        verbs.apply(stories, plan, tmp_path / "slim", recover="none")
    assert not (tmp_path / "slim").exists()


def test_three_digits_join_where_the_model_can_do_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_edit import fitting as fit

    task = load_task("arithmetic/add")
    monkeypatch.setattr(fit, "_writable", lambda examples, decoder: examples)
    for share, longer in ((0.4, False), (0.6, True)):
        monkeypatch.setattr(fit, "_answers", lambda *_: share)  # noqa: B023
        fitted = fit.fit_task(task, None, Options())  # type: ignore[arg-type]
        assert (len(fitted.examples) > len(task.examples)) == longer


def test_evaluate_alone_and_against(mathgpt: str) -> None:
    alone = verbs.evaluate(mathgpt, "arithmetic/padded", **QUICK)
    both = verbs.evaluate(mathgpt, "arithmetic/padded", against=mathgpt, **QUICK)
    assert isinstance(both, Comparison)
    assert both.dense == both.pruned == alone
