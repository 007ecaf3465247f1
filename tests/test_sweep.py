"""The frontier: every point is a model that its plan makes, measured as `eval` would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from prune_edit import plots, verbs
from prune_edit.checkpoint.locking import lock_path
from prune_edit.cli import main
from prune_edit.errors import BudgetError, OutputExistsError
from prune_edit.frontier import Frontier, Point
from prune_edit.planning import Plan
from prune_edit.recover.gradual import Schedule
from prune_edit.recover.tuning import Tuning

PADDED = "arithmetic/padded"


@pytest.fixture(scope="module")
def mathgpt(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "mathgpt-4l4h")


@pytest.fixture(scope="module")
def swept(mathgpt: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Frontier, Path]:
    out = tmp_path_factory.mktemp("sweep") / "frontier"
    found = verbs.sweep(
        mathgpt, task=PADDED, heads=("75%", 4, "50%"), neurons=("all", "50%"), random=2,
        recover="mean", limit=64, speed=False, out=out,
    )  # fmt: skip
    return found, out


def test_points_are_every_budget_largest_first(swept: tuple[Frontier, Path]) -> None:
    found, out = swept
    assert [(p.heads, p.neurons) for p in found.points] == [
        (heads, neurons) for neurons in (2048, 1024) for heads in (12, 8, 4)
    ]
    assert (found.dense.heads, found.dense.neurons) == (16, 2048)
    assert found.dense.accuracy > 0.9
    for point in found.points:
        assert point.parameters < found.dense.parameters
        assert point.flops_per_token < found.dense.flops_per_token
        assert point.interval[0] <= point.accuracy <= point.interval[1]
        assert len(point.random) == 2
        plan = Plan.load(out / point.plan)
        assert (plan.kept_heads, plan.kept_neurons) == (point.heads, point.neurons)
    best, worst = found.points[0], found.points[-1]
    assert best.accuracy > worst.accuracy
    assert best.accuracy > max(best.random)
    assert not list(out.parent.glob(".*")), "stages stayed behind"


def test_a_points_plan_makes_its_model(
    mathgpt: str, swept: tuple[Frontier, Path], tmp_path: Path
) -> None:
    found, out = swept
    point = found.points[0]
    plan = Plan.load(out / point.plan)
    verbs.apply(mathgpt, plan, tmp_path / "slim", recover="mean", limit=64)
    measured = verbs.evaluate(str(tmp_path / "slim"), PADDED, limit=64, speed=False)
    assert measured.accuracy == pytest.approx(point.accuracy)
    assert measured.parameters == point.parameters


def test_the_file_and_the_pictures_are_the_values(swept: tuple[Frontier, Path]) -> None:
    found, out = swept
    assert json.loads((out / "frontier.json").read_text()) == json.loads(found.to_json())
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (out / "frontier.svg").read_text()
    assert "parameters (millions)" not in drawn or drawn.startswith("<?xml")
    again = plots.draw_frontier(found, out.parent)
    assert again[1].read_bytes() == (out / "frontier.svg").read_bytes()


def point(parameters: int, validation: float) -> Point:
    return Point(1, 1, validation, (0.0, 1.0), validation, parameters, 1)


def test_the_knee_is_where_accuracy_begins_to_go() -> None:
    dense = point(100, 1.0)
    points = tuple(point(*each) for each in ((80, 0.99), (60, 0.97), (40, 0.5), (20, 0.1)))
    frontier = Frontier("m", "t", "cna", "mean", dense, points)
    assert frontier.knee == points[1]
    # Where nothing is lost the smallest is best, where everything goes at once the dense model.
    flat = replace(frontier, points=tuple(point(size, 1.0) for size in (80, 20)))
    assert flat.knee.parameters == 20
    steep = replace(frontier, points=tuple(point(size, 0.0) for size in (99, 20)))
    assert steep.knee == dense


def test_a_tuned_sweep_goes_on_where_it_was_killed(
    mathgpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = Tuning(steps=2, batch=16)
    settings: dict[str, Any] = {
        "task": PADDED, "heads": ("50%", "25%"), "neurons": ("all", "50%"), "limit": 32,
        "speed": False,
        "schedule": Schedule(round_tuning=brief, final_tuning=brief, neuron_tuning=brief),
    }  # fmt: skip
    whole = verbs.sweep(mathgpt, out=tmp_path / "whole", **settings)
    assert whole.recover == "full"
    seen: list[str] = []

    def stop(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verbs.sweep(mathgpt, out=tmp_path / "cut", note=stop, **settings)
    assert not (tmp_path / "cut").exists()
    tuned: list[str] = []
    from prune_edit.recover import gradual

    real = gradual.tune

    def watched(*args: Any, **kwargs: Any) -> Any:
        tuned.append(kwargs["stage"])
        return real(*args, **kwargs)

    monkeypatch.setattr(gradual, "tune", watched)
    again = verbs.sweep(mathgpt, out=tmp_path / "cut", **settings)
    assert tuned == [], "every round and every point that was tuned is there"
    for one, two in zip(whole.points, again.points, strict=True):
        assert one == two
        assert (tmp_path / "whole" / one.plan).read_bytes() == (
            tmp_path / "cut" / two.plan
        ).read_bytes()


def test_the_command_shows_a_table_and_the_knee(mathgpt: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        ["sweep", "--model", mathgpt, "--task", PADDED, "--heads", "75%, 50%", "--recover", "none",
         "--limit", "32", "--no-speed", "--out", str(tmp_path / "f")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "knee" in done.stdout and "dense" in done.stdout
    assert "prune-edit apply" in done.stdout.replace("\n", " ")


def test_a_frontier_replaces_a_frontier_alone(mathgpt: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task": PADDED, "recover": "none", "limit": 16, "speed": False}
    for heads in ("75%", 8):
        found = verbs.sweep(mathgpt, heads=heads, out=tmp_path / "f", overwrite=True, **settings)
    assert [point.heads for point in found.points] == [8]
    assert len(list((tmp_path / "f").glob("plan-*.json"))) == 1
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"has no frontier\.json"):
        verbs.sweep(mathgpt, heads=8, out=tmp_path / "model", overwrite=True, **settings)


def test_one_step_is_one_step_of_prune(mathgpt: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "task": PADDED, "recover": "least-squares", "select": "one-shot", "limit": 32,
        "speed": False,
    }  # fmt: skip
    timed = {**settings, "speed": True}
    found = verbs.sweep(mathgpt, heads="50%", neurons="50%", out=tmp_path / "f", **timed)
    speed = found.points[0].speed
    assert speed is not None and min(speed.values()) > 0
    assert set(speed) == {
        f"{phase} batch_{size}" for phase in ("prefill", "decode") for size in (1, 32)
    }
    pruned = verbs.prune(
        mathgpt, keep_heads="50%", keep_neurons="50%", out=tmp_path / "p", **settings
    )
    assert found.points[0].accuracy == pytest.approx(pruned.pruned.accuracy)
    plans = [
        Plan.load(tmp_path / "f" / found.points[0].plan), Plan.load(tmp_path / "p" / "plan.json")
    ]  # fmt: skip
    assert (plans[0].heads, plans[0].neurons) == (plans[1].heads, plans[1].neurons)


def test_bad_budgets_leave_nothing(mathgpt: str, tmp_path: Path) -> None:
    for heads, text in (("101%", "--heads 101%"), ("17", "has only 16"), ("a", "is not a budget")):
        with pytest.raises(BudgetError, match=text):
            verbs.sweep(mathgpt, task=PADDED, heads=(heads,), out=tmp_path / "f")
    assert CliRunner().invoke(main, ["sweep", "--heads", " , "]).exit_code == 2
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputExistsError):
        verbs.sweep(mathgpt, task=PADDED, out=tmp_path / "f")


def test_a_second_run_is_refused_before_it_works(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "frontier"
    with lock_path(out).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="is being written by another run"):
            verbs.sweep("a/model/that/is/not/there", out=out)
