"""The explain room: its values against direct runs of the model, and what holds by theory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_families import NAMES, family_model
from test_methods import tuned
from test_scoring import encoded, pico

from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, TaskError
from prune_edit.explain import (
    Question,
    answers_with,
    arithmetic_concepts,
    ask,
    attention_of,
    carries,
    carry_rows,
    explain_carries,
    explain_chain,
    explain_curves,
    explain_depth,
    explain_heads,
    explain_hidden,
    explain_lora,
    explain_lowest,
    explain_neurons,
    explain_prompt,
    neuron_means,
    question_concepts,
    token_rows,
)
from prune_edit.explain.curves import coefficients
from prune_edit.explain.hidden import Concepts, carry, count_named
from prune_edit.explain.paths import Paths, Unit, trace_paths
from prune_edit.explain.values import plain
from prune_edit.hooks import capture
from prune_edit.loading import load_decoder
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options, load_adapter
from prune_edit.scoring.importance import trace
from prune_edit.scoring.query import value_map
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import Encoded, collate, encode_all
from prune_edit.tasks.task import Example
from prune_edit.units import Units

OPTIONS = Options()
FEW = ("llama", "gpt2", "gptj", "gemma2", "falcon", "olmo2")
IDS = (1, 5, 9, 7, 12)


def asked(decoder: Decoder) -> Question:
    """A question of any model over ids, whatever its tokenizer would say."""
    with torch.no_grad():
        states = decoder.final_states(input_ids=torch.tensor([IDS]))
        best = int(decoder.unembed(states[0, -1]).argmax())
    row = Encoded((*IDS, best), len(IDS), Example("p", "a"))
    return Question("p", tuple("abcde"), "a", 0.5, (), (), row)


@pytest.fixture(scope="module", params=FEW)
def family(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(family_model(request.param, 3), load_decoder().tokenizer)


def paths_of(decoder: Decoder, count: int = 4) -> tuple[Question, Paths, list[Unit]]:
    question = asked(decoder)
    neurons = explain_neurons(decoder, [question.row], OPTIONS)
    chosen = [(row.layer, row.neuron) for row in neurons.rows if row.importance > 0][:count]
    weights = {unit: float(neurons.means.importance[unit]) for unit in chosen}
    return question, trace_paths(decoder, question.batch(decoder), weights, OPTIONS), chosen


# Questions


def test_what_is_explained_is_said_and_more_than_a_space(reference_model: Decoder) -> None:
    plain_one = ask(reference_model, "3+5=")
    assert (plain_one.answer, plain_one.notes) == ("8", ())
    assert plain_one.says[0] == ("8", plain_one.probability)
    spaced = ask(reference_model, "The sum of 3 and 5 is")
    assert spaced.answer == "8"
    assert spaced.tokens[-1] == "▁"
    assert "writes a space first" in spaced.notes[0]
    assert ask(reference_model, "3+5=", "8").row == plain_one.row


def test_an_answer_that_the_model_does_not_give_is_said_to_be_none(
    reference_model: Decoder,
) -> None:
    found = ask(reference_model, "3+5=", "9")
    assert found.answer == "8"
    (note,) = found.notes
    assert note.startswith("the model says '8' (p 0.99")
    assert "not '9' (p 0.00" in note


def test_an_answer_that_the_tokenizer_splits_is_explained_token_by_token(
    reference_model: Decoder,
) -> None:
    first = ask(reference_model, "15+37=", "52")
    assert first.answer == "5"
    assert first.notes == (
        "the tokenizer splits the answer into '5', '2'; explained is '5', --token 2 explains the "
        "next",
    )
    second = ask(reference_model, "15+37=", "52", 2)
    assert (second.answer, second.tokens[-1], second.notes) == ("2", "5", ())


@pytest.mark.parametrize(
    ("prompt", "answer", "token", "said"),
    [
        ("3+5=", None, 2, "token 2 is of no answer; give --answer too"),
        ("3+5=", "8", 3, r"token 3 is not in answer '8', which has 1; give 1 to 1"),
        ("Wörld", None, None, "words that are not in the model's vocabulary; reword it"),
        ("a " * 300, None, None, r"has 301 tokens, the model has 256 positions; shorten it"),
        ("a " * 300, "b", None, r"the model has 256 positions; shorten it"),
    ],
)
def test_prompts_that_cannot_be_explained(
    reference_model: Decoder, prompt: str, answer: str | None, token: int | None, said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        ask(reference_model, prompt, answer, token)


# Heads and carries


def test_heads_per_group_are_those_of_the_model_without_each(reference_model: Decoder) -> None:
    rows = encode_all(
        reference_model.tokenizer,
        [
            Example("3+5=", "8", "add"),
            Example("12+9=", "21", "add"),
            Example("9-4=", "5", "sub"),
        ],
        "test",
    )
    found = explain_heads(reference_model, rows, OPTIONS)
    assert [(each.group, each.examples) for each in found.maps] == [
        ("all", 3), ("add", 2), ("sub", 1),
    ]  # fmt: skip
    layer, head = found.of("add").best(1)[0]
    factors = torch.ones(reference_model.head_shape)
    factors[layer, head] = 0.0
    whole, without = (
        answers_with(reference_model, rows[:2], OPTIONS, "", lambda _, f=each: Units(heads=f))
        for each in (torch.ones_like(factors), factors)
    )
    assert whole.log_prob == pytest.approx(found.of("add").log_prob, abs=1e-6)
    assert found.of("add").log_prob_drops[layer][head] == pytest.approx(
        whole.log_prob - without.log_prob, abs=1e-4
    )
    assert found.of("add").accuracy_drops[layer][head] == whole.accuracy - without.accuracy
    assert found.of("sub").best(1, "accuracy") == found.of("sub").best(1)


def test_pruned_heads_have_no_number(reference_model: Decoder) -> None:
    layout = reference_model.layout
    heads = ((0, 8), *layout.heads[1:4], (), *layout.heads[5:])
    small = shrink(reference_model, heads, layout.neurons, None, OPTIONS)
    question = ask(small, "3+5=")
    found = explain_heads(small, [question.row], OPTIONS).of()
    there = [[each is not None for each in row] for row in found.log_prob_drops]
    assert [i for i, each in enumerate(there[0]) if each] == [0, 8]
    assert not any(there[4])
    neurons = explain_neurons(small, [question.row], OPTIONS)
    chain = explain_chain(small, question, neurons, OPTIONS, verify=True)
    assert all(each.layer != 4 for each in chain.heads)
    assert chain.edges
    json.dumps(chain.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["no deep neurons", "no neurons", "one head"])
def test_whatever_pruning_left_is_explained(kind: str, reference_model: Decoder) -> None:
    layout = reference_model.layout
    nothing: tuple[tuple[int, ...], ...] = ((),) * 8
    heads, neurons = {
        "no deep neurons": (layout.heads, (*layout.neurons[:4], *nothing[:4])),
        "no neurons": (layout.heads, nothing),
        "one head": (((8,), *nothing[1:]), layout.neurons),
    }[kind]
    small = shrink(reference_model, heads, neurons, None, OPTIONS)
    found = explain_prompt(small, "3+5=", OPTIONS, verify=True)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_html()
    assert found.depth.end == pytest.approx(math.log(found.question.probability), abs=1e-4)
    assert bool(found.curves.points) == (kind == "one head")
    assert ('"kind": "prompt"' in text) and bool(found.neurons.rows) == (kind != "no neurons")


@pytest.mark.parametrize(
    ("operation", "a", "b", "place", "said"),
    [
        ("add", 15, 32, 1, False),
        ("add", 15, 37, 1, True),
        ("add", 15, 37, 0, False),
        ("add", 57, 68, 2, True),
        ("add", 99, 1, 2, True),
        ("sub", 52, 37, 1, True),
        ("sub", 57, 32, 1, False),
    ],
)
def test_carries_of_the_papers_kind(operation: str, a: int, b: int, place: int, said: bool) -> None:
    assert carries(operation, a, b, place) is said
    assert carries(operation, a, b, 0) is False


def test_every_digit_is_memorised_or_changed_by_one(reference_model: Decoder) -> None:
    examples = [
        Example("15+32=", "47", "add", key="add 15 32"),
        Example("15+37=", "52", "add", key="add 15 37"),
        Example("fifteen plus two is", " seventeen", "add", key="add 2 15"),
        Example("9*9=", "81", "mul", key="mul 9 9 3 digits"),
    ]
    rows = encode_all(reference_model.tokenizer, examples, "test")
    found = carry_rows(reference_model, rows)
    kinds = [(row.example.group, reference_model.tokenizer.decode(row.answer)) for row in found]
    assert kinds == [
        ("add, memorize", "4"),
        ("add, memorize", "7"),
        ("add, change-one", "5"),
        ("add, memorize", "2"),
    ]
    maps = explain_carries(reference_model, rows, OPTIONS)
    assert maps is not None
    assert [each.examples for each in maps.maps] == [4, 1, 3]
    assert explain_carries(reference_model, rows[2:], OPTIONS) is None
    built_in = load_task("arithmetic/sub").sample("test", 40)
    encoded_ones = encode_all(reference_model.tokenizer, built_in, "test")
    assert {row.example.group for row in carry_rows(reference_model, encoded_ones)} == {
        "sub, memorize", "sub, change-one",
    }  # fmt: skip


def test_attention_is_of_the_heads_and_sums_to_one(reference_model: Decoder) -> None:
    question = ask(reference_model, "3+5=")
    found = attention_of(
        reference_model, question.batch(reference_model), question.tokens, [(0, 7), (2, 3)]
    )
    assert [row.name for row in found.rows] == ["0^7", "2^3"]
    for row in found.rows:
        assert sum(row.weights) == pytest.approx(1, abs=1e-5)
    with reference_model.eager():
        ids = torch.tensor([question.row.ids[:-1]])
        seen = reference_model.model(input_ids=ids, output_attentions=True).attentions
    for row in found.rows:
        want = seen[row.layer][0, row.head, -1].tolist()
        assert row.weights == pytest.approx(want, abs=1e-5)


# Neurons and depth


def test_neurons_are_cnas(reference_model: Decoder) -> None:
    rows = token_rows(encode_all(reference_model.tokenizer, [Example("12+9=", "21")], "test"))
    _, want = METHODS["cna"](reference_model, rows, OPTIONS)
    found = explain_neurons(reference_model, rows, OPTIONS, 5)
    assert torch.allclose(found.means.change.float(), want, atol=1e-5)
    assert [row.change for row in found.rows] == pytest.approx(
        want.flatten().topk(5).values.tolist(), abs=1e-5
    )
    assert found.changes == pytest.approx(want.double().sum(1).tolist(), abs=1e-4)
    assert found.rows[0].answer_rank is None  # two tokens have no answer of their own


def test_the_sign_of_a_neuron_says_which_tokens_it_promotes(reference_model: Decoder) -> None:
    question = ask(reference_model, "3+5=")
    found = explain_neurons(reference_model, [question.row], OPTIONS)
    seen = {row.promotes for row in found.rows}
    assert seen == {"top", "bottom"}
    for row in found.rows:
        assert (row.promotes == "top") == (row.coefficient >= 0)
        value = reference_model.values(row.layer)[row.neuron] * math.copysign(1, row.coefficient)
        logits = reference_model.unembedding @ value
        assert row.promoted[0][0] == reference_model.tokenizer.decode([int(logits.argmax())])
        order = logits.argsort(descending=True).tolist()
        assert row.answer_rank == 1 + order.index(question.row.answer[0])
        assert row.position == "="


@pytest.mark.parametrize("name", NAMES)
def test_increases_sum_to_the_log_probability(name: str) -> None:
    decoder = Decoder(family_model(name), load_decoder().tokenizer)
    row = asked(decoder).row
    found = explain_depth(decoder, [row], OPTIONS)
    whole = answers_with(decoder, [row], OPTIONS).log_prob
    total = found.start + sum(layer.attention + layer.ffn for layer in found.layers)
    assert total == pytest.approx(whole, abs=1e-5)
    assert found.end == pytest.approx(whole, abs=1e-5)
    assert max(abs(layer.ffn) for layer in found.layers) > 1e-3


# The chain


def test_what_heads_bring_splits_into_tokens(family: Decoder) -> None:
    """Exactly, but for the values' biases, which stand at every token alike."""
    _, paths, _ = paths_of(family)
    assert paths.fetched
    for layer, fetched in paths.fetched.items():
        rest = paths.brought[layer] - fetched.sum(1)
        values = family.layers[layer].get_submodule(family.family.values)
        if getattr(values, "bias", None) is None and family.family.rms_norm:
            assert rest.abs().max() < 1e-4
        assert fetched.abs().max() > 1e-2


def test_shares_into_a_neuron_are_of_its_key_products(family: Decoder) -> None:
    """All that a layer reads, taken from it, takes the whole of a key product, but for biases."""
    _, paths, chosen = paths_of(family)
    for unit in chosen:
        layer, slot = unit[0], paths.neuron_slot(*unit)
        read = paths.reads.ffn[layer].view_as(paths.states[layer])[0, paths.column].float()
        share, product = paths._into_neuron(unit, read)
        inputs = [family.layers[layer].get_submodule(path) for path in family.family.ffn_inputs]
        biased = any(getattr(each, "bias", None) is not None for each in inputs)
        if not biased and family.family.rms_norm:
            assert share == pytest.approx(len(paths.keys[unit]), abs=1e-3)
        assert product == pytest.approx(
            float((paths.keys[unit] @ _normed(family, layer, read) * _signs(paths, unit)).sum()),
            abs=1e-3,
        )
        assert paths.before[layer][:, slot].abs().min() > 0


def _normed(decoder: Decoder, layer: int, read: torch.Tensor) -> torch.Tensor:
    reader = decoder.ffn_reader(layer)
    if any(reader.children()):  # the FFN itself
        return read
    read = read if decoder.family.rms_norm else read - read.mean()
    return read / decoder.norm_divisor(reader, read)


def _signs(paths: Paths, unit: Unit) -> torch.Tensor:
    return paths.before[unit[0]][:, paths.neuron_slot(*unit)].sign()


def test_cuts_are_those_of_the_model_run_by_hand(family: Decoder) -> None:
    question, _, _ = paths_of(family)
    neurons = explain_neurons(family, [question.row], OPTIONS)
    chain = explain_chain(family, question, neurons, OPTIONS, verify=True)
    assert chain.verified
    kinds = {edge.stage for edge in chain.edges}
    assert {"feature enhancing", "feature transferring", "feature predicting"} <= kinds
    (batch, whole) = question.batch(family), answers_with(family, [question.row], OPTIONS)
    last = [each for each in chain.deep if each.layer == family.n_layers - 1]
    for each in last:  # in the last layer a neuron elsewhere can do nothing for the answer
        factors = torch.ones(family.neuron_shape)
        factors[each.layer, each.neuron] = 0.0
        gone = answers_with(
            family, [question.row], OPTIONS, "", lambda _, f=factors: Units(neurons=f)
        )
        (edge,) = [e for e in chain.edges if e.source == each.name and e.share is None]
        assert edge.measured_drop == pytest.approx(whole.log_prob - gone.log_prob, abs=1e-4)
        assert edge.product == pytest.approx(each.importance)
    heads = [edge for edge in chain.edges if edge.stage == "feature predicting"]
    for edge in heads[:4]:
        head, unit = ([int(x) for x in name.replace("^", "_").split("_")]
                      for name in (edge.source, edge.target))  # fmt: skip
        old, new = _without_edge(family, batch, (head[0], head[1]), (unit[0], unit[1]))
        assert edge.measured_share == pytest.approx((old - new) / old, abs=2e-3, rel=2e-3)


@torch.no_grad()
def _without_edge(decoder: Decoder, batch: Any, head: Unit, unit: Unit) -> tuple[float, float]:
    """A neuron's coefficient, and that with a head's part taken from what its FFN reads."""
    factors = torch.ones(decoder.head_shape)
    factors[head] = 0.0
    layer, slot = head[0], decoder.layout.slots[head[0]].index(head[1])
    part = slice(slot * decoder.head_dim, (slot + 1) * decoder.head_dim)
    projection = decoder.attention_output(layer)
    assert projection is not None
    norm = decoder.attention_output_norm(layer)
    seen: dict[str, torch.Tensor] = {}
    keep = norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])) if norm else None
    with capture(decoder) as whole:
        decoder.final_states(**batch.inputs)
    if keep is not None:
        keep.remove()
    added = whole.heads[layer][0, -1, part] @ decoder.output_weight(projection)[part]
    if norm is not None:
        scale = (seen["x"][0, -1].pow(2).mean() + getattr(norm, "eps", 1e-6)).sqrt()
        weight: Any = norm.weight
        added = added * (weight + decoder.family.norm_offset) / scale

    def take(module: Any, args: Any, kwargs: Any) -> Any:
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states.view(1, -1, states.shape[-1])[0, -1] -= added
        return (
            ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
        )

    hook = decoder.ffn_reader(unit[0]).register_forward_pre_hook(take, with_kwargs=True)
    with capture(decoder) as cut:
        decoder.final_states(**batch.inputs)
    hook.remove()
    place = unit[0], (0, -1, unit[1])
    return tuple(float(each.coefficients[place[0]][place[1]]) for each in (whole, cut))  # type: ignore[return-value]


def test_a_chain_reads_the_four_stages_of_a_sum(reference_model: Decoder) -> None:
    question = ask(reference_model, "3+5=")
    neurons = explain_neurons(reference_model, [question.row], OPTIONS)
    chain = explain_chain(reference_model, question, neurons, OPTIONS)
    assert not chain.verified
    assert all(edge.measured_share is None for edge in chain.edges)
    assert min(chain.deep, key=lambda each: (each.layer, each.neuron)).root
    assert sum(each.root for each in chain.deep) == 1
    assert chain.concepts == "numbers and operations"
    names = {f"{each.name} @{each.position}" for each in chain.shallow}
    names |= {each.name for each in (*chain.heads, *chain.deep)} | {"8"}
    names |= {f"{token} @{i}" for i, token in enumerate(chain.tokens)}
    for edge in chain.edges:
        assert {edge.source, edge.target} <= names
    top = explain_heads(reference_model, [question.row], OPTIONS).of().best(1)[0]
    assert top in [(each.layer, each.head) for each in chain.heads if each.predicts]
    sizes = [abs(each or 0.0) for row in chain.carriers for each in row]
    assert 0.1 < sum(sizes) <= 1.0 + 1e-6


# Curves, the lowest neuron


def test_all_neurons_kept_is_the_model_and_all_zeroed_is_all_zeroed(
    reference_model: Decoder,
) -> None:
    rows = encode_all(
        reference_model.tokenizer, [Example("3+5=", "8"), Example("12+9=", "21")], "test"
    )
    found = explain_curves(reference_model, rows, OPTIONS, (10, 10**6), draws=1)
    few, every = found.points
    assert every.neurons == found.of == 3 * reference_model.neuron_shape[1]
    assert every.kept_log_prob == pytest.approx(found.log_prob, abs=1e-5)
    assert every.random_kept_log_prob == pytest.approx(found.log_prob, abs=1e-5)
    assert every.zeroed_log_prob == pytest.approx(every.random_zeroed_log_prob, abs=1e-5)
    gone = torch.ones(reference_model.neuron_shape)
    gone[5:] = 0.0
    want = answers_with(reference_model, rows, OPTIONS, "", lambda _: Units(neurons=gone))
    assert every.zeroed_log_prob == pytest.approx(want.log_prob, abs=1e-5)
    # The few that CNA finds are worth more than as many others.
    assert few.zeroed_log_prob < few.random_zeroed_log_prob < found.log_prob
    assert few.kept_log_prob > few.random_kept_log_prob


def test_the_lowest_neuron_of_a_case_is_zeroed_alone(reference_model: Decoder) -> None:
    row = ask(reference_model, "3+5=").row
    found = explain_lowest(reference_model, [row], OPTIONS, (10,))
    change = neuron_means(reference_model, [row], OPTIONS).change
    deep = change[5:]
    best = [(5 + int(i) // 384, int(i) % 384) for i in deep.flatten().topk(10).indices]
    low = min(best, key=lambda unit: unit[0])
    factors = torch.ones(reference_model.neuron_shape)
    factors[low] = 0.0
    batch = collate([row])
    before, after = (
        coefficients(reference_model, trace(reference_model, batch, units)).view(change.shape)
        for units in (None, Units(neurons=factors))
    )
    others = [unit for unit in best if unit != low]
    sizes = sum(abs(float(before[unit])) for unit in others)
    moved = sum(float(after[unit]) * math.copysign(1, float(before[unit])) for unit in others)
    assert found.rows[0].without_lowest == pytest.approx(1 - moved / sizes, abs=1e-5)
    assert found.rows[0].without_head > 0.2
    assert abs(found.rows[0].without_random) < found.rows[0].without_head


# Hidden-interpretable neurons


def test_concepts_are_numbers_however_they_are_written(reference_model: Decoder) -> None:
    found = arithmetic_concepts(reference_model)
    tokenizer: Any = reference_model.tokenizer
    named = {tokenizer.decode([token]).strip(): concept for token, concept in found.of.items()}
    assert named["8"] == named["eight"] == "8"
    assert (named["seventy"], named["plus"], named["+"]) == ("70", "addition", "addition")
    assert "Paris" not in named
    words = question_concepts(reference_model, ask(reference_model, "The capital of France is"))
    assert {"france", "capital", "paris"} <= set(words.of.values())


def test_counting_concepts_is_counting(reference_model: Decoder) -> None:
    concepts = arithmetic_concepts(reference_model)
    vectors = reference_model.values(2)[:20]
    want = []
    for vector in vectors:
        top = (reference_model.unembedding @ vector).topk(7).indices.tolist()
        want.append(len({concepts.of[token] for token in top if token in concepts.of}))
    assert count_named(reference_model, vectors, concepts, 7).tolist() == want
    assert max(want) > 0


@torch.no_grad()
def test_carrying_is_attention_to_the_token_itself(family: Decoder) -> None:
    """A layer shown one token gives its value-output map; differences leave biases out."""
    values = value_map(family, 1, OPTIONS)
    assert values is not None
    torch.manual_seed(0)
    one, two = torch.randn(2, family.unembedding.shape[1])
    got = carry(family, 1, values, one) - carry(family, 1, values, two)
    assert torch.allclose(got, carry(family, 1, values, one - two), atol=1e-3)
    assert got.abs().max() > 1e-3


def test_chance_is_the_share_of_all_choices(reference_model: Decoder) -> None:
    rows = encode_all(reference_model.tokenizer, [Example("3+5=", "8")], "test")
    tokens = {27 + i: str(i) for i in range(3)}
    found = explain_hidden(
        reference_model, rows, OPTIONS, Concepts("some", tokens), (1, 2), tokens=5, draws=1
    )
    size = len(reference_model.unembedding)
    ways = [0, 0, 0, 0]
    for k in range(4):
        ways[k] = math.comb(3, k) * math.comb(size - 3, 5 - k)
    assert found.rows[0].chance == pytest.approx(1 - ways[0] / sum(ways))
    assert found.rows[1].chance == pytest.approx((ways[2] + ways[3]) / sum(ways))
    small = sum(any(i in (0, 1) for i in some) for some in combinations(range(6), 2))
    assert small == math.comb(6, 2) - math.comb(4, 2)  # the same count by hand
    assert found.layers == (0, 1, 2, 3)
    assert 0 <= found.rows[1].neurons <= 4 * 384


# LoRA


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_an_adapter_is_seen_where_it_is(name: str, tmp_path: Path) -> None:
    decoder = replace(pico(name), tokenizer=load_decoder().tokenizer)
    tuned(name, tmp_path / "adapter")
    adapted = load_adapter(decoder, tmp_path / "adapter")
    found = explain_lora(decoder, adapted, encoded(), OPTIONS, (2, 5), top=3)
    assert all(layer.weights > 0 for layer in found.layers)
    sides = [neuron_means(each, encoded(), OPTIONS) for each in (adapted, decoder)]
    change = sides[0].importance - sides[1].importance
    assert found.neurons.rows[0].change == pytest.approx(float(change.nan_to_num(-9).max()))
    row = found.neurons.rows[0]
    assert row.coefficient_other == pytest.approx(
        float(sides[1].coefficient[row.layer, row.neuron])
    )
    base, new = (answers_with(each, encoded(), OPTIONS) for each in (decoder, adapted))
    assert found.tuned_log_prob - found.base_log_prob == pytest.approx(new.log_prob - base.log_prob)
    (case,) = token_rows(encoded()[:1])[:1]
    (two,) = explain_lora(decoder, adapted, [case], OPTIONS, (2,)).amplification
    sides = [neuron_means(each, [case], OPTIONS) for each in (adapted, decoder)]
    for ranking, got in (
        (sides[0].importance - sides[1].importance, two.by_change),
        (sides[1].importance, two.by_importance),
    ):
        best = ranking.flatten().nan_to_num(-9).topk(2).indices
        new, old = (float(each.coefficient.flatten()[best].abs().sum()) for each in sides)
        assert got == pytest.approx(new / old - 1, abs=1e-4)


def test_nothing_tuned_is_nothing_changed() -> None:
    decoder = replace(pico("llama-gqa"), tokenizer=load_decoder().tokenizer)
    found = explain_lora(decoder, decoder, encoded(), OPTIONS, (3,), top=3)
    assert found.base_accuracy == found.tuned_accuracy
    assert {layer.weights for layer in found.layers} == {0.0}
    assert found.amplification[0].by_change == pytest.approx(0, abs=1e-6)
    assert all(not each for row in found.heads for each in row)


def test_a_model_of_other_units_is_no_tuned_one() -> None:
    with pytest.raises(ModelError, match="tune the model that is scored"):
        explain_lora(pico("llama-gqa"), pico("gpt2"), encoded(), OPTIONS)


# Values


def test_values_have_a_json_form_without_nan() -> None:
    assert plain(float("nan")) is None
    assert plain({"a": (1.5, float("inf")), 2: "x"}) == {"a": [1.5, None], "2": "x"}


def test_values_are_the_same_every_time(reference_model: Decoder) -> None:
    def once() -> Sequence[Any]:
        question = ask(reference_model, "9-4=")
        neurons = explain_neurons(reference_model, [question.row], OPTIONS)
        return [
            question.to_dict(),
            neurons.to_dict(),
            explain_chain(reference_model, question, neurons, OPTIONS, verify=True).to_dict(),
            explain_curves(reference_model, [question.row], OPTIONS, (5,)).to_dict(),
        ]

    assert json.dumps(once()) == json.dumps(once())
