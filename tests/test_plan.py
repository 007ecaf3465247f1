"""Budgets and plans: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_edit.errors import BudgetError, PlanError
from prune_edit.planning import (
    Budget,
    Plan,
    keep_neurons,
    keep_top,
    neurons_that_stay,
    parse_layers,
    split_layers,
    within_layers,
)

FLAG = "--keep-heads"


# Budgets


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [
        ("5%", 128, 6),
        ("5%", 160, 8),
        ("5%", 1, 1),
        ("0.1%", 128, 1),
        ("100%", 128, 128),
        ("33.4%", 1000, 334),
        ("7%", 100, 7),  # 0.07 * 100 is 7.000000000000001
        ("29%", 100, 29),  # 0.29 * 100 is 28.999999999999996
        (" 12 ", 128, 12),
        ("128", 128, 128),
        ("1", 128, 1),
        ("all", 128, 128),
        ("ALL", 3, 3),
    ],
)
def test_a_budget_is_a_share_a_count_or_all(text: str, total: int, count: int) -> None:
    assert Budget.parse(text, FLAG).of(total, FLAG) == count


def test_every_whole_percentage_is_exact() -> None:
    for percent in range(1, 101):
        for total in (100, 128, 160, 1000, 11_008):
            got = Budget.parse(f"{percent}%", FLAG).of(total, FLAG)
            assert got == max(1, percent * total // 100)


@pytest.mark.parametrize("text", ["abc", "", "%", "5 %%", "1.5", "1e3", "--", "five", "5%5"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text, FLAG)
    assert str(caught.value) == (
        f"--keep-heads {text!r} is not a budget; give a share such as 5%, a count such as 12, "
        "or all"
    )


@pytest.mark.parametrize("text", ["0%", "150%", "-5%", "100.1%", "nan%", "inf%"])
def test_a_share_is_above_0_and_at_most_100(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text, "--keep-neurons")
    assert str(caught.value) == (
        f"--keep-neurons {text}: a share must be above 0% and at most 100%"
    )


@pytest.mark.parametrize("text", ["0", "-3"])
def test_a_count_is_positive(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text, FLAG)
    assert str(caught.value) == f"--keep-heads {text}: at least one unit must stay"


def test_more_units_than_there_are() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("129", FLAG).of(128, FLAG)
    assert str(caught.value) == (
        "--keep-heads 129: the model has only 128; give at most that, or all"
    )
    assert caught.value.exit_code == 7


# The choice


def test_the_best_are_kept() -> None:
    scores = torch.tensor([[0.1, 5.0, -1.0], [3.0, 0.2, 4.0]])
    assert keep_top(scores, 1) == ((1,), ())
    assert keep_top(scores, 3) == ((1,), (0, 2))
    assert keep_top(scores, 5) == ((0, 1), (0, 1, 2))
    assert keep_top(scores, 6) == ((0, 1, 2), (0, 1, 2))


def test_ties_go_to_the_first() -> None:
    assert keep_top(torch.zeros(2, 3), 4) == ((0, 1, 2), (0,))
    assert keep_top(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), 4) == ((0, 1), (0, 2))


def test_absent_units_are_never_kept() -> None:
    nan = math.nan
    scores = torch.tensor([[nan, -9.0, nan], [-math.inf, nan, math.inf]])
    assert keep_top(scores, 1) == ((), (2,))
    assert keep_top(scores, 3) == ((1,), (0, 2))
    with pytest.raises(BudgetError) as caught:
        keep_top(scores, 4)
    assert str(caught.value) == "4 units are to be kept, but the model has only 3"


def test_flat_numbers_become_layers() -> None:
    assert split_layers([7, 0, 4, 3], 3, 4) == ((0, 3), (0, 3), ())


# Layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("4-7", (4, 5, 6, 7)),
        ("0", (0,)),
        (" 5-6, 2 ,0", (0, 2, 5, 6)),
        ("1-3,2-4", (1, 2, 3, 4)),
        ("3-3", (3,)),
        ("all", None),
        ("ALL", None),
    ],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text, "--neuron-layers", 8) == layers
    assert parse_layers(text, "--neuron-layers") == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-2-3", "1.5", "²"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_layers(text, "--neuron-layers")
    assert str(caught.value) == (
        f"--neuron-layers {text!r} names no layers; give some such as 4-7 or 0,2,5-7, or all"
    )


def test_layers_that_go_down_or_are_not_there_are_refused() -> None:
    with pytest.raises(BudgetError, match="--neuron-layers 7-4: 7-4 goes down; give 4-7"):
        parse_layers("7-4", "--neuron-layers")
    with pytest.raises(BudgetError, match="the model has layers 0 to 7, and no layer 8"):
        parse_layers("4-8", "--neuron-layers", 8)


def test_neurons_of_other_layers_all_stay() -> None:
    scores = torch.tensor([[0.1, math.nan, 0.2], [-3.0, 0.2, 4.0], [1.0, 2.0, math.nan]])
    given = scores.clone()
    spared = within_layers(scores, (1, 2))
    assert keep_neurons(scores, 4) == ((), (0, 2), (0, 1))
    assert keep_neurons(spared, 4) == ((0, 2), (0, 2), ())
    assert keep_neurons(spared, 1) == ((0, 2), (), ()), "also where they are more than asked"
    assert keep_neurons(within_layers(scores, None), 4) == keep_neurons(scores, 4)
    assert torch.equal(scores.nan_to_num(7), given.nan_to_num(7)), "the scores were changed"


def test_a_share_of_neurons_is_one_of_their_layers() -> None:
    half, some = Budget.parse("50%", FLAG), Budget.parse("3", FLAG)
    assert neurons_that_stay(half, [4, 10, 6], (1, 2), FLAG) == 4 + 8
    assert neurons_that_stay(half, [4, 10, 6], None, FLAG) == 10
    assert neurons_that_stay(some, [4, 10, 6], (2,), FLAG) == 14 + 3
    with pytest.raises(BudgetError, match="the model has only 6"):
        neurons_that_stay(Budget.parse("7", FLAG), [4, 10, 6], (2,), FLAG)


# Plans


def some_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "heads": ((0, 2), (), (3,)),
        "neurons": ((), (1, 2, 9), (0,)),
        "n_heads": 4,
        "n_neurons": 10,
        "method": "cna",
        "task": "arithmetic",
        "task_source": "",
        "task_digest": "",
        "model_digest": "abc",
        "scores_digest": "def",
        "seed": 3,
    }
    return Plan(**{**fields, **changes})


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = some_plan()
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    (tmp_path / "plan.json").write_text(text)
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")).digest == plan.digest


def test_a_plan_can_be_read_by_a_person() -> None:
    text = some_plan().to_json()
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "n_heads": 4,
        "n_neurons": 10,
        "method": "cna",
        "task": "arithmetic",
        "task_source": "",
        "task_digest": "",
        "model_digest": "abc",
        "scores_digest": "def",
        "seed": 3,
        "schema": 1,
        "layers": [
            {"heads": [0, 2], "neurons": []},
            {"heads": [], "neurons": [1, 2, 9]},
            {"heads": [3], "neurons": [0]},
        ],
    }


def test_a_plan_counts() -> None:
    plan = some_plan()
    assert (plan.n_layers, plan.kept_heads, plan.kept_neurons) == (3, 3, 4)


def test_the_digest_follows_the_plan() -> None:
    plans = [
        some_plan(),
        some_plan(heads=((0, 1), (), (3,))),
        some_plan(neurons=((), (1, 2, 8), (0,))),
        some_plan(seed=4),
        some_plan(method="random"),
        some_plan(scores_digest="deg"),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert some_plan().digest == plans[0].digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ((2, 0), (), (3,))}, "plan: heads of layer 0 are not ascending and distinct"),
        (
            {"neurons": ((), (1, 1), (0,))},
            "plan: neurons of layer 1 are not ascending and distinct",
        ),
        (
            {"heads": ((0,), (), (4,))},
            "plan: heads of layer 2 name unit 4, but a layer of the base model has 4",
        ),
        (
            {"neurons": ((), (-1, 3), (0,))},
            "plan: neurons of layer 1 name unit -1, but a layer of the base model has 10",
        ),
        (
            {"neurons": ((), (1,))},
            "plan: heads are given for 3 layers, neurons for 2",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        some_plan(**changes)
    assert str(caught.value) == message


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(some_plan().to_json()), **changes})


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_another_schema_is_refused(schema: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(edited(schema=schema), "old/plan.json")
    assert str(caught.value) == (
        f"old/plan.json: plan schema {schema}, this version reads 1; make the plan again"
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", None),
        ("3", None),
        ("null", None),
        ("{}", "'layers'"),
        (edited(layers=3), None),
        (edited(layers=[{"heads": [0]}]), "'neurons'"),
        (edited(layers=[[0], [1]]), None),
        (edited(n_heads="4"), None),
        (edited(colour="red"), "Plan.__init__() got an unexpected keyword argument 'colour'"),
        ("[" * 100_000, None),
    ],
)
def test_what_is_no_plan_is_refused(text: str, cause: str | None) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "x.json")
    message = str(caught.value)
    assert message.startswith("x.json is not a plan.json: ")
    assert "\n" not in message
    if cause is not None:
        assert message == f"x.json is not a plan.json: {cause}"


@pytest.mark.parametrize("unit", ["0", [0], 0.5, True, None])
def test_units_are_whole_numbers(unit: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(
            edited(layers=[{"heads": [], "neurons": []}, {"heads": [unit], "neurons": []}])
        )
    assert str(caught.value) == "plan: heads of layer 1 are not whole numbers"


def test_a_plan_of_units_that_are_not_there_is_refused_from_its_file() -> None:
    layers = json.loads(some_plan().to_json())["layers"]
    layers[2]["heads"] = [4]
    with pytest.raises(PlanError, match="heads of layer 2 name unit 4"):
        Plan.from_json(edited(layers=layers))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^plan .*none\.json cannot be read: .*No such file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"^plan .*bytes\.json cannot be read: 'utf-8' codec"):
        Plan.load(tmp_path / "bytes.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)
