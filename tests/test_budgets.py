"""One budget, alignment and KV groups through the verbs, on real models and small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_checkpoint import dense
from test_methods import OPTIONS, PROMPTS, encoded, pico
from test_verbs import BRIEF, QUICK, story_task

from prune_edit import verbs
from prune_edit.costs import Costs, counted_costs
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, PlanError, PruneEditError
from prune_edit.evaluation.cost import count_parameters
from prune_edit.layout import Kept, Layout
from prune_edit.loading import load_decoder
from prune_edit.planning import Plan
from prune_edit.recover.gradual import Rounds, Schedule, gradual_cost
from prune_edit.recover.shrink import shrink
from prune_edit.recover.trade import trade
from prune_edit.rules import Rules, budget_of, widths_of
from prune_edit.running import answer_log_probs
from prune_edit.scoring import METHODS
from prune_edit.scoring.blocks import block_worths, worth_of
from prune_edit.scoring.scores import Scores
from prune_edit.scoring.statistics import moments
from prune_edit.tasks.prompts import batches
from prune_edit.verbs import budgets as budgets_room
from prune_edit.workspace import Workspace


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def scored(stories: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Scores]:
    task = story_task(tmp_path_factory.mktemp("task"))
    return task, verbs.score(stories, task, method="circuit", limit=16)


# What many units are worth together


@pytest.mark.parametrize("by_mean", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_worth_is_that_of_the_model_without_the_units(name: str, by_mean: bool) -> None:
    decoder, rows = pico(name), encoded(PROMPTS)
    layout = decoder.layout
    heads = tuple(kept[::2] for kept in layout.heads)
    neurons = (*layout.neurons[:-1], layout.neurons[-1][1:3])
    means = moments(decoder, rows, OPTIONS, "means") if by_mean else None
    every = layout.heads, layout.neurons
    for kept in (every, (heads, layout.neurons), (layout.heads, neurons)):
        small = shrink(decoder, *kept, rows if by_mean else None, OPTIONS)
        want = 0.0
        with torch.no_grad():
            for _, batch in batches(rows, 4096):
                states = small.final_states(**batch.inputs)[batch.rows, batch.columns]
                want += float(answer_log_probs(small, states, batch.targets).sum())
        got = worth_of(decoder, rows, OPTIONS, *kept, means)
        assert got == pytest.approx(want / len(rows), abs=1e-4)
    assert worth_of(decoder, rows, OPTIONS, heads, neurons) != pytest.approx(
        worth_of(decoder, rows, OPTIONS, *every)
    )


def test_every_block_that_is_there_has_a_worth() -> None:
    decoder, rows = pico("llama-gqa"), encoded(PROMPTS)
    found = block_worths(decoder, rows, OPTIONS)
    have = decoder.layout
    assert set(found) == {
        (layer, part)
        for part, kept in enumerate((have.heads, have.neurons))
        for layer, units in enumerate(kept)
        if units
    }
    layer, part = min(found)
    assert part == 0
    without = tuple(() if i == layer else kept for i, kept in enumerate(have.heads))
    assert found[layer, 0] == worth_of(decoder, rows, OPTIONS, without, have.neurons)


# The trade


def rules_for(decoder: Decoder, share: float, **changes: Any) -> Rules:
    layout = decoder.layout
    costs = counted_costs(decoder, "parameters")
    budget = budget_of(share, costs, layout.heads, layout.neurons)
    group = layout.n_heads // layout.n_kv_heads
    widths = widths_of(layout.neurons)
    return Rules(widths=widths, group_size=group, costs=costs, budget=budget, **changes)


def fresh(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["cna", "circuit", "taylor", "wanda", "random"])
def test_any_ranking_trades_within_the_budget(method: str) -> None:
    decoder, rows = fresh("llama-gqa"), encoded(PROMPTS)
    scores = METHODS[method](decoder, rows, OPTIONS)
    for share in (0.3, 0.7):
        rules = rules_for(decoder, share)
        kept = trade(decoder, rows, scores, rules, OPTIONS)
        assert rules.costs is not None and rules.budget is not None
        assert 0.6 * rules.budget < rules.costs.of_units(*kept) <= rules.budget
        assert kept == trade(decoder, rows, scores, rules, OPTIONS)


def test_whole_blocks_go_only_where_the_answers_gain() -> None:
    decoder, rows = fresh("llama"), encoded(PROMPTS)
    scores = METHODS["taylor"](decoder, rows, OPTIONS)
    means = moments(decoder, rows, OPTIONS, "means")
    worths = []
    for whole in (False, True):
        rules = rules_for(decoder, 0.4, whole_blocks=whole)
        kept = trade(decoder, rows, scores, rules, OPTIONS)
        assert rules.costs is not None and rules.budget is not None
        assert rules.costs.of_units(*kept) <= rules.budget
        worths.append(worth_of(decoder, rows, OPTIONS, *kept, means))
    assert worths[1] >= worths[0]


@pytest.mark.parametrize("recover", ["mean", "least-squares"])
def test_rounds_end_at_the_budget_aligned(recover: str) -> None:
    decoder, rows = fresh("llama-gqa"), encoded(PROMPTS)
    rules = rules_for(decoder, 0.4, align=4, kv="keep-groups")
    schedule = Schedule(recover=recover, keep_share=0.7)
    seen: list[Kept] = []

    class Watched(Workspace):
        def save_model(self, name: str, decoder: Decoder) -> None:
            seen.append(decoder.layout.neurons)

    rounds = Rounds(decoder, rows, "cna", OPTIONS, schedule, Watched(), rules=rules)
    small = gradual_cost(rounds)
    assert rules.costs is not None and rules.budget is not None
    assert len(seen) == 3  # 0.7 ** 3 < 0.4
    assert any(len(kept) % 4 for kept in seen[0]), "only the last round is aligned"
    assert all(len(kept) % 4 == 0 for kept in small.layout.neurons)
    assert rules.costs.of(small.layout) <= rules.budget
    assert None not in [slot for slots in small.layout.slots for slot in slots]


# Scores that see both ends


def test_circuit_is_shares_of_both_sides() -> None:
    decoder, rows = pico("llama-gqa"), encoded(PROMPTS)
    heads, neurons = METHODS["circuit"](decoder, rows, OPTIONS)
    want, direct = METHODS["cna"](decoder, rows, OPTIONS)
    _, brought = METHODS["query"](decoder, rows, OPTIONS)
    torch.testing.assert_close(heads, want, equal_nan=True)
    shares = [part.abs() / part.abs().nansum() for part in (direct, brought)]
    torch.testing.assert_close(neurons, shares[0] + shares[1], equal_nan=True)
    assert float(neurons.nansum()) == pytest.approx(2.0, abs=1e-5)


# Plan and prune


def test_plan_keeps_a_budget_and_says_so(
    stories: str, scored: tuple[str, Scores], tmp_path: Path
) -> None:
    task, scores = scored
    decoder = load_decoder(stories)
    for kind in ("parameters", "flops", "bytes"):
        plan = verbs.plan(scores, budget="40%", budget_of=kind, task=task, limit=16)
        costs = counted_costs(decoder, kind)
        share = costs.of_units(plan.heads, plan.neurons) / costs.of(decoder.layout)
        assert 0.38 < share <= 0.4
        assert plan.budget == f"40% of {kind}"
        assert Plan.from_json(plan.to_json()) == plan
    out = tmp_path / "slim"
    verbs.apply(stories, plan, out, task=task, recover="none", limit=16)
    gone = count_parameters(decoder) - count_parameters(load_decoder(out))
    counted = counted_costs(decoder, "parameters")
    kept = counted.of_units(plan.heads, plan.neurons)
    assert gone == counted.of(decoder.layout) - kept


def test_measured_costs_stand_in_the_plan(
    scored: tuple[str, Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, scores = scored

    def measured(decoder: Decoder, **_: Any) -> Costs:
        layers = decoder.n_layers
        each = [(value,) * layers for value in (0.25, 0.5, 0.125, 2.0, 1.0)]
        return Costs("latency", 2, *each)

    monkeypatch.setattr(budgets_room, "measure_latency", measured)
    plan = verbs.plan(scores, budget="50%", budget_of="latency", task=task, limit=16)
    assert plan.costs == {
        "kind": "latency", "group_size": 2, "slot": 0.25, "group": 0.5, "neuron": 0.125,
        "attention": 2.0, "ffn": 1.0,
    }  # fmt: skip
    assert json.loads(plan.to_json())["costs"]["slot"] == 0.25
    assert Plan.from_json(plan.to_json()) == plan


def test_whole_groups_leave_no_pads(scored: tuple[str, Scores], stories: str) -> None:
    _, scores = scored
    base = load_decoder(stories).layout
    kept = {}
    for kv in ("pad", "keep-groups"):
        plan = verbs.plan(scores, keep_heads="50%", keep_neurons="50%", kv=kv)
        layout = Layout(base.n_heads, base.n_kv_heads, base.n_neurons, plan.heads, plan.neurons)
        kept[kv] = [slot for slots in layout.slots for slot in slots]
        assert plan.kept_heads == 20
        assert plan.kv == kv
    assert None in kept["pad"], "the test needs a choice that pads"
    assert None not in kept["keep-groups"]


def test_plan_aligns_widths(scored: tuple[str, Scores]) -> None:
    _, scores = scored
    whole = scores.neurons.shape[1]
    plan = verbs.plan(scores, keep_neurons="30%", align=16)
    assert all(len(kept) % 16 == 0 or len(kept) == whole for kept in plan.neurons)
    free = verbs.plan(scores, keep_neurons="30%")
    assert free.kept_neurons - 16 < plan.kept_neurons <= free.kept_neurons
    assert any(len(kept) % 16 for kept in free.neurons)


def test_old_plans_load_and_plain_plans_read_as_ever(scored: tuple[str, Scores]) -> None:
    plan = verbs.plan(scored[1], keep_neurons="30%")
    assert not {"kv", "align", "budget", "costs"} & set(json.loads(plan.to_json()))
    loaded = Plan.from_json(plan.to_json())
    assert (loaded.kv, loaded.align, loaded.budget, loaded.costs) == ("pad", 1, "", None)


@pytest.mark.parametrize("how", [{"recover": "mean"}, {"recover": "full", "schedule": BRIEF}])
def test_prune_keeps_a_budget(stories: str, tmp_path: Path, how: dict[str, Any]) -> None:
    out = tmp_path / "slim"
    verbs.prune(
        stories, task=story_task(tmp_path), budget="50%", align=8, kv="keep-groups", out=out,
        **how, **QUICK,
    )  # fmt: skip
    plan, report = Plan.load(out / "plan.json"), json.loads((out / "evaluation.json").read_text())
    decoder, small = load_decoder(stories), load_decoder(out)
    costs = counted_costs(decoder, "parameters")
    assert report["budget"]["allowed"] == costs.of(decoder.layout) // 2
    assert report["budget"]["kept"] == costs.of(small.layout) <= report["budget"]["allowed"]
    assert (plan.budget, plan.kv, plan.align) == ("50% of parameters", "keep-groups", 8)
    assert None not in [slot for slots in small.layout.slots for slot in slots]
    whole = decoder.layout.n_neurons
    assert all(len(kept) % 8 == 0 or len(kept) == whole for kept in plan.neurons)


def test_prune_searches_aligned_widths(stories: str, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    verbs.prune(
        stories, task=story_task(tmp_path), keep_heads="80%", recover="mean", align=16,
        max_drop=30, out=out, **QUICK,
    )  # fmt: skip
    plan = Plan.load(out / "plan.json")
    whole = load_decoder(stories).layout.n_neurons
    assert plan.kept_neurons < whole * plan.n_layers
    assert all(len(kept) % 16 == 0 or len(kept) == whole for kept in plan.neurons)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"budget": "20%", "keep_heads": "5%", "keep_neurons": "5%"},
            "--budget 20% covers heads and neurons together; leave out --keep-heads and "
            "--keep-neurons",
        ),
        (
            {"budget": "20%", "keep_accuracy": "99%"},
            "--budget 20% covers heads and neurons together; leave out --keep-accuracy",
        ),
        ({"whole_blocks": True}, "--whole-blocks needs a --budget, such as 20%"),
        ({"budget_of": "flops"}, "--budget-of flops needs a --budget, such as 20%, too"),
        (
            {"budget": "12"},
            "--budget '12' is not a share of what attention and FFN cost; give one above 0% and "
            "at most 100%, such as 20%",
        ),
        (
            {"budget": "20%", "budget_of": "flop"},
            "unknown cost 'flop'; did you mean 'flops'? known are parameters, flops, bytes, "
            "latency",
        ),
        ({"kv": "groups"}, "unknown kv rule 'groups'; did you mean 'keep-groups'? known are "
         "pad, keep-groups, equal, duplicate"),
        (
            {"align": 999},
            "--align 999: no FFN could keep some of its neurons, the widest has 172; give 1 to 172",
        ),
        (
            {"budget": "0.01%"},
            "a budget of 22 parameters holds no attention head, and a model needs one; give more",
        ),
        (
            {"keep_heads": 1, "kv": "keep-groups"},
            "--keep-heads leaves 1 heads, and --kv keep-groups keeps whole KV groups of 2; keep "
            "more heads, or give --kv pad",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    stories: str, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    out = tmp_path / "slim"
    with pytest.raises(PruneEditError) as caught:
        verbs.prune(
            stories, task=story_task(tmp_path), recover="none", out=out, **settings, **QUICK
        )
    assert str(caught.value) == text
    assert not out.exists()


def test_a_budget_needs_scores_of_all_units(stories: str, scored: tuple[str, Scores]) -> None:
    task, scores = scored
    none = Scores(scores.heads, torch.full_like(scores.neurons, torch.nan), scores.metadata)
    with pytest.raises(PlanError, match="these scores do not have all neurons"):
        verbs.plan(none, budget="20%", task=task, limit=16)
    with pytest.raises(BudgetError, match="leave out --keep-neurons"):
        verbs.plan(scores, budget="20%", keep_neurons="5%")
