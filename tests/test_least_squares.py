"""Least squares is the oracle's, and comes nearer to the dense model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recovering import KEPT, NAMES, OPTIONS, PLAIN, logits, pico, rows_of, same, state
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture
from prune_edit.recover import least_squares, normal_equations
from prune_edit.recover.least_squares import Known, refit
from prune_edit.recover.shrink import shrink
from prune_edit.recovery import Recovery
from prune_edit.replay import record
from prune_edit.scoring import Options
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.tasks.task import Example

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
RIDGE = 1e-2


def streams(decoder: Decoder, row: Encoded) -> list[torch.Tensor]:
    """The residual stream after attention and after the FFN of every layer, (T, D) each."""
    with capture(decoder) as seen:
        _, replay = record(decoder, collate([row]).inputs)
    assert seen.final is not None
    after = [*replay.states[1:], seen.final]
    return [x[0] for layer in range(decoder.n_layers) for x in (seen.residual[layer], after[layer])]


def read_by(decoder: Decoder, norm: nn.Module, row: Encoded) -> torch.Tensor:
    """What a norm gives the projections behind it, (T, D)."""
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        decoder.final_states(**collate([row]).inputs)
    finally:
        handle.remove()
    return seen[0]


def ridge_regression(
    xs: list[torch.Tensor], lacking: list[torch.Tensor], rows: list[Encoded], constant: bool
) -> torch.Tensor:
    """As plain least squares with rows for the penalty; a constant's column comes last."""
    weights = []
    for row, x in zip(rows, xs, strict=True):
        answers = torch.arange(len(x)) >= row.start - 1
        weights.append(torch.where(answers, least_squares.ANSWERS, 1.0).double())
    x, e, w = torch.cat(xs).double(), torch.cat(lacking).double(), torch.cat(weights)[:, None]
    size = (w * x.square()).sum(0).mean()
    penalty = torch.full((x.shape[1],), float(RIDGE * size)).double()
    if constant:
        penalty[-1] = 1e-8 * size
    rows_x = torch.cat([w.sqrt() * x, penalty.sqrt().diag()])
    rows_e = torch.cat([w.sqrt() * e, torch.zeros(x.shape[1], e.shape[1]).double()])
    return torch.linalg.lstsq(rows_x, rows_e, driver="gelsd").solution.float()


def oracle_reads(want: Decoder, dense: Decoder, rows: list[Encoded], layer: int, ffn: bool) -> None:
    """Refit what reads the stream before one block."""
    inside, family = dict(want.layers[layer].named_modules()), want.family
    paths = family.ffn_inputs if ffn else {family.queries, family.keys, family.values}
    there = [inside[path] for path in paths if path in inside]
    norms = [m.ffn_norm(layer) if ffn else m.attention_norm(layer) for m in (want, dense)]
    if not there:
        return
    xs = [read_by(want, norms[0], row) for row in rows]
    lacking = [read_by(dense, norms[1], row) - x for row, x in zip(rows, xs, strict=True)]
    change = ridge_regression(xs, lacking, rows, constant=False)
    for module in there:
        weight = want.output_weight(module)
        weight.add_(change @ weight)


def oracle_adds(want: Decoder, rows: list[Encoded], wanted: Any, layer: int, ffn: bool) -> None:
    """Refit what one block adds to the stream."""
    path = want.family.ffn_output if ffn else want.family.attention_output
    module = dict(want.layers[layer].named_modules()).get(path)
    if module is None:
        return
    xs, lacking = [], []
    for row, target in zip(rows, wanted, strict=True):
        with capture(want) as seen:
            want.final_states(**collate([row]).inputs)
        x = (seen.coefficients if ffn else seen.heads).get(layer)
        columns = [] if x is None else [x[0]]
        if not ffn and x is not None:
            real = (want.head_slots[layer] >= 0).repeat_interleave(want.head_dim)
            columns = [x[0] * real]
        if module.bias is not None:
            columns.append(torch.ones(len(row.ids) - 1, 1))
        xs.append(torch.cat(columns, 1))
        lacking.append(target[2 * layer + ffn] - streams(want, row)[2 * layer + ffn])
    change = ridge_regression(xs, lacking, rows, module.bias is not None)
    if module.bias is not None:
        module.bias += change[-1]
        change = change[:-1]
    if len(change):
        want.output_weight(module).add_(change)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_least_squares_is_the_oracles(name: str) -> None:
    """One projection after another by a plain least squares solver, with every token by itself."""
    dense = pico(name)
    rows = rows_of()
    small = shrink(dense, *KEPT[name], rows, OPTIONS)
    want = small.with_model(copy.deepcopy(small.model))
    wanted = [streams(dense, row) for row in rows]
    for place in range(2 * dense.n_layers):
        layer, ffn = place // 2, bool(place % 2)
        oracle_reads(want, dense, rows, layer, ffn)
        oracle_adds(want, rows, wanted, layer, ffn)
    got = refit(small, dense, rows, Options(batch_tokens=20), RIDGE, values=False)
    for name_, value in state(got).items():
        torch.testing.assert_close(value, state(want)[name_], atol=2e-4, rtol=2e-3)
    assert same(state(small), state(shrink(dense, *KEPT[name], rows, OPTIONS)))


@pytest.mark.parametrize("name", NAMES)
def test_least_squares_of_the_whole_model_changes_nothing(name: str) -> None:
    dense = pico(name)
    got = refit(dense, dense, rows_of(), OPTIONS)
    for key, value in state(got).items():
        torch.testing.assert_close(value, state(dense)[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_least_squares_comes_nearer_to_the_dense_model(name: str) -> None:
    dense = pico(name)
    rows = rows_of()
    small = shrink(dense, *KEPT[name], rows, OPTIONS)
    got = refit(small, dense, rows, OPTIONS)

    def off(decoder: Decoder) -> float:
        return float((logits(decoder) - logits(dense)).square().mean())

    assert off(got) < 0.8 * off(small)
    assert same(state(got), state(refit(small, dense, rows[::-1], OPTIONS)))


def test_values_are_refitted_where_heads_went() -> None:
    dense, rows, refitted = pico("llama"), rows_of(), []
    whole = least_squares.refit_values

    def values(decoder: Decoder, layer: int, *rest: Any) -> None:
        refitted.append(layer)
        whole(decoder, layer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "refit_values", values)
        for heads in (dense.layout.heads, KEPT["llama"][0]):
            refit(shrink(dense, heads, KEPT["llama"][1], rows, OPTIONS), dense, rows, OPTIONS)
    assert refitted == [1, 3], "not in layer 2, which lost no head, nor in 0, without any"


@pytest.mark.parametrize(("heads", "layers"), [(9, []), (8, [0, 1, 2, 3])])
def test_rough_fits_take_values_where_half_of_the_heads_went(
    heads: int, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, refitted = pico("llama"), []
    monkeypatch.setattr(
        least_squares, "refit_values", lambda small, layer, *rest: refitted.append(layer)
    )
    kept = tuple(tuple(range(2 + (layer < heads - 8))) for layer in range(4))
    given = SimpleNamespace(
        calibration=rows_of(), dense=dense, options=OPTIONS, known=Known(), fitted=True
    )
    small = shrink(dense, kept, dense.layout.neurons, rows_of(), OPTIONS)
    Recovery.roughly(given, small)  # type: ignore[arg-type]
    assert refitted == layers


def test_fits_to_the_same_prompts_share_what_the_dense_model_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, rows, walked = pico("llama"), rows_of(), []
    whole = least_squares.dense_walk

    def walk(*given: Any) -> Any:
        walked.append(1)
        return whole(*given)

    monkeypatch.setattr(least_squares, "dense_walk", walk)
    known, first = Known(), shrink(dense, *KEPT["llama"], rows, OPTIONS)
    for small in (first, shrink(dense, dense.layout.heads, KEPT["llama"][1], rows, OPTIONS)):
        want = state(refit(small, dense, rows, OPTIONS))
        assert same(state(refit(small, dense, rows, OPTIONS, known=known)), want)
    assert len(walked) == 3, "once for each fit alone, once for both that share it"
    monkeypatch.setattr(least_squares, "_NUMBERS", 8)  # no room
    some = Known()
    refit(first, dense, rows, OPTIONS, known=some)
    assert not some.states


def test_few_examples_do_no_harm_by_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = pico("gpt2")
    generator = torch.Generator().manual_seed(3)
    rows = [
        Encoded(tuple(torch.randint(1, 40, (8,), generator=generator).tolist()), 6, PLAIN)
        for _ in range(40)
    ]
    few, others = rows[:8], rows[8:]
    small = shrink(dense, *KEPT["gpt2"], few, OPTIONS)

    def off(decoder: Decoder) -> float:
        inputs = collate(others).inputs
        with torch.no_grad():
            return float(
                (decoder.final_states(**inputs) - dense.final_states(**inputs)).square().mean()
            )

    chosen, plain = refit(small, dense, few, OPTIONS), refit(small, dense, few, OPTIONS, 1e-4)
    assert off(chosen) < off(plain)
    assert off(chosen) < 1.05 * off(small)
    # Where tokens are plenty the least ridge is taken without asking.
    monkeypatch.setattr(normal_equations, "_PLENTY", 0)
    assert same(state(refit(small, dense, few, OPTIONS)), state(plain))


def test_what_is_fitted_has_the_groups_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pico("llama")
    rows = [
        Encoded((1, 2, 3), 2, Example(str(i), "", group="rare" if i % 5 == 0 else "often"))
        for i in range(100)
    ]

    def counts(most: int) -> tuple[int, int]:
        groups = [row.example.group for row in least_squares.enough(rows, decoder, most)]
        return groups.count("rare"), groups.count("often")

    assert counts(16) == (8, 8)
    assert counts(60) == (20, 40)
    assert counts(999) == (20, 80)
    width = decoder.unembedding.shape[1]
    monkeypatch.setattr(least_squares, "_NUMBERS", 3 * 16 * width)  # the states of 16 rows
    assert counts(999) == (6, 6), "halved until they fit, and still alike"
