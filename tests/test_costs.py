"""Costs are those of models that were really shrunk; latency is fitted as it was made."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pico_checkpoint import dense
from pico_families import NAMES, family_model

from prune_edit.costs import Costs, counted_costs
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.evaluation import latency
from prune_edit.evaluation.cost import count_parameters, flops_per_token
from prune_edit.layout import Kept
from prune_edit.recover.shrink import shrink
from prune_edit.running import Running

PRUNABLE = ("llama", "llama-gqa", "llama-biased", "mistral", "gpt2")


def decoder(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


def some(decoder: Decoder, seed: int) -> tuple[Kept, Kept]:
    """Any units, a layer without heads and one without neurons among them."""
    draw = random.Random(seed)

    def pick(width: int, share: float) -> tuple[int, ...]:
        return tuple(unit for unit in range(width) if draw.random() < share)

    layout = decoder.layout
    shares = [draw.choice([0.0, 0.3, 0.7, 1.0]) for _ in range(2 * layout.n_layers)]
    heads = [pick(layout.n_heads, share) for share in shares[: layout.n_layers]]
    heads[0] = heads[0] or (draw.randrange(layout.n_heads),)
    neurons = [pick(layout.n_neurons, share) for share in shares[layout.n_layers :]]
    return tuple(heads), tuple(neurons)


def biases(decoder: Decoder) -> int:
    """Numbers in the output biases, which stay whatever goes."""
    total = 0
    for layer in decoder.layers:
        for path in (decoder.family.attention_output, decoder.family.ffn_output):
            there = dict(layer.named_parameters()).get(f"{path}.bias")
            total += 0 if there is None else there.numel()
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PRUNABLE)
def test_the_parameters_that_go_are_the_costs_that_go(name: str, seed: int) -> None:
    whole = decoder(name)
    costs = counted_costs(whole, "parameters")
    small = shrink(whole, *some(whole, seed), None, Running())
    gone = count_parameters(whole) - count_parameters(small)
    assert gone > 0
    assert costs.of(whole.layout) - costs.of(small.layout) == gone
    assert biases(small) == biases(whole)
    assert costs.of_units(small.layout.heads, small.layout.neurons) == costs.of(small.layout)
    # A pruned model's own costs agree, so that it can be pruned again.
    again = counted_costs(small, "parameters")
    assert again.of(small.layout) == costs.of(small.layout)


@pytest.mark.parametrize("name", PRUNABLE)
def test_a_mean_in_place_of_units_adds_its_biases_alone(name: str) -> None:
    whole = decoder(name)
    costs = counted_costs(whole, "parameters")
    kept = some(whole, 0)
    rows: Any = _prompts(whole)
    small = shrink(whole, *kept, rows, Running())
    added = biases(small) - biases(whole)
    gone = count_parameters(whole) - count_parameters(small)
    assert costs.of(whole.layout) - costs.of(small.layout) == gone + added


def _prompts(whole: Decoder) -> list[Any]:
    from prune_edit.tasks.prompts import Encoded
    from prune_edit.tasks.task import Example

    return [Encoded((5, 6, 7, 8), 2, Example("", ""))]


@pytest.mark.parametrize("name", PRUNABLE)
def test_flops_are_those_of_the_evaluation(name: str) -> None:
    whole = decoder(name)
    small = shrink(whole, *some(whole, 3), None, Running())
    for context in (1, 64):
        costs = counted_costs(whole, "flops", context)
        gone = flops_per_token(whole, context) - flops_per_token(small, context)
        assert costs.of(whole.layout) - costs.of(small.layout) == gone
    beyond = counted_costs(whole, "flops", 10_000)
    assert beyond == counted_costs(whole, "flops", 64)  # the model has no more positions


def test_bytes_follow_the_number_format() -> None:
    whole = decoder("llama-gqa")
    parameters = counted_costs(whole, "parameters").of(whole.layout)
    assert counted_costs(whole, "bytes").of(whole.layout) == 4 * parameters
    half = decoder("llama-gqa")
    half.model.to(torch.bfloat16)
    assert counted_costs(half, "bytes").of(half.layout) == 2 * parameters


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_counted_whole(name: str) -> None:
    model = Decoder(family_model(name), None)  # type: ignore[arg-type]
    every = sum(
        parameter.numel()
        for layer in model.layers
        for parameter in layer.parameters()
        if parameter.dim() == 2
    )
    context = 8
    seen = 2 * 2 * 2 * 4 * model.head_dim * context  # layers, scores and values, heads
    assert counted_costs(model, "flops", context).of(model.layout) == 2 * every + seen


def test_a_group_goes_with_its_last_head_and_pads_cost_as_heads() -> None:
    whole = decoder("llama-gqa")  # 8 heads in 2 groups, E = 4, D = 32
    costs = counted_costs(whole, "parameters")
    slot, group = 2 * 4 * 32, 2 * 4 * 32
    assert (costs.slot[0], costs.group[0]) == (slot, group)
    assert costs.of_heads(0, (4, 4)) == 8 * slot + 2 * group
    assert costs.of_heads(0, (3, 0)) == 3 * slot + group
    assert costs.of_heads(0, (3, 1)) == 6 * slot + 2 * group
    assert costs.of_heads(0, (0, 0)) == 0
    assert costs.sizes((0, 1, 5)) == (2, 1)


def test_an_unknown_cost_names_those_there_are() -> None:
    with pytest.raises(BudgetError, match="cost 'joules' is unknown; give parameters, flops"):
        counted_costs(decoder("gpt2"), "joules")


# Latency


class Clockwork:
    """In place of a timed run: seconds made up from the sizes, with a machine that slows down."""

    turn = 0
    made: Any = None

    def __init__(self, model: Decoder, prompt: Any, following: Any) -> None:
        self.model, self.steps = model, following.shape[1]
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def repeat(self) -> None:
        Clockwork.turn += 1
        noise = 0.5 if Clockwork.turn % 41 == 0 else 0.0  # now and then something else runs
        layout = self.model.layout
        blocks = (
            sum(map(bool, layout.heads)), sum(map(len, layout.slots)),
            sum(map(len, layout.kv_heads)), sum(map(bool, layout.neurons)),
            sum(map(len, layout.neurons)),
        )  # fmt: skip
        self.prefill.append(
            3.0 + noise + sum(a * b for a, b in zip(blocks, self.made, strict=True))
        )
        self.decode.append(0.1)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("llama-gqa", (0.2, 0.01, 0.03, 0.1, 0.002)),
        ("gpt2", (0.2, 0.01, 0.0, 0.1, 0.0005)),
        ("llama-gqa", (0.2, 0.0, 0.0, 0.1, 0.0)),
    ],
)
def test_latency_finds_the_costs_it_was_made_of(
    name: str, made: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "Run", Clockwork)
    monkeypatch.setattr(Clockwork, "made", made)
    costs = latency.measure_latency(decoder(name), seconds=0.0)
    attention, slot, group, ffn, neuron = made
    for got, want in (
        (costs.attention, attention), (costs.slot, slot), (costs.group, group), (costs.ffn, ffn),
        (costs.neuron, neuron),
    ):  # fmt: skip
        assert got[0] == pytest.approx(want, abs=1e-9)
        assert len(set(got)) == 1


def test_costs_below_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "Run", Clockwork)
    monkeypatch.setattr(Clockwork, "made", (0.2, 0.01, 0.03, 0.1, -0.002))
    costs = latency.measure_latency(decoder("llama-gqa"), seconds=0.0)
    assert costs.neuron[0] == 0
    assert costs.ffn[0] > 0


def test_latency_really_runs_and_costs_something() -> None:
    costs = latency.measure_latency(decoder("llama-gqa"), seconds=0.0)
    assert costs.kind == "latency"
    assert min(costs.slot[0], costs.group[0], costs.neuron[0]) >= 0
    assert costs.of(decoder("llama-gqa").layout) > 0
    assert Costs(**{**costs.to_dict(), **_lists(costs)}) == costs


def _lists(costs: Costs) -> dict[str, Any]:
    named = costs.to_dict()
    layers = len(costs.slot)
    return {
        name: (value,) * layers if isinstance(value, int | float) else tuple(value)
        for name, value in named.items()
        if name not in ("kind", "group_size")
    }
