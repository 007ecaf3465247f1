"""Searches for units: gates, greedy heads, and the least squares that judges them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovering import NAMES, OPTIONS, logits, pico, rows_of, same, state

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture, scale
from prune_edit.recover import least_squares
from prune_edit.recover.least_squares import LayerFit, refit
from prune_edit.recover.shrink import hollow, shrink
from prune_edit.recover.values import values_alone
from prune_edit.scoring import Options
from prune_edit.selection import gates as gates_module
from prune_edit.selection import greedy as greedy_module
from prune_edit.selection.gates import GateTraining, learn_gates, open_chance
from prune_edit.selection.greedy import Greedy
from prune_edit.tasks.prompts import Encoded, batches, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units


def many_rows(count: int = 40, vocabulary: int = 40) -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = 5 + number % 4
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), length - 2, Example(str(ids), "")))
    return rows


# Gates


@given(
    odds=st.lists(st.floats(-8, 8), min_size=3, max_size=20),
    share=st.floats(0.1, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_gates_that_are_open_on_average_are_the_budget(odds: list[float], share: float) -> None:
    values = torch.tensor(odds, requires_grad=True)
    target = share * len(odds)
    offset = gates_module._offset(values, target)
    chances = open_chance(values - offset)
    assert float(chances.detach().sum()) == pytest.approx(target, abs=1e-3)
    # The budget holds however the odds move: the sum of chances has no gradient.
    (grad,) = torch.autograd.grad(chances.sum(), values)
    assert grad.abs().max() < 1e-4


def deadened(name: str, alive: Any) -> Decoder:
    """A model of which only the heads `alive` (layer, head) add anything."""
    decoder = pico(name)
    with torch.no_grad():
        for layer in range(decoder.n_layers):
            projection = decoder.attention_output(layer)
            assert projection is not None
            weight = decoder.output_weight(projection).view(
                decoder.layout.n_heads, decoder.head_dim, -1
            )
            for head in range(decoder.layout.n_heads):
                weight[head] *= 4.0 if (layer, head) in alive else 0.0
    return decoder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gates_find_the_heads_that_do_something(name: str) -> None:
    alive = {(0, 1), (1, 2)}
    decoder, rows = deadened(name, alive), many_rows()
    brief = GateTraining(steps=60, batch=16)
    before = state(decoder)
    heads, neurons = learn_gates(decoder, rows, rows, 2, None, OPTIONS, brief)
    best = heads.flatten().topk(2).indices.tolist()
    assert {divmod(unit, heads.shape[1]) for unit in best} == alive
    assert neurons.isnan().all()
    assert same(before, state(decoder)), "the weights are frozen"
    again, _ = learn_gates(decoder, rows, rows, 2, None, OPTIONS, brief)
    assert torch.equal(heads, again)
    other, _ = learn_gates(decoder, rows, rows, 2, None, Options(seed=1), brief)
    assert not torch.equal(heads, other)


def test_gates_need_no_labels_and_leave_no_hook() -> None:
    decoder, rows = pico("llama"), many_rows(16)
    brief = GateTraining(steps=5, batch=8)
    first = learn_gates(decoder, rows, rows, 5, 20, OPTIONS, brief)
    relabelled = [
        Encoded((*row.ids[:-1], row.ids[-1] % 39 + 1), row.start, row.example) for row in rows
    ]
    second = learn_gates(decoder, relabelled, rows, 5, 20, OPTIONS, brief)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, atol=0, rtol=0)
        assert not one.isnan().any()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in decoder.model.modules()
    )


def test_gates_of_some_layers_leave_the_others() -> None:
    decoder, rows = pico("llama"), many_rows(16)
    total = sum(map(len, decoder.layout.neurons))
    inside = sum(len(decoder.layout.neurons[layer]) for layer in (2, 3))
    brief = GateTraining(steps=4, batch=8)
    _, neurons = learn_gates(
        decoder, rows, None, None, total - inside + 5, OPTIONS, brief, layers=(2, 3)
    )
    assert neurons[:2].isnan().all() and not neurons[2:].isnan().any()


def test_gates_of_a_half_precision_model() -> None:
    decoder, rows = pico("llama"), many_rows(8)
    half = decoder.with_model(decoder.model.to(torch.bfloat16))
    heads, _ = learn_gates(half, rows, rows, 5, None, OPTIONS, GateTraining(steps=2, batch=4))
    assert heads.isfinite().all()


def test_no_budget_learns_nothing() -> None:
    heads, neurons = learn_gates(pico("llama"), many_rows(4), many_rows(4), None, None, OPTIONS)
    assert heads.isnan().all() and neurons.isnan().all()


# Least squares with values, and without what no answer needs


@pytest.mark.parametrize(("name", "alone"), [("llama", True), ("gpt2", True), ("llama-gqa", False)])
def test_values_are_refitted_where_heads_have_their_own(name: str, alone: bool) -> None:
    dense, rows = pico(name), many_rows(60)
    kept = tuple(heads[:2] for heads in dense.layout.heads)
    small = shrink(dense, kept, dense.layout.neurons, rows, OPTIONS)
    assert values_alone(small, 0) is alone
    plain = refit(small, dense, rows, OPTIONS, 1e-4, values=False)
    full = refit(small, dense, rows, OPTIONS, 1e-4)
    if not alone:
        assert same(state(plain), state(full))
        return
    lacks = [_lacking(model, dense, rows) for model in (small, plain, full)]
    assert lacks[0] > lacks[1] > lacks[2], "values make up for more, on what they are fitted to"


@torch.no_grad()
def _lacking(small: Decoder, dense: Decoder, rows: list[Encoded]) -> float:
    """The squared distance of the streams after the first layer's attention, weighed."""
    total = 0.0
    for row in rows:
        streams = []
        for model in (small, dense):
            with capture(model) as seen:
                model.final_states(**collate([row]).inputs)
            streams.append(seen.residual[0][0])
        weights = torch.ones(len(row.ids) - 1)
        weights[row.start - 1 :] = least_squares.ANSWERS
        total += float((weights[:, None] * (streams[0] - streams[1]).square()).sum())
    return total


@torch.no_grad()
def test_a_value_map_is_the_best_of_its_rank() -> None:
    """One head of one layer: no map of rank E from what it mixes comes nearer to what lacks."""
    from prune_edit.hooks import Pattern
    from prune_edit.recover.values import Attended, _maps, refit_values

    decoder = pico("llama")
    kept = ((2,), *decoder.layout.heads[1:])
    small = shrink(decoder, kept, decoder.layout.neurons, many_rows(4), OPTIONS)
    size, hidden = small.head_dim, small.unembedding.shape[1]
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(6, 9, hidden, generator=generator)
    weights = torch.randn(6, 1, 9, 9, generator=generator).softmax(-1)
    lacking = torch.randn(6, 9, hidden, generator=generator)
    ones = torch.ones(6, 9)
    values, output = _maps(small, 0)
    own = (weights[:, 0] @ read) @ values @ output
    batch = Attended(Pattern(weights, read), lacking.clone(), ones, ones < 0)
    refit_values(small, 0, [batch], 1e-9)
    x = torch.cat([weights[:, 0] @ read, torch.ones(6, 9, 1)], -1).flatten(0, 1).double()
    y = (lacking + own).flatten(0, 1).double()
    free = torch.linalg.lstsq(x, y).solution
    predicted = (x @ free)[:, :]
    # Eckart and Young on what the free solution predicts, its constant left free.
    inner = x[:, :-1] @ free[:-1]
    u, s, v = torch.linalg.svd(inner, full_matrices=False)
    best = u[:, :size] * s[:size] @ v[:size] + free[-1]
    got = x[:, :-1] @ (values.double() @ output.double()) + free[-1]
    assert float((y - got).square().sum()) <= 1.001 * float((y - best).square().sum())
    assert float((y - predicted).square().sum()) <= float((y - got).square().sum())


@torch.no_grad()
def test_above_the_last_heads_only_answers_are_fitted_to() -> None:
    dense, rows = pico("llama"), many_rows(30)
    kept = ((0, 1), (), (), ())
    small = hollow(dense, kept)
    fit = LayerFit(copy.deepcopy(small), dense)
    runs = [fit.run(batch) for _, batch in batches(rows, 4096)]
    walks = [least_squares.dense_walk(dense, run.batch) for run in runs]
    sizes = []
    for layer in range(dense.n_layers):
        runs = fit.layer(layer, runs, [next(walk) for walk in walks])
        sizes.append(runs[0].states.shape[:2])
    batch = runs[0].batch
    assert sizes[0] == batch.input_ids.shape
    assert sizes[1:] == [(1, len(batch.rows))] * 3
    # The states that are left are those of the refitted model.
    final = fit.small.final_states(**batch.inputs)[batch.rows, batch.columns]
    torch.testing.assert_close(fit.small.finish(runs[0].states)[0], final, atol=1e-4, rtol=1e-4)
    wanted = dense.final_states(**batch.inputs)[batch.rows, batch.columns]
    before = small.final_states(**batch.inputs)[batch.rows, batch.columns]
    assert (final - wanted).square().mean() < (before - wanted).square().mean()


# Greedy heads


@torch.no_grad()
def test_a_candidate_from_kept_states_is_the_model_from_the_start() -> None:
    dense, rows = pico("llama"), many_rows()
    search = Greedy(dense, rows, OPTIONS)
    width = dense.head_shape[1]
    state_ = search.start(frozenset({0, 2 * width + 1}))
    for heads in (
        {0, 2 * width + 1, 3 * width},
        {0},
        {0, width + 1, 2 * width + 1},
        {1, 3 * width + 2},
    ):
        found = search.changed(state_, frozenset(heads))
        plain = search.start(frozenset(heads))
        assert found.loss == pytest.approx(plain.loss, abs=1e-4)
        for key, value in state(plain.small).items():
            torch.testing.assert_close(state(found.small)[key], value, atol=1e-3, rtol=1e-2)


@torch.no_grad()
def test_greedy_takes_what_lowers_the_loss_most() -> None:
    dense, rows = deadened("llama", {(0, 1), (1, 2), (2, 0)}), many_rows(60)
    search = Greedy(dense, rows, OPTIONS)
    order = search.forward(3)
    assert len(set(order)) == 3
    width = dense.head_shape[1]
    losses = {unit: search.start(frozenset({unit})).loss for unit in range(4 * width)}
    assert losses[order[0]] == pytest.approx(min(losses.values()), abs=1e-5)
    assert Greedy(dense, rows, OPTIONS).forward(3) == order


@torch.no_grad()
def test_every_task_is_judged_by_its_weight() -> None:
    dense, rows = pico("llama"), many_rows(20)
    parts = [
        replace(row, part="ab"[i % 2], weight=(1.0, 0.0001)[i % 2]) for i, row in enumerate(rows)
    ]
    losses = []
    for chosen in (parts, [row for row in parts if row.part == "a"]):
        search = Greedy(dense, chosen, OPTIONS)
        judged = {row.part for row in chosen if id(row) in greedy_module._uses(chosen)[0]}
        assert judged == {row.part for row in chosen}
        losses.append(search.start(frozenset({0, 5})).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2), "b hardly counts"
    Greedy(dense, rows[:1], OPTIONS).start(frozenset({0, 5}))  # fitted to what it is judged by


@torch.no_grad()
def test_backward_takes_away_what_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_module, "_AGAIN", 99)
    dense, rows = deadened("llama", {(0, 1), (1, 2), (2, 0)}), many_rows(60)
    search = Greedy(dense, rows, OPTIONS)
    width = dense.head_shape[1]
    heads = frozenset({1, 2, width + 2, 2 * width, 3 * width + 1})
    order = search.backward(heads, 3)
    losses = {unit: search.start(heads - {unit}).loss for unit in heads}
    assert losses[order[0]] == pytest.approx(min(losses.values()), abs=1e-4)
    assert set(order) == {2, 3 * width + 1}, "those that do nothing"


@pytest.mark.parametrize("name", NAMES)
def test_hollow_models_are_gated_ones(name: str) -> None:
    dense = pico(name)
    kept = tuple(heads[:1] for heads in dense.layout.heads)
    small = hollow(dense, kept)
    factors = torch.zeros(dense.head_shape)
    factors[:, 0] = 1
    before = logits(dense)
    with scale(dense, Units(heads=factors)):
        want = logits(dense)
    torch.testing.assert_close(logits(small), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, want, atol=1e-3)
    assert rows_of()
