"""Neurons by cases: the union over examples of each one's best, as the slow oracle forms it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from reference import Unit
from test_methods import OTHERS, tuned
from test_scoring import KEPT, OPTIONS, PROMPTS, encoded, pico

from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, PlanError
from prune_edit.layout import Kept
from prune_edit.planning import keep_neurons
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options, load_adapter
from prune_edit.scoring.cases import Cases, count_cases, find_cases

NAMES = ("llama-gqa", "gpt2")
GAP = 2e-5  # nats between the n-th and the next, below which rounding decides


def units(kept: Kept) -> set[Unit]:
    return {(layer, unit) for layer, row in enumerate(kept) for unit in row}


def clear(cases: list[dict[Unit, float]], n: int) -> bool:
    """Whether no case's n-th best is as good as its next."""
    ordered = [sorted(case.values(), reverse=True) for case in cases]
    return all(values[n - 1] - values[n] > GAP for values in ordered)


def assert_unions(decoder: Decoder, cases: list[dict[Unit, float]], options: Options) -> None:
    _, found = find_cases(decoder, encoded(PROMPTS[:3]), options)
    total = len(cases[0])
    told = [n for n in range(1, total) if clear(cases, n)]
    assert len(told) > 0.15 * total
    assert not found.union(0) or not units(found.union(0))
    sizes = set()
    for n in told:
        want = reference.union(cases, n)
        assert units(found.union(n)) == want
        sizes.add(len(want))
        counts = count_cases(decoder, encoded(PROMPTS[:3]), options, n)
        for unit in reference.top(cases[0], n) | reference.top(cases[1], n):
            assert counts[unit] == sum(unit in reference.top(case, n) for case in cases)
    assert any(len(reference.union(cases, n)) > n for n in told), "all cases want the same"
    assert max(sizes) <= total
    means = torch.tensor([[found.change[unit]] for unit in cases[0]]).flatten()
    want_means = torch.tensor([sum(c[unit] for c in cases) / len(cases) for unit in cases[0]])
    assert (means - want_means).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_unions_against_ablated_heads_are_by_hand(name: str) -> None:
    decoder = pico(name)
    assert_unions(decoder, reference.cases(decoder.model, PROMPTS[:3]), OPTIONS)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_unions_against_a_tuned_model_are_by_hand(name: str, tmp_path: Path) -> None:
    decoder = pico(name)
    tuned(name, tmp_path / "adapter")
    adapted = load_adapter(decoder, tmp_path / "adapter")
    cases = reference.cases(decoder.model, PROMPTS[:3], adapted.model)
    assert_unions(decoder, cases, Options(adapted=adapted))


@torch.no_grad()
def test_the_best_scores_are_the_largest_union_that_fits_and_the_next() -> None:
    decoder = pico("llama-gqa")
    heads, neurons = METHODS["cna-cases"](decoder, encoded(), OPTIONS)
    _, cases = find_cases(decoder, encoded(), OPTIONS)
    total = cases.entry.numel()
    assert sorted(neurons.flatten().tolist()) == list(range(1, total + 1))
    assert torch.equal(neurons, cases.scores())
    filled = 0
    for count in range(1, total + 1):
        kept = units(keep_neurons(neurons, count))
        n = cases.largest(count)
        inside = units(cases.union(n))
        assert len(kept) == count and inside <= kept
        assert len(units(cases.union(n + 1))) > count or n >= total or count == total
        rest = kept - inside
        filled += bool(rest)
        # What fills up is of the next entry, and of those the best on average.
        if rest:
            entry = {int(cases.entry[unit]) for unit in rest}
            assert len(entry) == 1 and min(entry) > n
            others = units(cases.union(min(entry))) - kept
            assert all(cases.change[a] >= cases.change[b] for a in rest for b in others)
    assert filled
    # Another choice than the mean's, with heads as cna has them.
    wanted, mean = METHODS["cna"](decoder, encoded(), OPTIONS)
    assert torch.equal(heads, wanted)
    few = total // 4
    assert units(keep_neurons(neurons, few)) != units(keep_neurons(mean, few))


def test_layers_have_a_largest_union_of_their_own() -> None:
    cases = Cases(torch.tensor([[1, 4, 0], [2, 2, 5]]), torch.zeros(2, 3, dtype=torch.float64))
    assert cases.largest(1) == 1
    assert cases.largest(2) == 1  # two enter at 2
    assert cases.largest(3) == 3
    assert cases.largest(2, [1]) == 4
    assert cases.largest(1, [1]) == 1
    assert cases.union(2) == ((0,), (0, 1))
    assert cases.largest(5) == 6  # all of them: any n of that size will do
    assert cases.scores().isnan().tolist() == [[False, False, True], [False] * 3]


@torch.no_grad()
def test_contrast_prompts_of_other_lengths() -> None:
    decoder = pico("llama-gqa")
    pairs = (PROMPTS[1:4:2], OTHERS[1:4:2])
    options = Options(contrast=tuple(encoded(pairs[1])))
    heads, cases = find_cases(decoder, encoded(pairs[0]), options)
    sides = [
        [reference.neuron_scores(decoder.model, [row], False) for row in rows] for rows in pairs
    ]
    want = torch.stack([a - b for a, b in zip(*sides, strict=True)]).mean(0)
    assert (cases.change - want).abs().max() < 1e-4
    assert torch.equal(heads, METHODS["cna"](decoder, encoded(pairs[0]), options)[0])


@torch.no_grad()
def test_the_true_norm_is_another_order() -> None:
    decoder = pico("llama-gqa")
    frozen = find_cases(decoder, encoded(), OPTIONS)[1]
    true = find_cases(decoder, encoded(), replace(OPTIONS, norm="true"))[1]
    want = METHODS["cna"](decoder, encoded(PROMPTS[1:2]), replace(OPTIONS, norm="true"))[1]
    got = find_cases(decoder, encoded(PROMPTS[1:2]), replace(OPTIONS, norm="true"))[1]
    assert (got.change - want).abs().max() < 1e-5
    assert (true.change - frozen.change).abs().max() > 1e-3


@torch.no_grad()
def test_absent_neurons_take_no_rank() -> None:
    decoder = pico("llama-gqa")
    heads, neurons = KEPT["llama-gqa"]
    small = shrink(decoder, heads, neurons, None, OPTIONS)
    _, cases = find_cases(small, encoded(), OPTIONS)
    present = sum(map(len, neurons))
    assert units(cases.union(present)) == units(neurons)
    scores = cases.scores()
    assert sorted(scores[~scores.isnan()].tolist()) == list(range(1, present + 1))
    assert int(cases.entry.max()) <= present


def test_wrong_contrasts_are_named() -> None:
    decoder = pico("llama-gqa")
    with pytest.raises(PlanError, match="4 prompts have 1 contrast prompts"):
        METHODS["cna-cases"](decoder, encoded(), Options(contrast=tuple(encoded(OTHERS[:1]))))
    with pytest.raises(ModelError, match="does not have the units of"):
        METHODS["cna-cases"](decoder, encoded(), Options(adapted=pico("gpt2")))
