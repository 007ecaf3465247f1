"""Every family is scored exactly: its row, its norms, its residual stream, its fused weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from pico_families import CONFIGS, NAMES, V, family_model
from reference import Prompt

from prune_edit import families
from prune_edit.decoder import Decoder
from prune_edit.errors import UnsupportedFamilyError
from prune_edit.evaluation.accuracy import answer_sums, correct
from prune_edit.families import FAMILIES, STOCK
from prune_edit.hooks import capture, scale
from prune_edit.layout import Layout
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.replay import record
from prune_edit.scoring import METHODS, Options, predicted_targets
from prune_edit.scoring.importance import importances
from prune_edit.scoring.intervention import head_drops
from prune_edit.scoring.query import keys_of
from prune_edit.scoring.true_norm import true_importances
from prune_edit.support import check_supported
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

OPTIONS = Options()
PROMPTS = (
    Prompt((3, 9, 27, 4, 12, 36, 2), 5),  # two answer tokens, longer than the sliding windows
    Prompt((11, 2, 19, 28), 3),
    Prompt((5, 25, 8), 2),
)
every_family = pytest.mark.parametrize("name", NAMES)


@cache
def _pico(name: str) -> Decoder:
    return Decoder(family_model(name), None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    assert "name" not in params or hooks_of(_pico(params["name"])) == 0


def encoded(prompts: tuple[Prompt, ...] = PROMPTS) -> list[Encoded]:
    return [Encoded(p.ids, p.start, Example(str(p.ids), "")) for p in prompts]


def hooks_of(decoder: Decoder) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in decoder.model.modules()
    )


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    assert want.abs().max() > 10 * tolerance, "the figures are too small to tell anything"
    assert (got - want).abs().max() <= tolerance


def all_units(decoder: Decoder) -> Units:
    return Units(torch.ones(decoder.head_shape), torch.ones(decoder.neuron_shape))


def test_every_row_has_a_pico_model() -> None:
    assert {name.partition("-")[0] for name in NAMES} == {row.model_type for row in STOCK}
    for name in NAMES:
        assert _pico(name).family.model_type == name.partition("-")[0]


@every_family
def test_sizes(name: str) -> None:
    decoder, fields = _pico(name), CONFIGS[name][1]
    layers = fields.get("num_hidden_layers", fields.get("n_layer"))
    assert decoder.head_shape == (layers, 4)
    assert decoder.neuron_shape == (layers, 12)
    assert decoder.head_dim == fields.get("head_dim", 8)
    assert decoder.max_positions == 64
    assert decoder.unembedding.shape == (V, 32)
    weight = decoder.module(decoder.family.embedding).weight
    assert isinstance(weight, torch.Tensor) and weight.shape[0] == V


# Checks 1 to 3: the doors


def ablation_error(decoder: Decoder) -> tuple[float, float]:
    """How far hooked ablation is from zeroed weights, and how little a layer's units can matter."""
    inputs = collate(encoded()).inputs
    real = inputs["attention_mask"].bool()
    before = decoder.model(**inputs).logits[real]
    errors: list[float] = []
    effects: dict[tuple[str, int], float] = {}
    for layer in range(decoder.n_layers):
        # A neuron behind a ReLU can be silent on a few prompts; three are not.
        for kind, unit in zip(("heads", "heads", *["neurons"] * 3), (1, 3, 2, 6, 11), strict=True):
            units = all_units(decoder)
            getattr(units, kind)[layer, unit] = 0
            with scale(decoder, units):
                got = decoder.model(**inputs).logits[real]
            zeroed = reference.without(decoder.model, **{kind: [(layer, unit)]})
            want = zeroed(**inputs).logits[real]
            errors.append(float((got - want).abs().max()))
            effect = float((want - before).abs().max())
            effects[kind, layer] = max(effect, effects.get((kind, layer), 0.0))
    return max(errors), min(effects.values())


def sum_error(decoder: Decoder) -> float:
    """How far the captured units, through the projections, are from what the blocks give."""
    outputs: dict[tuple[str, int], torch.Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            outputs[key] = found.detach().clone()  # Falcon adds to its FFN's output in place

        return hook

    model: Any = decoder.model
    handles = []
    for layer, block in enumerate(reference.layers(model)):
        for part, path in (("attention", decoder.family.attention), ("ffn", decoder.family.ffn)):
            module = block.get_submodule(path or decoder.family.ffn_output)
            handles.append(module.register_forward_hook(keep((part, layer))))
    with capture(decoder) as seen:
        decoder.final_states(**collate(encoded()).inputs)
    for handle in handles:
        handle.remove()
    size, errors = decoder.head_dim, []
    for layer in range(decoder.n_layers):
        assert seen.heads[layer].shape[-1] == size * 4
        weight = reference.attention_weight(model, layer)
        heads = sum(
            seen.heads[layer][..., h * size : (h + 1) * size] @ weight[h * size : (h + 1) * size]
            for h in range(4)
        )
        values = reference.values(model, layer)
        neurons = sum(seen.coefficients[layer][..., k, None] * values[k] for k in range(12))
        for part, total in (("attention", heads), ("ffn", neurons)):
            bias = reference.projection(model, layer, part).bias
            total = total if bias is None else total + bias
            want = outputs[part, layer].view_as(total)
            assert want.abs().max() > 0.1
            errors.append(float((total - want).abs().max()))
    return max(errors)


@torch.no_grad()
@every_family
def test_hooked_ablation_is_zeroed_weights(name: str) -> None:
    error, effect = ablation_error(_pico(name))
    assert error <= 1e-5
    assert effect > 1e-3


@torch.no_grad()
@every_family
def test_units_sum_to_their_block(name: str) -> None:
    assert sum_error(_pico(name)) <= 1e-5


@torch.no_grad()
@every_family
def test_each_example_can_have_its_own_factors(name: str) -> None:
    decoder = _pico(name)
    inputs = collate(encoded()).inputs
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(len(PROMPTS), *decoder.head_shape, generator=generator)
    neurons = torch.rand(len(PROMPTS), *decoder.neuron_shape, generator=generator)
    with scale(decoder, Units(heads, neurons)):
        together = decoder.model(**inputs).logits
    for i in range(len(PROMPTS)):
        with scale(decoder, Units(heads[i], neurons[i])):
            alone = decoder.model(**inputs).logits[i]
        assert_near(together[i], alone, 2e-5)


@torch.no_grad()
@every_family
def test_scaling_by_one_changes_nothing(name: str) -> None:
    decoder = _pico(name)
    inputs = collate(encoded()).inputs
    before = decoder.model(**inputs).logits
    for units in (all_units(decoder), Units()):
        with scale(decoder, units), capture(decoder):
            assert torch.equal(decoder.model(**inputs).logits, before)
    with scale(decoder, Units(heads=torch.full(decoder.head_shape, 1.01))):
        assert not torch.equal(decoder.model(**inputs).logits, before)


class Boom(Exception):
    """Raised in the middle of a forward pass."""


@every_family
def test_no_hook_survives_an_exception(name: str) -> None:
    decoder = _pico(name)

    def boom(*args: Any) -> None:
        raise Boom

    handle = decoder.layers[-1].register_forward_hook(boom)
    try:
        for act in (
            lambda: record(decoder, collate(encoded()).inputs),
            lambda: importances(decoder, collate(encoded()), all_units(decoder)),
            lambda: METHODS["cna"](decoder, encoded(), OPTIONS),
        ):
            with pytest.raises(Boom):
                act()
            assert hooks_of(decoder) == 1
    finally:
        handle.remove()
    assert hooks_of(decoder) == 0


# Check 6: wrong doors are noticed


def with_row(decoder: Decoder, **changes: Any) -> Decoder:
    """The same model, read by a wrong row."""
    wrong = Decoder(decoder.model, decoder.tokenizer)
    vars(wrong)["family"] = replace(decoder.family, **changes)
    return wrong


def fails(check: Any, decoder: Decoder) -> bool:
    """Whether a check notices: by its figure, or because shapes no longer fit."""
    try:
        found = check(decoder)
    except (AssertionError, AttributeError, RuntimeError):
        return True
    error = found[0] if isinstance(found, tuple) else found
    return bool(error > 1e-3)


@torch.no_grad()
@every_family
def test_wrong_doors_fail_the_checks(name: str) -> None:
    decoder = _pico(name)
    row = decoder.family
    assert not fails(ablation_error, decoder) and not fails(sum_error, decoder)
    wrong: list[dict[str, Any]] = [
        {"attention_output": row.queries},  # the block's input
        {"attention_output": row.ffn_output},
        {"ffn_output": row.ffn_inputs[0]},  # the FFN's input instead of its coefficients
        {"ffn_output": row.attention_output},
    ]
    for changes in wrong:
        assert fails(ablation_error, with_row(decoder, **changes)), changes
        assert fails(sum_error, with_row(decoder, **changes)), changes


@torch.no_grad()
@every_family
def test_gates_behind_the_layer_fail_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layer's output has as many numbers as the heads together, where E = D / H.
    monkeypatch.setattr(Decoder, "attention_output", lambda self, layer: _Behind(self, layer))
    assert fails(ablation_error, _pico(name))


class _Behind:
    """Stands for a module; a hook before it is a hook behind its layer."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self.block = decoder.layers[layer]

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        def behind(module: Any, args: Any, output: Any) -> Any:
            pair = isinstance(output, tuple)
            states = output[0] if pair else output
            changed = hook(module, (states,))
            if changed is None:
                return output
            return (changed[0], *output[1:]) if pair else changed[0]

        return self.block.register_forward_hook(behind)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma2", {"ffn_output_norm": None}),
        ("gemma2", {"softcap_key": None}),
        ("gemma2", {"ffn_norm": "post_attention_layernorm"}),
        ("gemma3_text", {"norm_offset": 0.0}),
        ("olmo2", {"ffn_output_norm": None}),
        ("olmo2", {"ffn_norm": "post_feedforward_layernorm"}),
        ("gptj", {"ffn_norm": "ln_1"}),
        ("gpt_neox", {"ffn_norm": "post_attention_layernorm"}),
        ("falcon-new", {"ffn_norm": "ln_mlp"}),
        ("opt", {"ffn_norm": "self_attn_layer_norm"}),
        ("opt", {"rms_norm": True}),
        ("llama", {"rms_norm": False}),
    ],
)
def test_a_wrong_stream_or_norm_changes_importance(name: str, changes: dict[str, Any]) -> None:
    decoder, batch = _pico(name), collate(encoded())
    right, _ = importances(decoder, batch)
    wrong, _ = importances(with_row(decoder, **changes), batch)
    assert (right - wrong).abs().max() > 1e-2


# Check 4: the oracle


@torch.no_grad()
@every_family
def test_residual_and_coefficients_are_the_oracles(name: str) -> None:
    decoder = _pico(name)
    prompt = PROMPTS[0]
    with capture(decoder) as seen:
        final = decoder.final_states(**collate(encoded((prompt,))).inputs)
    ids = prompt.ids[:-1]
    for layer in range(decoder.n_layers):
        want = reference.residual_outputs(decoder.model, layer, ids)
        assert_near(seen.residual[layer][0], want, 2e-5)
        want = reference.coefficients(decoder.model, layer, ids)
        assert_near(seen.coefficients[layer][0], want, 2e-5)
    assert seen.final is not None
    assert_near(seen.final[0], reference.final_states(decoder.model, ids), 2e-5)
    logits = decoder.unembed(final)[0].log_softmax(-1)
    assert_near(logits, reference.log_probs(decoder.model, ids), 2e-5)
    # At the real state and its own scale the frozen norm is the model's.
    frozen = reference.frozen_log_probs(decoder.model, seen.final[0, -1], seen.final[0, -1])
    assert_near(frozen, logits[-1], 2e-5)


@torch.no_grad()
@every_family
def test_shares_sum_to_what_the_layer_adds(name: str) -> None:
    """Through post-norms, too: x + A and the neurons' shares make the layer's output."""
    decoder = _pico(name)
    last = decoder.n_layers - 1
    with capture(decoder) as seen:
        decoder.final_states(**collate(encoded()).inputs)
    shares = seen.effective(last) @ decoder.residual_values(last)
    bias = reference.ffn_bias(decoder.model, last)
    if bias is not None:
        shares = shares + bias
    assert seen.final is not None
    assert_near(seen.residual[last] + shares, seen.final, 2e-5)


@every_family
def test_methods_equal_the_oracle(name: str) -> None:
    decoder = _pico(name)
    prompt, model = PROMPTS[0], decoder.model  # how prompts combine is the same for all families
    want_heads = reference.head_scores(model, [prompt])
    ablated = reference.without(model, [divmod(int(want_heads.argmax()), 4)])
    whole, changed = (
        torch.stack(
            [
                torch.stack(
                    [
                        reference.importances(side, prompt, place, layer, unablated=model)
                        for layer in range(decoder.n_layers)
                    ]
                )
                for place in range(prompt.start, len(prompt.ids))
            ]
        ).mean(0)
        for side in (model, ablated)
    )
    for method, want in (("importance", whole), ("cna", whole - changed)):
        heads, neurons = METHODS[method](decoder, encoded((prompt,)), OPTIONS)
        assert_near(heads, want_heads, 1e-4)
        assert_near(neurons, want, 1e-4)


@torch.no_grad()
@every_family
def test_true_norm_importance_is_the_oracles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompt = _pico(name), PROMPTS[0]
    batch = collate(encoded((prompt,)))
    want = torch.stack(
        [
            torch.stack(
                [
                    reference.true_importances(decoder.model, prompt, place, layer)
                    for layer in range(decoder.n_layers)
                ]
            )
            for place in range(prompt.start, len(prompt.ids))
        ]
    )
    for block in (1 << 21, 5 * V, 1):
        monkeypatch.setattr("prune_edit.scoring.true_norm._BLOCK", block)
        assert_near(true_importances(decoder, batch), want, 5e-5)
    frozen, _ = importances(decoder, batch)
    assert (frozen - want).abs().max() > 1e-3, "the norm's divisor makes no difference here"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"ffn_output_norm": None}),
        ("gemma2", {"softcap_key": None}),
        ("gemma3_text", {"norm_offset": 0.0}),
        ("olmo2", {"ffn_output_norm": None}),
    ],
)
def test_a_wrong_norm_changes_true_norm_importance(name: str, changes: dict[str, Any]) -> None:
    batch = collate(encoded())
    right = true_importances(_pico(name), batch)
    assert (right - true_importances(with_row(_pico(name), **changes), batch)).abs().max() > 1e-2


@torch.no_grad()
def test_the_unembeddings_bias_counts_with_the_true_norm() -> None:
    decoder, batch = _pico("gptj"), collate(encoded())
    right = true_importances(decoder, batch)
    bare: Any = copy.deepcopy(decoder.model)
    bare.lm_head.bias.zero_()
    wrong = true_importances(Decoder(bare, None), batch)  # type: ignore[arg-type]
    assert (right - wrong).abs().max() > 1e-2


@torch.no_grad()
@every_family
def test_query_is_by_hand(name: str) -> None:
    """Whatever stands before and behind attention and FFN, and whichever of them comes first."""
    decoder = _pico(name)
    if reference.anatomy(decoder.model).parallel:  # two layers bring nothing of a neuron to an FFN
        decoder = Decoder(family_model(name, layers=3), None)  # type: ignore[arg-type]
    prompts = PROMPTS[:2]
    # The deepest layer has them, and the one below, so that every way into them counts.
    importance = reference.neuron_scores(decoder.model, prompts, False)
    top = importance.flatten().topk(10)
    width = importance.shape[1]
    deep = [
        (unit // width, unit % width, value)
        for unit, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if value > 0
    ]
    want = reference.query(decoder.model, prompts, deep)
    got = METHODS["query"](decoder, encoded(prompts), replace(OPTIONS, query_neurons=10))
    for part, expected in zip(got, want, strict=True):
        assert_near(part, expected, 2e-5 * float(expected.abs().max()) + 1e-7)
        assert (part != 0).any()


@torch.no_grad()
def test_query_keys_are_folded_with_the_norm_as_applied() -> None:
    model: Any = _pico("gemma2").model
    block = model.model.layers[1]
    weight = 1 + block.pre_feedforward_layernorm.weight
    want = torch.stack([block.mlp.gate_proj.weight * weight, block.mlp.up_proj.weight * weight])
    assert_near(keys_of(_pico("gemma2"), 1), want, 1e-6)


@torch.no_grad()
@every_family
def test_predictions_are_the_models(name: str) -> None:
    decoder = _pico(name)
    model: Any = decoder.model
    rows = predicted_targets(decoder, encoded(), OPTIONS)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = prompt.ids[: prompt.start]
        assert row.answer == (int(model(torch.tensor([ids])).logits[0, -1].argmax()),)
    assert correct(decoder, rows, OPTIONS) == [True] * len(PROMPTS)
    sums = answer_sums(decoder, encoded(), OPTIONS)
    want = [reference.answer_log_prob(model, prompt) for prompt in PROMPTS]
    assert_near(torch.tensor(sums), torch.tensor(want), 1e-4)


# Check 5: batches, padding, restarts


@torch.no_grad()
@every_family
def test_any_layer_can_be_the_start(name: str) -> None:
    decoder = _pico(name)
    for prompts in (PROMPTS, PROMPTS[:1]):
        final, replay = record(decoder, collate(encoded(prompts)).inputs)
        for layer in range(decoder.n_layers):
            again = replay.run(layer, 3)
            assert_near(again, final.repeat_interleave(3, 0), 2e-5)


@every_family
def test_order_and_batch_size_do_not_matter(name: str) -> None:
    decoder = _pico(name)
    want = METHODS["cna"](decoder, encoded(), OPTIONS)
    for order, tokens in ((PROMPTS[::-1], 4096), (PROMPTS, 1), (PROMPTS[1:] + PROMPTS[:1], 9)):
        got = METHODS["cna"](decoder, encoded(order), Options(batch_tokens=tokens))
        for part, expected in zip(got, want, strict=True):
            assert_near(part, expected, 5e-5)


@torch.no_grad()
@every_family
def test_padding_side_does_not_matter(name: str) -> None:
    decoder = _pico(name)
    units = Units.without_heads(decoder.head_shape, torch.tensor([[1], [6], [3]]))
    found = []
    for side in ("right", "left"):
        batch = collate(encoded(), side)
        found.append((head_drops(decoder, batch, OPTIONS), *importances(decoder, batch, units)))
    for right, left in zip(*found, strict=True):
        assert_near(left, right, 1e-4)


@every_family
def test_half_precision_is_near(name: str) -> None:
    want = METHODS["importance"](_pico(name), encoded(), OPTIONS)
    half = Decoder(family_model(name).bfloat16(), None)  # type: ignore[arg-type]
    for part, expected in zip(METHODS["importance"](half, encoded(), OPTIONS), want, strict=True):
        assert part.dtype == torch.float32
        assert (part - expected).abs().max() < 0.1 * expected.abs().max()


# Baselines


def own_norms(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What layer 1's heads and neurons weigh, their rows found by trying and not by any table.

    A row of a projection into the block is a unit's if the unit changes when the row does.
    """
    decoder = Decoder(model, None)  # type: ignore[arg-type]
    row, size = decoder.family, decoder.head_dim
    inputs = collate(encoded()).inputs

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        with capture(decoder) as captured:
            decoder.final_states(**inputs)
        return captured.heads[1].unflatten(-1, (4, size)), captured.coefficients[1]

    heads, neurons = torch.zeros(4), torch.zeros(12)
    with torch.no_grad():
        before = seen()
        block = decoder.layers[1]
        for paths, total in (
            ({row.queries, row.keys, row.values}, heads),
            (set(row.ffn_inputs), neurons),
        ):
            part = 0 if total is heads else 1
            for path in sorted(paths):
                weight = block.get_submodule(path).weight
                weight = weight.T if row.transposed else weight
                for i in range(weight.shape[0]):
                    kept = weight[i].clone()
                    weight[i] *= -3  # which wakes a neuron behind a ReLU
                    moved = (seen()[part] - before[part]).abs()
                    moved = moved.sum((0, 1, 3)) if part == 0 else moved.sum((0, 1))
                    weight[i] = kept
                    total[moved > 1e-5] += kept.pow(2).sum()
        outputs = reference.attention_weight(model, 1).unflatten(0, (4, size))
        heads += outputs.pow(2).sum((1, 2))
        neurons += reference.values(model, 1).pow(2).sum(1)
    return heads.sqrt(), neurons.sqrt()


@every_family
def test_magnitude_is_of_the_weights_that_reach_the_unit(name: str) -> None:
    if name == "olmo2":
        pytest.skip("its query and key norms are over all heads: every row reaches every head")
    model = copy.deepcopy(_pico(name).model)
    heads, neurons = METHODS["magnitude"](_pico(name), [], OPTIONS)
    want_heads, want_neurons = own_norms(model, name)
    assert_near(heads[1], want_heads, 1e-4)
    assert_near(neurons[1], want_neurons, 1e-4)


def test_magnitude_of_olmo2_by_hand() -> None:
    model: Any = _pico("olmo2").model
    heads, _ = METHODS["magnitude"](_pico("olmo2"), [], OPTIONS)
    attention = model.model.layers[1].self_attn
    parts = (
        attention.q_proj.weight[24:32],  # head 3
        attention.k_proj.weight[8:16],  # its group's, the second
        attention.v_proj.weight[8:16],
        attention.o_proj.weight[:, 24:32],
    )
    want = sum(float(part.detach().pow(2).sum()) for part in parts) ** 0.5
    assert float(heads[1, 3]) == pytest.approx(want, rel=1e-5)


@every_family
def test_random_needs_no_more_than_the_sizes(name: str) -> None:
    heads, neurons = METHODS["random"](_pico(name), [], OPTIONS)
    assert heads.shape == _pico(name).head_shape and neurons.shape == _pico(name).neuron_shape


# Check 7: loading and refusing


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("eager")])
def test_folders_load(name: str, tmp_path: Path) -> None:
    model: Any = copy.deepcopy(_pico(name).model)
    model.save_pretrained(tmp_path)
    for path in REFERENCE_MODEL.glob("*token*"):
        if path.suffix == ".json":
            shutil.copyfile(path, tmp_path / path.name)
    decoder = load_decoder(tmp_path)
    ids = torch.tensor([PROMPTS[0].ids])
    assert torch.allclose(decoder.model(ids).logits, _pico(name).model(ids).logits, atol=1e-5)
    assert decoder.layout == _pico(name).layout


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MixtralConfig(), r"mixture of experts \(num_local_experts=8\)"),
        (transformers.Qwen2MoeConfig(), r"mixture of experts \(num_experts=60\)"),
        (transformers.DeepseekV3Config(), r"mixture of experts \(n_routed_experts=256\)"),
        (transformers.DbrxConfig(), r"mixture of experts \(ffn_config\.moe_num_experts="),
        (transformers.BertConfig(), "is an encoder, not a decoder"),
        (transformers.RobertaConfig(), "is an encoder, not a decoder"),
        (transformers.T5Config(), "encoder-decoder model"),
        (transformers.BartConfig(), "encoder-decoder model"),
        (transformers.Gemma3Config(), r"multimodal model \(it has a text_config\)"),
        (transformers.MambaConfig(), "has no row in the table"),
        (transformers.OPTConfig(do_layer_norm_before=False), "do_layer_norm_before=False"),
        (transformers.OPTConfig(_remove_final_layer_norm=True), "_remove_final_layer_norm=True"),
        (
            transformers.Gemma3TextConfig(use_bidirectional_attention=True),
            "use_bidirectional_attention=True",
        ),
    ],
    ids=lambda value: value.model_type if not isinstance(value, str) else "",
)
def test_other_models_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedFamilyError, match=reason) as caught:
        load_decoder(tmp_path)
    message = str(caught.value)
    assert repr(config.model_type) in message
    assert all(row.model_type in message for row in STOCK)
    assert "\n" not in message
    assert caught.value.exit_code == 4


def test_a_mixture_is_told_by_its_fields() -> None:
    for fields in ({"num_experts": 4}, {"moe": {"n_routed_experts": 2}}, {"num_experts": [8, 8]}):
        with pytest.raises(UnsupportedFamilyError, match="mixture of experts"):
            check_supported({"model_type": "tomorrow's", **fields})
    for fields in ({"num_experts": 0}, {"num_experts": 1}, {"num_experts": None}, {}):
        with pytest.raises(UnsupportedFamilyError, match="no row"):
            check_supported({"model_type": "tomorrow's", **fields})
    check_supported({"model_type": "llama"})


def test_all_can_be_pruned() -> None:
    stock = {row.model_type for row in STOCK}
    assert set(FAMILIES) == stock | {f"pruned_{name}" for name in stock}


def test_table_is_only_data() -> None:
    for row in STOCK:
        assert not [value for value in vars(row).values() if callable(value)]
        assert Layout.of_config({"model_type": row.model_type, **_sizes(row)}).n_layers == 3


def _sizes(row: families.Family) -> dict[str, int]:
    return {"hidden_size": 8, row.heads_key: 2, row.layers_key: 3, row.width_key: 5}
