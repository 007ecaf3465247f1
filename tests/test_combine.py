"""Several tasks at once: each keeps its splits and its share; one alone changes nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_checkpoint import dense

from prune_edit import verbs
from prune_edit.cli import main
from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError, TaskError
from prune_edit.evaluation.accuracy import Accuracy, wilson
from prune_edit.evaluation.comparison import Comparison
from prune_edit.fitting import fit_task
from prune_edit.planning import Plan
from prune_edit.recover.draw import Draw
from prune_edit.recover.least_squares import refit
from prune_edit.recover.shrink import mean_compensation, shrink
from prune_edit.scoring import Options
from prune_edit.scoring.combine import weighted
from prune_edit.tasks import CombinedTask, Example, Task, combine, load_task
from prune_edit.tasks.combine import (
    balanced,
    by_part,
    first,
    in_turn,
    parse_weighted,
    sources_of,
    written,
)
from prune_edit.tasks.prompts import Encoded
from prune_edit.verbs.common import portable, task_of_origin

OPTIONS = Options()
QUICK: dict[str, Any] = {"limit": 48, "speed": False}


def toy(name: str, count: int = 60, groups: int = 2, start: int = 0) -> Task:
    numbers = range(start, start + count)
    return Task(name, tuple(Example(f"{name} {i}", str(i), f"g{i % groups}") for i in numbers))


def both(one: Task, other: Task, weight: float = 1.0) -> CombinedTask:
    found = combine([(one, 1.0), (other, weight)])
    assert isinstance(found, CombinedTask)
    return found


# The task


def test_a_single_task_is_itself_and_the_order_does_not_matter() -> None:
    tasks = [(toy("a"), 1.0), (toy("b", 30, 3), 0.5), (toy("c"), 2.0)]
    assert combine(tasks[:1]) is tasks[0][0]
    found = [combine(some) for some in permutations(tasks)]
    assert len({each.digest for each in found}) == 1
    assert len({each.split("train") for each in found}) == 1
    assert {each.name for each in found} == {"a+b=0.5+c=2.0"}
    nested = combine([(combine(tasks[:2]), 1.0), tasks[2]])
    assert nested.digest == found[0].digest
    other = combine([*tasks[:2], (toy("c"), 3.0)])
    assert other.digest != found[0].digest, "a weight is part of the task"


def test_splits_stay_each_tasks_own() -> None:
    one, other = toy("a"), toy("b", 5, 1)  # the second is so small that a split is filled
    task = both(one, other)
    for split in ("train", "validation", "test", "all"):
        mine = [(e.prompt, e.answer) for e in (*one.split(split), *other.split(split))]
        assert sorted(mine) == sorted((e.prompt, e.answer) for e in task.split(split))
    assert task.groups == ("a: g0", "a: g1", "b: g0")
    sample = task.sample("train", 3)
    assert [e.group.partition(":")[0] for e in sample] == ["a", "b"] * 3
    assert [e.prompt for e in sample[::2]] == [e.prompt for e in one.sample("train", 3)]


def test_a_prompt_that_another_task_is_tested_by_is_not_trained_on() -> None:
    one, shared = toy("a"), toy("shared", 40)
    keys: dict[str, str] = {}
    for i in range(1000):  # keys whose split is known
        keys.setdefault(Example("", "", key=f"k{i}").split, f"k{i}")
    moved = {"train": "test", "validation": "train", "test": "train"}
    elsewhere = tuple(replace(e, key=keys[moved[e.split]]) for e in shared.examples)
    other = Task("b", (*toy("b").examples, *elsewhere))
    one = Task("a", (*one.examples, *shared.examples))

    def prompts(task: Task, *splits: str) -> set[str]:
        return {e.prompt for split in splits for e in task.split(split)}

    assert prompts(one, "train") & prompts(other, "test")
    assert prompts(other, "train") & prompts(one, "test")
    task = both(one, other)
    assert not prompts(task, "train") & prompts(task, "validation", "test")
    assert not prompts(task, "validation") & prompts(task, "test")
    assert prompts(task, "test") == prompts(one, "test") | prompts(other, "test")
    assert prompts(toy("a"), "train") | prompts(toy("b"), "train") <= prompts(task, "train")
    lost = both(Task("x", shared.examples), Task("y", elsewhere + toy("b").examples))
    with pytest.raises(TaskError, match="'x': every train example is one that another task is"):
        lost.split("train")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("facts", ("facts", None)),
        ("facts=0.5", ("facts", 0.5)),
        ("facts=0", ("facts", 0.0)),
        ("a=b.jsonl", ("a=b.jsonl", None)),
        ("a=b.jsonl=2", ("a=b.jsonl", 2.0)),
        ("/x=1/t.jsonl", ("/x=1/t.jsonl", None)),
        ("=1", ("=1", None)),
    ],
)
def test_weights_are_read_behind_the_last_equals_sign(text: str, want: Any) -> None:
    assert parse_weighted(text) == want
    name, weight = want
    again = 1.0 if weight is None else weight
    assert parse_weighted(written(name, again)) in (want, (name, again))


@pytest.mark.parametrize("text", ["facts=-1", "facts=nan", "facts=inf"])
def test_a_weight_is_a_number_from_0(text: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task 'facts' has weight .*; give 0 \(only measured\)"):
        verbs.prune("no model", retain=[text], out=tmp_path / "p")
    with pytest.raises(TaskError, match="task 'facts' has weight"):
        verbs.sweep("no model", retain=[(load_task("facts"), float(text[6:]))], out=tmp_path / "p")
    done = CliRunner().invoke(
        main, ["prune", "--model", "no", "--retain", text, "--out", str(tmp_path / "p")]
    )
    assert done.exit_code == 6
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(TaskError, match="two tasks are named 'a'"):
        combine([(toy("a"), 1.0), (toy("a", 30), 0.5)])
    with pytest.raises(TaskError, match="weight 0 and would take no part"):
        combine([(toy("a"), 1.0), (toy("b"), 0.0)])
    with pytest.raises(TaskError, match="no task is given"):
        verbs.score("no model", [])
    with pytest.raises(TaskError, match="unknown task 'fact'"):
        verbs.score("no model", ["arithmetic", "fact"])


def test_a_combined_source_is_found_again(tmp_path: Path) -> None:
    task = both(load_task("facts"), load_task("order"), 0.5)
    assert sources_of(task.source) == ["facts", "order=0.5"]
    assert task_of_origin(task.source).digest == task.digest
    assert sources_of("facts") == ["facts"] and sources_of("[1]") == ["[1]"]
    assert portable(json.dumps([str(tmp_path / "x.jsonl"), "facts"])) == '["x.jsonl", "facts"]'
    with pytest.raises(TaskError, match="give it with --task"):
        task_of_origin('["facts", "gone.jsonl"]')


# Rows


def rows_of(part: str, weight: float, count: int, length: int = 6) -> list[Encoded]:
    chance = random.Random(f"{part}{count}")
    return [
        Encoded(
            tuple(chance.randrange(1, 40) for _ in range(length)), length - 2,
            Example(f"{part} {i}", "", f"{part}: {i % 2}"), part, weight,
        )
        for i in range(count)
    ]  # fmt: skip


def test_rows_take_turns_and_know_their_share() -> None:
    a, b = rows_of("a", 1.0, 5), rows_of("b", 0.5, 2)
    rows = in_turn([a, b])
    assert [row.part for row in rows] == ["a", "b", "a", "b", "a", "a", "a"]
    assert by_part(rows) == [("a", pytest.approx(2 / 3), a), ("b", pytest.approx(1 / 3), b)]
    assert [row.part for row in first(rows, 2)] == ["a", "b", "a", "b"]
    plain = [replace(row, part="", weight=1.0) for row in a]
    assert by_part(plain) == [("", 1.0, plain)]


def test_a_balanced_choice_takes_groups_alike_and_keeps_the_order() -> None:
    sizes = {"rare": 3, "some": 10, "often": 40}
    groups = [group for group, size in sizes.items() for _ in range(size)]
    random.Random(0).shuffle(groups)
    rows = [
        Encoded((1, 2), 1, Example(str(i), "", group), part=part, weight=1.0)
        for i, group in enumerate(groups)
        for part in ("a", "b")
    ]
    for count, want in (
        (9, {"rare": 3, "some": 3, "often": 3}),
        (21, {"rare": 3, "some": 9, "often": 9}),
        (99, sizes),
    ):
        found = balanced(rows, count)
        for part in ("a", "b"):
            own = [row for row in found if row.part == part]
            assert Counter(row.example.group for row in own) == want
            # Of a group, the first in canonical order.
            for group, size in want.items():
                every = [row for row in rows if (row.part, row.example.group) == (part, group)]
                assert [row for row in own if row.example.group == group] == every[:size]
        assert [rows.index(row) for row in found] == sorted(rows.index(row) for row in found)
        assert balanced(found, 6) == balanced(rows, 6), "fewer of few are fewer of all"


@pytest.mark.parametrize("weights", [(1.0, 0.25), (1.0, 1.0), (0.3, 0.1)])
def test_tuning_draws_each_task_by_its_weight(weights: tuple[float, float]) -> None:
    rows = in_turn([rows_of("a", weights[0], 30), rows_of("b", weights[1], 7)])
    draw = Draw(rows, torch.Generator().manual_seed(0))
    drawn: list[Encoded] = []
    share = weights[1] / sum(weights)
    for _ in range(40):
        drawn += draw.some(5)
        count = sum(row.part == "b" for row in drawn)
        assert abs(count - share * len(drawn)) <= 1 + 1e-6
    for group, size in (("b: 0", 4), ("b: 1", 3)):
        of_b = Counter(row.example.prompt for row in drawn if row.example.group == group)
        assert len(of_b) == size and max(of_b.values()) - min(of_b.values()) <= 1
    groups = Counter(row.example.group for row in drawn if row.part == "a")
    assert abs(groups["a: 0"] - groups["a: 1"]) <= 1


def test_one_tasks_draw_does_not_know_of_weights() -> None:
    plain = [replace(row, part="", weight=1.0) for row in rows_of("a", 1.0, 9)]
    heavy = [replace(row, part="a", weight=7.0) for row in plain]
    drawn = [
        [row.example for row in Draw(rows, torch.Generator().manual_seed(3)).some(40)]
        for rows in (plain, heavy)
    ]
    assert drawn[0] == drawn[1]


def test_accuracy_is_the_mean_over_the_tasks() -> None:
    found = Accuracy({"a: x": (90, 100), "b: y": (5, 10)}, {"a": (0.5, 90, 100), "b": (0.5, 5, 10)})
    assert found.value == pytest.approx(0.7)
    assert found.interval[1] - found.interval[0] > 0.2, "ten examples tell little"
    plain = Accuracy({"x": (140, 200)})
    even = Accuracy({}, {"a": (0.5, 80, 100), "b": (0.5, 60, 100)})
    assert even.value == pytest.approx(plain.value)
    assert even.interval == pytest.approx(wilson(140, 200))


def test_means_and_scores_are_the_mean_of_what_each_task_gives() -> None:
    decoder = Decoder(dense("llama"), None)  # type: ignore[arg-type]
    a, b = rows_of("a", 1.0, 12), rows_of("b", 0.5, 3, 9)
    mixed = in_turn([a, b])
    kept = tuple((0, 1) for _ in range(decoder.n_layers)), decoder.layout.neurons
    one, other, found, turned = (
        mean_compensation(decoder, *kept, rows, OPTIONS) for rows in (a, b, mixed, mixed[::-1])
    )
    for x, y, got, again in zip(
        one.attention, other.attention, found.attention, turned.attention, strict=True
    ):
        assert x is not None and y is not None and got is not None and again is not None
        torch.testing.assert_close(got, (2 * x + y) / 3)
        torch.testing.assert_close(got, again)
        assert not torch.allclose(x, y)

    def score(rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([float(sum(row.ids)) for row in rows]).mean()
        return ids * torch.ones(2, 3), torch.full((2, 3), torch.nan)

    heads, neurons = weighted(score, mixed)
    torch.testing.assert_close(heads, (2 * score(a)[0] + score(b)[0]) / 3)
    assert neurons.isnan().all(), "what is absent stays absent"
    alone = weighted(score, a)[0]
    assert torch.equal(alone, score(a)[0])


def test_least_squares_counts_tasks_by_weight() -> None:
    decoder = Decoder(dense("gpt2"), None)  # type: ignore[arg-type]
    a, b = rows_of("a", 1.0, 40), rows_of("b", 1.0, 40, 9)
    kept = tuple((0,) for _ in range(decoder.n_layers)), decoder.layout.neurons
    small = shrink(decoder, *kept, a, OPTIONS)

    def refitted(rows: list[Encoded]) -> dict[str, torch.Tensor]:
        return refit(small, decoder, rows, OPTIONS, 1e-3).model.state_dict()

    def off(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
        return float(sum((found[k] - want[k]).square().sum() for k in want))

    alone = refitted([replace(row, part="", weight=1.0) for row in a])
    assert off(refitted(a), alone) == 0
    near = [
        off(refitted(in_turn([a, [replace(row, weight=w) for row in b]])), alone)
        for w in (1e-6, 0.1, 1.0, 10.0)
    ]
    assert near == sorted(near) and near[0] < 0.01 * near[-1]
    # Twice as many examples of a task weigh no more.
    twice = refitted(in_turn([a + a, b]))
    once = refitted(in_turn([a, b]))
    assert off(twice, once) < 1e-3 * off(once, alone)


# The whole line


@pytest.fixture(scope="module")
def mathgpt(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "mathgpt-4l4h")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Sums of small and of large numbers, two tasks."""
    folder, chance, paths = tmp_path_factory.mktemp("tasks"), random.Random(0), []
    for name, low, high in (("low", 0, 200), ("high", 600, 999)):
        drawn = sorted({(chance.randint(low, high), chance.randint(low, high)) for _ in range(400)})
        rows = [{"prompt": f"{a:03d}{b:03d}", "answer": f"{a + b:04d}"} for a, b in drawn]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    return str(paths[0]), str(paths[1])


def test_scores_of_tasks_are_the_mean_of_each_alone(mathgpt: str, sums: tuple[str, str]) -> None:
    one, other = (verbs.score(mathgpt, task, limit=16) for task in sums)
    found = verbs.score(mathgpt, list(sums), limit=16)
    turned = verbs.score(mathgpt, sums[::-1], limit=16)
    single = verbs.score(mathgpt, [sums[0]], limit=16)
    torch.testing.assert_close(found.heads, (one.heads + other.heads) / 2)
    torch.testing.assert_close(found.neurons, (one.neurons + other.neurons) / 2)
    assert not torch.allclose(one.heads, other.heads)
    assert (found.digest, single.digest) == (turned.digest, one.digest)
    assert found.metadata["task"] == "high+low"
    assert found.metadata["examples"] == "32"
    assert sources_of(found.metadata["task_source"]) == [sums[1], sums[0]]
    plan = verbs.plan(found, keep_heads="75%", max_drop=5.0, limit=16)
    assert sources_of(plan.task_source) == ["high.jsonl", "low.jsonl"]
    with pytest.raises(PlanError, match="--top-neurons finds the best of one task"):
        verbs.score(mathgpt, list(sums), limit=4, top_neurons=3)


def test_prune_for_two_tasks_shows_both(
    mathgpt: str, sums: tuple[str, str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "keep_heads": "75%", "keep_neurons": "75%", "recover": "least-squares",
        "select": "one-shot", **QUICK,
    }  # fmt: skip
    found = verbs.prune(mathgpt, task=sums, out=tmp_path / "p", **settings)
    assert found.task == "high+low"
    rows = found.pruned.tasks
    assert set(rows) == {"high", "low"}
    assert found.pruned.accuracy == pytest.approx(sum(r["accuracy"] for r in rows.values()) / 2)
    assert Comparison.from_json((tmp_path / "p" / "evaluation.json").read_text()) == found
    assert "| task: high |" in (tmp_path / "p" / "README.md").read_text()
    again = verbs.evaluate(str(tmp_path / "p"), sums[::-1], **QUICK)
    assert again.tasks == rows
    plan = Plan.load(tmp_path / "p" / "plan.json")
    assert plan.task == "high+low" and str(Path(sums[0]).parent) not in plan.to_json()
    with pytest.raises(TaskError, match="give it with --task"):
        verbs.apply(mathgpt, plan, tmp_path / "a", recover="mean", limit=48)
    verbs.apply(mathgpt, plan, tmp_path / "a", task=sums, recover="least-squares", limit=48)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "pa"]
    assert files[0] == files[1]
    shown = CliRunner().invoke(
        main, ["eval", str(tmp_path / "p"), "--task", sums[0], "--task", sums[1], "--no-speed",
               "--limit", "16"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    for text in ("task: high+low", "accuracy, task: high", "accuracy, task: low"):
        assert text in shown.stdout


def test_a_weight_makes_a_retained_task_take_part(
    mathgpt: str, sums: tuple[str, str], tmp_path: Path
) -> None:
    low, high = sums
    settings: dict[str, Any] = {"keep_heads": "50%", "keep_neurons": "50%", "recover": "mean"}
    found: dict[str, Comparison] = {}
    plans: dict[str, Plan] = {}
    for name, retain in (
        ("none", []), ("plain", [high]), ("zero", [f"{high}=0"]), ("half", [f"{high}=0.5"]),
        ("one", [(load_task(high), 1.0)]),
    ):  # fmt: skip
        found[name] = verbs.prune(
            mathgpt, task=low, retain=retain, out=tmp_path / name, **settings, **QUICK
        )
        plans[name] = Plan.load(tmp_path / name / "plan.json")
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in found}
    assert weights["none"] == weights["plain"] == weights["zero"]
    assert plans["none"] == plans["zero"]
    assert weights["half"] != weights["none"]
    assert set(found["zero"].pruned.retained) == set(found["half"].pruned.retained) == {"high"}
    assert found["half"].task == "low" and not found["half"].pruned.tasks
    assert plans["half"].task == "high=0.5+low"
    assert sources_of(plans["half"].task_source) == ["high.jsonl=0.5", "low.jsonl"]
    # A task to retain by weight 1 is a second task.
    verbs.prune(mathgpt, task=sums, out=tmp_path / "both", **settings, **QUICK)
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == weights["one"]


def test_a_sweep_for_two_tasks_and_one_to_retain(
    mathgpt: str, sums: tuple[str, str], tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        main,
        ["sweep", "--model", mathgpt, "--task", sums[0], "--task", sums[1], "--heads", "50%",
         "--recover", "least-squares", "--retain", "arithmetic/padded=0.25", "--limit", "16",
         "--no-speed", "--out", str(tmp_path / "f")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "retained: arithmetic/padded" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "f" / "frontier.json").read_text())
    (point,) = found["points"]
    assert point["accuracy"] == pytest.approx(sum(point["tasks"].values()) / 2)
    assert set(point["retained"]) == {"arithmetic/padded"}
    plan = Plan.load(tmp_path / "f" / point["plan"])
    assert sources_of(plan.task_source)[0] == "arithmetic/padded=0.25"


def test_each_task_is_fitted_to_the_model(mathgpt: str, sums: tuple[str, str]) -> None:
    from prune_edit.loading import load_decoder

    decoder = load_decoder(mathgpt)
    notes: list[str] = []
    task = both(load_task("arithmetic/add"), load_task(sums[0]), 0.5)
    fitted = fit_task(task, decoder, OPTIONS, notes.append)
    assert fitted.name == "arithmetic/padded+low=0.5"
    assert len(notes) == 1
    with pytest.raises(TaskError, match="two tasks are named 'arithmetic/padded'"):
        fit_task(both(load_task("arithmetic/add"), load_task("arithmetic")), decoder, OPTIONS)
