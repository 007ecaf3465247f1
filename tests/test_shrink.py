"""Units go by zero or by their mean, as the oracle removes them."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from recovering import (
    KEPT,
    NAMES,
    OPTIONS,
    PROMPTS,
    gates,
    logits,
    loss,
    pico,
    rows_of,
    same,
    state,
)

from prune_edit.hooks import scale
from prune_edit.recover.shrink import mean_compensation, shrink
from prune_edit.scoring import Options
from prune_edit.tasks.prompts import Encoded
from prune_edit.tasks.task import Example

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.mark.parametrize("name", NAMES)
def test_removed_is_zeroed(name: str) -> None:
    decoder = pico(name)
    before, whole = state(decoder), logits(decoder)
    small = shrink(decoder, *KEPT[name], None, OPTIONS)
    with scale(decoder, gates(decoder, *KEPT[name])):
        want = logits(decoder)
    got = logits(small)
    assert (got - want).abs().max() < 5e-5
    assert (got - whole).abs().max() > 0.1
    assert small.model.num_parameters() < decoder.model.num_parameters()
    assert (small.layout.heads, small.layout.neurons) == KEPT[name]
    assert (small.head_shape, small.neuron_shape) == (decoder.head_shape, decoder.neuron_shape)
    assert same(state(decoder), before), "the dense model is left alone"
    assert not small.model.training


@pytest.mark.parametrize("prompts", [None, rows_of()], ids=["none", "mean"])
def test_removing_nothing_is_the_identity(prompts: Any) -> None:
    decoder = pico("llama-gqa")
    layout = decoder.layout
    assert shrink(decoder, layout.heads, layout.neurons, prompts, OPTIONS) is decoder
    small = shrink(decoder, *KEPT["llama-gqa"], None, OPTIONS)
    layout = small.layout
    assert shrink(small, layout.heads, layout.neurons, prompts, OPTIONS) is small


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_mean_is_what_the_oracle_puts_in_one_layers_place(name: str) -> None:
    decoder = pico(name)
    model: Any = decoder.model
    layer = 1
    have = decoder.layout
    gone_heads, gone_neurons = (0, 2), (1, 4, 7)

    def but(kept: Any, gone: tuple[int, ...]) -> Any:
        kept = list(kept)
        kept[layer] = tuple(unit for unit in kept[layer] if unit not in gone)
        return tuple(kept)

    small = shrink(
        decoder, but(have.heads, gone_heads), but(have.neurons, gone_neurons), rows_of(), OPTIONS
    )
    # The answer's last token is never read.
    texts = [prompt.ids[:-1] for prompt in PROMPTS]
    size = decoder.head_dim
    mean = reference.mean_over_tokens(reference.head_outputs(model, layer, ids) for ids in texts)
    weight = reference.attention_weight(model, layer)
    constant = sum(
        mean[h * size : (h + 1) * size] @ weight[h * size : (h + 1) * size] for h in gone_heads
    )
    model = reference.without(model, heads=[(layer, head) for head in gone_heads])
    model = reference.adding(model, layer, "attention", constant)
    # The neurons' means are those of the model without the heads.
    mean = reference.mean_over_tokens(reference.coefficients(model, layer, ids) for ids in texts)
    constant = sum(mean[k] * reference.values(model, layer)[k] for k in gone_neurons)
    model = reference.without(model, neurons=[(layer, neuron) for neuron in gone_neurons])
    model = reference.adding(model, layer, "ffn", constant)
    want = logits(decoder.with_model(model))
    assert (logits(small) - want).abs().max() < 1e-4
    zeroed = shrink(decoder, small.layout.heads, small.layout.neurons, None, OPTIONS)
    assert (logits(zeroed) - want).abs().max() > 1e-2


def test_means_do_not_depend_on_order_or_batches() -> None:
    decoder = pico("llama-gqa")
    want = mean_compensation(decoder, *KEPT["llama-gqa"], rows_of(), OPTIONS)
    got = mean_compensation(decoder, *KEPT["llama-gqa"], rows_of()[::-1], Options(batch_tokens=1))
    for part, expected in ((got.attention, want.attention), (got.ffn, want.ffn)):
        for a, b in zip(part, expected, strict=True):
            assert a is not None
            assert b is not None
            assert torch.allclose(a, b, atol=1e-6)
            assert b.abs().max() > 1e-3


def test_a_layer_that_keeps_all_gets_no_constant() -> None:
    decoder = pico("llama")
    found = mean_compensation(decoder, *KEPT["llama"], rows_of(), OPTIONS)
    assert [c is None for c in found.attention] == [False, False, True, False]
    assert [c is None for c in found.ffn] == [False, False, True, False]


def test_a_mean_repairs_what_never_changes() -> None:
    # With one prompt of one token, a unit is its mean: nothing is lost.
    decoder = pico("gpt2")
    row = Encoded((4, 9), 1, Example("", ""))
    small = shrink(decoder, *KEPT["gpt2"], [row], OPTIONS)
    zeroed = shrink(decoder, *KEPT["gpt2"], None, OPTIONS)
    want = loss(decoder, [row])
    assert loss(small, [row]) == pytest.approx(want, abs=1e-4)
    assert abs(loss(zeroed, [row]) - want) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_one(name: str) -> None:
    decoder = pico(name)
    heads, neurons = KEPT[name]
    half = tuple(tuple(sorted({*kept, *range(0, decoder.head_shape[1], 2)})) for kept in heads)
    middle = shrink(decoder, half, decoder.layout.neurons, None, OPTIONS)
    assert middle.layout.heads == half
    twice = shrink(middle, heads, neurons, None, OPTIONS)
    once = shrink(decoder, heads, neurons, None, OPTIONS)
    assert same(state(twice), state(once))
    assert twice.layout == once.layout
    assert torch.equal(logits(twice), logits(once))
