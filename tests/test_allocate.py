"""One budget over heads and neurons: never above, nothing left that fits, the same every time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_edit.aligned import check_align, keep_aligned, widths_allowed
from prune_edit.allocate import allocate
from prune_edit.costs import Costs
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept
from prune_edit.planning import keep_neurons, keep_top
from prune_edit.recover.trade import priced
from prune_edit.rules import Rules, budget_of, parse_budget


def costs(
    layers: int, group_size: int, slot: int = 7, group: int = 5, neuron: int = 3, **blocks: int
) -> Costs:
    each = [(value,) * layers for value in (slot, group, neuron)]
    fixed = [(blocks.get(name, 0),) * layers for name in ("attention", "ffn")]
    return Costs("parameters", group_size, *each, *fixed)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Scores with absent units, costs of every kind, a budget and rules."""
    layers, groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = draw(st.integers(1, 9))
    number = st.one_of(st.floats(-2, 5, width=32), st.just(1.0), st.just(math.nan))

    def scores(units: int) -> torch.Tensor:
        rows = st.lists(number, min_size=layers * units, max_size=layers * units)
        return torch.tensor(draw(rows)).view(layers, units)

    heads, neurons = scores(groups * size), scores(width)
    heads[0, 0] = 1.0
    price = st.integers(0, 9)
    made = costs(
        layers, size, draw(price), draw(price), draw(price),
        attention=draw(st.sampled_from([0, 0, 11])), ffn=draw(st.sampled_from([0, 0, 13])),
    )  # fmt: skip
    return {
        "head_scores": heads,
        "neuron_scores": neurons,
        "costs": made,
        "budget": draw(st.integers(0, 250)),
        "kv": draw(st.sampled_from(["pad", "keep-groups"])),
        "align": draw(st.integers(1, 4)),
    }


def outcome(problem: dict[str, Any]) -> tuple[Kept, Kept] | None:
    try:
        return allocate(**problem)
    except BudgetError:
        return None


def present(scores: torch.Tensor, layer: int) -> list[int]:
    return [unit for unit, score in enumerate(scores[layer].tolist()) if not math.isnan(score)]


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_a_budget_is_never_exceeded_and_nothing_that_fits_is_left(problem: dict[str, Any]) -> None:
    found, made, budget = outcome(problem), problem["costs"], problem["budget"]
    heads, size = problem["head_scores"], made.group_size
    if found is None:
        # Not one head, or group, fits.
        for layer, group in itertools.product(range(len(heads)), range(heads.shape[1] // size)):
            there = [head for head in present(heads, layer) if head // size == group]
            if there:
                least = len(there) if problem["kv"] == "keep-groups" else 1
                assert made.of_heads(layer, (least,)) > budget
        return
    spent = made.of_units(*found)
    assert spent <= budget
    for layer, (kept, neurons) in enumerate(zip(*found, strict=True)):
        there = present(heads, layer)
        assert set(kept) <= set(there)
        assert list(kept) == sorted(set(kept))
        for group in range(heads.shape[1] // size):
            members = [head for head in there if head // size == group]
            inside = [head for head in kept if head // size == group]
            if problem["kv"] == "keep-groups":
                assert inside in ([], members)
            left = [head for head in members if head not in inside]
            more = left if problem["kv"] == "keep-groups" else left[:1]
            if more:
                bigger = [*found[0]]
                bigger[layer] = tuple(sorted((*kept, *more)))
                assert made.of_units(tuple(bigger), found[1]) > budget
        widths = present(problem["neuron_scores"], layer)
        allowed = widths_allowed(len(widths), problem["align"], len(widths))
        assert len(neurons) in allowed
        assert set(neurons) <= set(widths)
        if len(neurons) < len(widths):
            wider = min(width for width in allowed if width > len(neurons))
            now, then = (made.of_neurons(layer, n) for n in (len(neurons), wider))
            assert spent - now + then > budget
    assert outcome(problem) == found


@settings(max_examples=150, deadline=None)
@given(problem=problems(), more=st.floats(0.1, 9.0), which=st.integers(0, 10**6))
def test_a_unit_that_is_worth_more_stays(problem: dict[str, Any], more: float, which: int) -> None:
    """Where units cost no more together than alone, raising a score never loses the unit."""
    layers = len(problem["neuron_scores"])
    plain = {**problem, "costs": costs(layers, 1), "kv": "pad", "align": 1}
    found = outcome(plain)
    if found is None or not found[1][which % layers]:
        return
    layer = which % layers
    unit = found[1][layer][which % len(found[1][layer])]
    raised = plain["neuron_scores"].clone()
    raised[layer, unit] = raised[layer, unit].abs() + more
    assert unit in (outcome({**plain, "neuron_scores": raised}) or ((), ((),) * layers))[1][layer]


@settings(max_examples=150, deadline=None)
@given(problem=problems(), more=st.integers(0, 60))
def test_with_more_to_spend_no_unit_of_equal_cost_is_lost(
    problem: dict[str, Any], more: int
) -> None:
    layers = len(problem["head_scores"])
    plain = {
        **problem, "costs": costs(layers, 1, 1, 1, 2), "kv": "pad", "align": 1,
    }  # fmt: skip
    less = outcome(plain)
    much = outcome({**plain, "budget": plain["budget"] + more})
    if less is None or much is None:
        return
    for small, large in zip((*less[0], *less[1]), (*much[0], *much[1]), strict=True):
        assert set(small) <= set(large)


def test_all_of_it_is_all_of_it() -> None:
    heads, neurons = torch.tensor([[-1.0, 0.0, 2.0, 0.0]]), torch.zeros(1, 5)
    made = costs(1, 2, attention=3, ffn=4)
    total = made.of_units(((0, 1, 2, 3),), (tuple(range(5)),))
    assert allocate(heads, neurons, made, total) == (((0, 1, 2, 3),), (tuple(range(5)),))
    assert made.of_units(*allocate(heads, neurons, made, total - 1)) < total


def test_units_trade_by_score_per_cost() -> None:
    heads = torch.tensor([[10.0, 1.0], [1.0, 6.0]])  # 12 each
    neurons = torch.tensor([[1.0, -0.5, 0.1], [2.0, 0.0, 0.4]])  # 3 each, by size
    made = costs(2, 1)
    assert allocate(heads, neurons, made, 12) == (((0,), ()), ((), ()))
    assert allocate(heads, neurons, made, 17) == (((0,), ()), ((), (0,)))
    assert allocate(heads, neurons, made, 30) == (((0,), (1,)), ((0,), (0,)))
    # 2 / 3 a neuron is more than 6 / 12 a head; what is left goes to what fits.
    assert allocate(heads, neurons, made, 21) == (((0,), ()), ((0, 1), (0,)))


def test_ties_go_to_heads_then_the_first_layer_and_unit() -> None:
    even = torch.ones(2, 3)
    made = costs(2, 1, 2, 1, 3)
    assert allocate(even, even, made, 9) == (((0, 1, 2), ()), ((), ()))
    assert allocate(even, even, made, 12) == (((0, 1, 2), (0,)), ((), ()))
    assert allocate(even, even, made, 24) == (((0, 1, 2), (0, 1, 2)), ((0, 1), ()))


def test_the_first_heads_of_a_group_pay_for_it_together() -> None:
    # Singly, no head of the second group is worth its keys and values; all three are.
    heads = torch.tensor([[9.0, 9.0, 9.0, 6.0, 6.0, 6.0]])
    neurons = torch.tensor([[4.0] * 8])
    made = costs(1, 3, slot=1, group=9, neuron=3)
    kept = allocate(heads, neurons, made, 24)
    assert kept == (((0, 1, 2, 3, 4, 5),), ((),))


def test_a_short_group_is_filled_for_nothing() -> None:
    heads = torch.tensor([[9.0, 8.0, 7.0, 0.0]])  # groups of two: a pad would cost the same
    made = costs(1, 2, slot=4, group=1, neuron=1)
    assert allocate(heads, torch.zeros(1, 3), made, 18) == (((0, 1, 2, 3),), ((),))


def test_a_full_short_group_beside_a_longer_one_that_does_not_fit() -> None:
    heads = torch.tensor([[1.0, math.nan, -1.0, -1.0]])
    one_head = costs(1, 2)
    found = allocate(heads, torch.zeros(1, 1), one_head, one_head.of_heads(0, (1,)))
    assert found == (((0,),), ((),))


def test_a_block_has_its_price() -> None:
    heads = torch.tensor([[3.0], [3.0]])
    neurons = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    made = costs(2, 1, 1, 1, 1, attention=4, ffn=10)
    # One layer's FFN for 12 or 11; the other would pay its 10 again.
    heads_kept, kept = allocate(heads, neurons, made, 24)
    assert heads_kept == ((0,), (0,))
    assert kept == ((), (0, 1))


def test_closed_blocks_keep_nothing_and_others_take_their_room() -> None:
    heads, neurons = torch.tensor([[9.0], [1.0]]), torch.ones(2, 4)
    made = costs(2, 1)
    open_kept = allocate(heads, neurons, made, 24)
    closed = allocate(heads, neurons, made, 24, closed={(0, 0), (1, 1)})
    assert open_kept[0][0] and open_kept != closed
    assert closed == (((), (0,)), ((0, 1, 2, 3), ()))
    with pytest.raises(BudgetError):
        allocate(heads, neurons, made, 24, closed={(0, 0), (1, 0)})


def test_a_budget_below_one_head_says_so() -> None:
    with pytest.raises(BudgetError) as caught:
        allocate(torch.ones(1, 2), torch.ones(1, 2), costs(1, 1), 11)
    assert str(caught.value) == (
        "a budget of 11 parameters holds no attention head, and a model needs one; give more"
    )


# Alignment


def best_aligned(scores: torch.Tensor, count: int, align: int) -> tuple[int, float]:
    """The fullest total within a count and its best sum, by trying everything."""
    sizes = [
        sorted((abs(s) for s in row if not math.isnan(s)), reverse=True)
        for row in scores.double().tolist()
    ]
    options = [widths_allowed(len(row), align, len(row)) for row in sizes]
    found = [
        (sum(widths), math.fsum(sum(row[:w]) for row, w in zip(sizes, widths, strict=True)))
        for widths in itertools.product(*options)
        if sum(widths) <= count
    ]
    return max(found)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.one_of(st.floats(-3, 3, width=32), st.just(math.nan)), min_size=7, max_size=7),
        min_size=1, max_size=3,
    ),
    count=st.integers(1, 21), align=st.integers(2, 5),
)  # fmt: skip
def test_aligned_widths_are_the_fullest_and_the_best(
    rows: list[list[float]], count: int, align: int
) -> None:
    scores = torch.tensor(rows)
    total, best = best_aligned(scores, count, align)
    if not total:
        with pytest.raises(BudgetError):
            keep_aligned(scores, count, align)
        return
    kept = keep_aligned(scores, count, align)
    assert sum(map(len, kept)) == total
    got = math.fsum(
        abs(float(scores[layer, unit].double())) for layer, units in enumerate(kept)
        for unit in units
    )  # fmt: skip
    assert got == pytest.approx(best, abs=1e-9)
    assert keep_aligned(scores, count, align) == kept


def test_alignment_of_one_is_the_free_choice() -> None:
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    for count in (1, 17, 80):
        assert keep_aligned(scores, count, 1) == keep_neurons(scores, count)


def test_the_whole_width_is_that_of_the_model_before() -> None:
    # Seven neurons are left of ten: seven is no multiple of four, and no longer the whole.
    scores = torch.tensor([[1.0] * 7 + [math.nan] * 3])
    assert [*map(len, keep_aligned(scores, 7, 4))] == [7]
    assert [*map(len, keep_aligned(scores, 7, 4, widths=[10]))] == [4]


@pytest.mark.parametrize("align", [0, -2, 13])
def test_an_impossible_alignment_says_what_is_possible(align: int) -> None:
    with pytest.raises(BudgetError) as caught:
        check_align(align, (12, 12))
    assert str(caught.value) == (
        f"--align {align}: no FFN could keep some of its neurons, the widest has 12; give 1 to 12"
    )
    check_align(12, (12, 3))


# Rules


def test_whole_groups_are_kept_by_their_sum() -> None:
    scores = torch.tensor([[5.0, 0.0, 2.0, 2.0], [2.0, 2.5, 0.0, 0.0]])
    rules = Rules(kv="keep-groups", group_size=2)
    assert rules.heads(scores, 2) == ((0, 1), ())
    assert rules.heads(scores, 5) == ((0, 1), (0, 1))  # a fifth head is no group
    assert rules.heads(scores, 8) == keep_top(scores, 8)
    assert Rules(group_size=2).heads(scores, 2) == ((0,), (1,))


def test_counts_that_no_rule_allows() -> None:
    rules = Rules(kv="keep-groups", align=16, widths=(64, 64), group_size=4)
    rules.check_counts(4, 16)
    with pytest.raises(BudgetError, match="leaves 3 heads, and --kv keep-groups keeps whole KV"):
        rules.check_counts(3, None)
    with pytest.raises(BudgetError, match="leaves 15 neurons, fewer than one step of --align 16"):
        rules.check_counts(4, 15)


def test_only_the_last_choice_of_neurons_is_aligned() -> None:
    scores = torch.arange(20.0).view(2, 10)
    rules = Rules(align=4, widths=(10, 10))
    assert [*map(len, rules.neurons(scores, 13, last=False))] == [3, 10]
    assert [*map(len, rules.neurons(scores, 13))] == [4, 8]


def test_budgets_are_exact_shares() -> None:
    made = costs(1, 1, 3, 2, 1)
    kept = ((0, 1),), (tuple(range(90)),)
    assert made.of_units(*kept) == 100
    assert [budget_of(parse_budget(f"{p}%"), made, *kept) for p in (1, 7, 29, 100)] == [
        1, 7, 29, 100,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["12", "0%", "101%", "nan%", "x%", "", "all"])
def test_a_budget_is_a_share(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    assert str(caught.value) == (
        f"--budget {text!r} is not a share of what attention and FFN cost; give one above 0% and "
        "at most 100%, such as 20%"
    )


# Prices


def test_prices_follow_ranks() -> None:
    nan = math.nan
    scores = torch.tensor([[3.0, nan, -1.0], [3.0, 0.0, 9.0]])
    prices = torch.tensor([[0.1, nan, 0.5], [0.2, 0.4, 0.3]])
    want = torch.tensor([[0.4, nan, 0.1], [0.3, 0.2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        priced(scores, prices), want, equal_nan=True, atol=1e-6, rtol=0, check_dtype=True
    )
    same = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(priced(same, same), same.double())
