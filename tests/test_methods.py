"""Every scoring method equals its slow oracle, whatever the order, batching, padding and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pico_checkpoint import V, dense
from reference import Prompt
from test_scoring import (
    KEPT,
    OPTIONS,
    PROMPTS,
    Boom,
    _forward,
    assert_near,
    encoded,
    hooks_of,
    mask_of,
    pico,
)

from prune_edit import running
from prune_edit.decoder import Decoder
from prune_edit.editing import find
from prune_edit.errors import ModelError, PlanError, UnsafeCheckpointError
from prune_edit.hooks import capture, scale
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options, load_adapter
from prune_edit.scoring.ablation import unit_drops
from prune_edit.scoring.intervention import score_intervention
from prune_edit.scoring.true_norm import true_importances
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import batches, collate, encode_all
from prune_edit.units import Units

NAMES = ("llama-gqa", "gpt2")
WITH_PROMPTS = [name for name in METHODS if name not in ("magnitude", "random")]
OTHERS = (
    Prompt((3, 9, 28, 4, 12, 36, 2), 5),
    Prompt((6, 25, 8), 2),
    Prompt((7, 33, 15, 21, 30, 1, 30, 6, 18), 6),
    Prompt((11, 2, 20, 28), 3),
)


def confident(name: str) -> tuple[Decoder, tuple[Prompt, ...]]:
    """A model, and prompts whose answers are its own words, but for one."""
    decoder = pico(name)
    answered = []
    for prompt in PROMPTS[:3]:
        ids = list(prompt.ids)
        for place in range(prompt.start, len(ids)):
            ids[place] = int(reference.log_probs(decoder.model, ids[:place])[-1].argmax())
        answered.append(Prompt(tuple(ids), prompt.start))
    return decoder, (*answered, PROMPTS[3])


def ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.flatten().argsort().argsort().double()


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


# Intervention


def assert_ablated_by_hand(
    decoder: Decoder, prompts: tuple[Prompt, ...], options: Options, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A dozen units of each kind, those with the largest scores among them."""
    found = METHODS["intervention"](decoder, encoded(prompts), options)
    mean, accuracy = options.ablation == "mean", options.measure == "accuracy"
    for part, got in zip(reference.PARTS, found, strict=True):
        flat = got.abs().flatten().argsort(descending=True).tolist()
        units = [divmod(unit, got.shape[1]) for unit in (*flat[:6], *flat[6 :: len(flat) // 6])]
        want = [
            reference.ablation_score(decoder.model, prompts, part, unit, mean, accuracy)
            for unit in units
        ]
        assert_near(torch.stack([got[unit] for unit in units]), torch.tensor(want), tolerance)
        assert not got.isnan().any()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_ablation_by_log_probability_is_by_hand(name: str) -> None:
    decoder = pico(name)
    zero, mean = (
        assert_ablated_by_hand(decoder, PROMPTS[:3], Options(ablation=ablation), 5e-5)
        for ablation in ("zero", "mean")
    )
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(zero, mean, strict=True))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_ablation_by_accuracy_is_by_hand(name: str, ablation: str) -> None:
    decoder, prompts = confident(name)
    assert [reference.is_right(decoder.model, prompt) for prompt in prompts] == [1, 1, 1, 0]
    options = Options(ablation=ablation, measure="accuracy")
    assert_ablated_by_hand(decoder, prompts, options, 1e-6)


@torch.no_grad()
def test_the_plain_way_equals_the_fast_one() -> None:
    decoder = pico("llama-gqa")
    fast = METHODS["intervention"](decoder, encoded(), OPTIONS)[0]
    plain = unit_drops(decoder, collate(encoded()), Options(batch_tokens=40), "heads")
    assert_near(plain.mean(0), fast, 2e-5)


# Importance and CNA


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_true_norm_importance_is_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pico(name)
    frozen = METHODS["importance"](decoder, encoded(), OPTIONS)[1]
    rows = [
        torch.stack(
            [
                reference.true_importances(decoder.model, prompt, place, layer)
                for layer in range(decoder.n_layers)
            ]
        )
        for prompt in PROMPTS
        for place in range(prompt.start, len(prompt.ids))
    ]
    want = torch.stack(rows).mean(0)
    for block in (1 << 21, 5 * V, 1):  # all at once, some of a position's neurons, one
        monkeypatch.setattr("prune_edit.scoring.true_norm._BLOCK", block)
        got = METHODS["importance"](decoder, encoded(), Options(norm="true"))[1]
        assert_near(got, want, 2e-5)
    assert (want - frozen).abs().max() > 1e-3


@torch.no_grad()
def test_true_norm_cna_is_the_change_of_true_norm_importance() -> None:
    decoder = pico("llama-gqa")
    prompt = PROMPTS[0]
    rows = encoded((prompt,))
    (top,) = reference.top_heads_of(decoder.model, prompt)
    less = Decoder(reference.without(decoder.model, [top]), None)  # type: ignore[arg-type]
    batch = collate(rows)
    want = (true_importances(decoder, batch) - true_importances(less, batch)).mean(0)
    assert_near(METHODS["cna"](decoder, rows, Options(norm="true"))[1], want, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cna_of_two_inputs(name: str) -> None:
    decoder = pico(name)
    pairs = (PROMPTS[1:4:2], OTHERS[1:4:2])
    options = Options(contrast=tuple(encoded(pairs[1])))
    heads, neurons = METHODS["cna"](decoder, encoded(pairs[0]), options)
    sides = [reference.neuron_scores(decoder.model, rows, False) for rows in pairs]
    assert_near(neurons, sides[0] - sides[1])
    sides = [reference.head_scores(decoder.model, rows) for rows in pairs]
    assert_near(heads, sides[0] - sides[1])


def test_editing_finds_by_the_same_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pico("llama-gqa")
    # Pico models have no tokenizer and need none here.
    monkeypatch.setattr(find, "_encoded", lambda *args: [encoded(PROMPTS), encoded(OTHERS)])
    got = find.concept_scores(decoder, (), OPTIONS)
    options = Options(contrast=tuple(encoded(OTHERS)))
    assert_near(got, METHODS["cna"](decoder, encoded(), options)[1], 1e-6)


def tuned(name: str, folder: Path, *, rank: int = 4) -> Any:
    """A LoRA adapter of a pico model with weights that matter, saved; the peft model."""
    from peft import LoraConfig, get_peft_model

    target = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=rank, target_modules=target, fan_in_fan_out=name == "gpt2")
    torch.manual_seed(1)
    model: Any = get_peft_model(dense(name), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_cna_of_a_tuned_model(name: str, tmp_path: Path) -> None:
    decoder = pico(name)
    inputs = collate(encoded()).inputs
    before = decoder.model(**inputs).logits
    peft_model = tuned(name, tmp_path / "adapter")
    adapted = load_adapter(decoder, tmp_path / "adapter")
    assert_near(adapted.model(**inputs).logits, peft_model(**inputs).logits, 5e-5)
    assert torch.equal(decoder.model(**inputs).logits, before), "the base model was changed"
    assert (adapted.model(**inputs).logits - before).abs().max() > 0.1
    prompts = PROMPTS[1:4:2]
    heads, neurons = METHODS["cna"](decoder, encoded(prompts), Options(adapted=adapted))
    sides = [reference.neuron_scores(m.model, prompts, False) for m in (adapted, decoder)]
    assert_near(neurons, sides[0] - sides[1])
    sides = [reference.head_scores(m.model, prompts) for m in (adapted, decoder)]
    assert_near(heads, sides[0] - sides[1])


def test_adapters_that_do_not_fit_are_named(tmp_path: Path) -> None:
    decoder = pico("llama-gqa")
    with pytest.raises(ModelError, match=r"none has no adapter_config\.json; give a folder"):
        load_adapter(decoder, tmp_path / "none")
    tuned("gpt2", tmp_path / "other")
    with pytest.raises(ModelError, match=r"cannot be put on model.*was tuned on this model"):
        load_adapter(decoder, tmp_path / "other")
    tuned("llama-gqa", tmp_path / "own")
    with pytest.raises(ModelError, match=r"is not of model|cannot be put on model"):
        load_adapter(pico("llama"), tmp_path / "own")  # one layer more, other head sizes
    (tmp_path / "own" / "adapter_model.safetensors").rename(tmp_path / "own" / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="only pickled weights"):
        load_adapter(decoder, tmp_path / "own")
    (tmp_path / "own" / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_adapter(decoder, tmp_path / "own")


def test_contrasts_that_do_not_fit_are_named() -> None:
    decoder = pico("llama-gqa")
    with pytest.raises(PlanError, match="4 prompts have 1 contrast prompts; give one for each"):
        METHODS["cna"](decoder, encoded(), Options(contrast=tuple(encoded(OTHERS[:1]))))
    with pytest.raises(ModelError, match="does not have the units of"):
        METHODS["cna"](decoder, encoded(), Options(adapted=pico("gpt2")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ablation": "median"}, "ablation 'median' is unknown; give zero or mean"),
        ({"measure": "f1"}, "measure 'f1' is unknown; give logprob or accuracy"),
        ({"norm": "none"}, "norm 'none' is unknown; give frozen or true"),
        ({"integrated_steps": 0}, "integrated_steps 0 is too small"),
        ({"query_neurons": 0}, "query_neurons 0 is too small"),
        ({"top_heads": 0}, "top_heads 0 is too small"),
        ({"batch_tokens": 0}, "batch_tokens 0 is too small"),
    ],
)
def test_wrong_options_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Options(**settings)


def test_two_contrasts_are_one_too_many() -> None:
    with pytest.raises(PlanError, match="give one of them"):
        Options(adapted=pico("llama"), contrast=tuple(encoded()))


# Taylor


@pytest.mark.parametrize("name", NAMES)
def test_taylor_is_value_times_gradient(name: str) -> None:
    decoder = pico(name)
    found = METHODS["taylor"](decoder, encoded(), OPTIONS)
    for part, got in zip(reference.PARTS, found, strict=True):
        each = [reference.gradients(decoder.model, prompt, part) for prompt in PROMPTS]
        assert_near(got, torch.stack(each).abs().mean(0), 2e-5)
        assert (torch.stack(each).mean(0).abs() < 0.5 * got).any(), "signs would cancel"


def test_taylor_by_log_odds_is_by_hand() -> None:
    decoder = pico("llama-gqa")
    found = METHODS["taylor"](decoder, encoded(), Options(measure="logodds"))
    for part, got in zip(reference.PARTS, found, strict=True):
        each = [reference.gradients(decoder.model, prompt, part, odds=True) for prompt in PROMPTS]
        assert_near(got, torch.stack(each).abs().mean(0), 2e-5)


def test_taylor_finds_the_heads_of_a_trained_model(reference_model: Decoder) -> None:
    """Saturated answers and all: near the exact ablation, which a signed mean is not."""
    task = load_task("arithmetic")
    rows = encode_all(reference_model.tokenizer, task.sample("train", 24), "arithmetic")
    want = score_intervention(reference_model, rows, Options(neurons=False))[0].flatten()
    options = Options(neurons=False, measure="logodds")
    got = METHODS["taylor"](reference_model, rows, options)[0].flatten()
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.7


@torch.no_grad()
def test_taylor_is_the_size_of_a_small_ablation() -> None:
    """A unit turned down by a little costs, or brings, that share of its score."""
    decoder = pico("llama-gqa")
    prompt, share = PROMPTS[0], 0.01
    found = METHODS["taylor"](decoder, encoded((prompt,)), OPTIONS)
    for part, got in zip(reference.PARTS, found, strict=True):
        units = [
            divmod(unit, got.shape[1]) for unit in got.abs().flatten().topk(4).indices.tolist()
        ]
        for layer, unit in units:
            sides = []
            for factor in (1 + share, 1 - share):
                turned = copy.deepcopy(decoder.model)
                size = reference.channels_of(turned, part)
                weight = reference.output_weight(turned, layer, part)
                weight[unit * size : (unit + 1) * size] *= factor
                sides.append(reference.answer_log_prob(turned, prompt))
            score = float(got[layer, unit])
            assert abs(sides[0] - sides[1]) / (2 * share) == pytest.approx(score, abs=2e-3)
            assert score > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients_are_by_hand_and_complete(name: str) -> None:
    decoder = pico(name)
    prompts = PROMPTS[:2]
    found = METHODS["taylor"](decoder, encoded(prompts), Options(integrated_steps=16))
    first = METHODS["taylor"](decoder, encoded(prompts), OPTIONS)
    for part, got, order_one in zip(reference.PARTS, found, first, strict=True):
        # The oracle's midpoints are coarse where a norm's input is small.
        each = [reference.integrated(decoder.model, p, part, 32) for p in prompts]
        by_hand = torch.stack(each).mean(0)
        near = 0.02 * float(by_hand.abs().max())
        assert_near(got, by_hand, near)
        assert (got - order_one).abs().max() > 5 * near
        none = reference.scaled(decoder.model, part, 0.0)
        lost = [
            reference.answer_log_prob(decoder.model, p) - reference.answer_log_prob(none, p)
            for p in prompts
        ]
        want = sum(lost) / len(lost)
        assert float(got.double().sum()) == pytest.approx(want, abs=2e-3)
        assert abs(float(order_one.double().sum()) - want) > 0.05


# Baselines


@torch.no_grad()
@pytest.mark.parametrize("method", ["wanda", "flap", "activation"])
@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_by_hand(name: str, method: str) -> None:
    decoder = pico(name)
    found = METHODS[method](decoder, encoded(), OPTIONS)
    for part, got in zip(reference.PARTS, found, strict=True):
        want = getattr(reference, method)(decoder.model, PROMPTS, part)
        assert_near(got, want, 1e-5 * float(want.abs().max()))


# What holds for all


@pytest.mark.parametrize("method", WITH_PROMPTS)
@pytest.mark.parametrize("name", NAMES)
def test_order_batching_and_padding_do_not_matter(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = pico(name)
    want = METHODS[method](decoder, encoded(), OPTIONS)
    again = METHODS[method](decoder, encoded(), OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True)), "not deterministic"

    def same(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        for part, expected in zip(found, want, strict=True):
            assert part.dtype == torch.float32
            near = 2e-5 * max(1.0, float(expected.abs().max()))
            if method == "cna-cases" and part is found[1]:  # ranks: neighbours may change places
                near = 0.02 * expected.numel()
            assert (part - expected).abs().max() <= near
            assert expected.abs().max() > 1e-3

    for order, tokens in ((PROMPTS[::-1], 4096), (PROMPTS, 1), (PROMPTS[2:] + PROMPTS[:2], 16)):
        same(METHODS[method](decoder, encoded(order), Options(batch_tokens=tokens)))
    left = lambda rows, tokens: batches(rows, tokens, "left")  # noqa: E731
    monkeypatch.setattr(running, "batches", left)
    same(METHODS[method](decoder, encoded(), OPTIONS))


@pytest.mark.parametrize("method", ["intervention", "taylor"])
def test_other_settings_do_not_depend_on_order_or_padding(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = pico("llama-gqa")
    options = Options(ablation="mean", integrated_steps=3)
    want = METHODS[method](decoder, encoded(), options)
    got = [METHODS[method](decoder, encoded(PROMPTS[::-1]), replace(options, batch_tokens=20))]
    monkeypatch.setattr(running, "batches", lambda rows, tokens: batches(rows, tokens, "left"))
    got.append(METHODS[method](decoder, encoded(), options))
    for found in got:
        for part, expected in zip(found, want, strict=True):
            assert_near(part, expected, 2e-5)


@pytest.mark.parametrize("method", WITH_PROMPTS)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_ranks_as_float32(name: str, method: str) -> None:
    decoder = pico(name)
    want = METHODS[method](decoder, encoded(), OPTIONS)
    decoder.model.to(torch.bfloat16)
    got = METHODS[method](decoder, encoded(), OPTIONS)
    for part, expected in zip(got, want, strict=True):
        assert part.dtype == torch.float32
        assert agreement(part, expected) > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_absent_units_are_nan_and_the_others_as_in_the_masked_model(name: str, method: str) -> None:
    decoder = pico(name)
    heads, neurons = KEPT[name]
    small = shrink(decoder, heads, neurons, None, OPTIONS)
    masks = [mask_of(decoder.head_shape, heads), mask_of(decoder.neuron_shape, neurons)]
    got = METHODS[method](small, encoded(), OPTIONS)
    with scale(decoder, Units(*masks)):
        want = METHODS[method](decoder, encoded(), OPTIONS)
    for part, expected, mask in zip(got, want, masks, strict=True):
        kept = mask.bool()
        assert part[~kept].isnan().all()
        assert not part[kept].isnan().any()
        # FLAP compares with the layer's other units, and ranks are among units, which are fewer.
        if method == "cna-cases" and part is got[1]:
            assert agreement(part[kept], expected[kept]) > 0.99
        elif method != "flap":
            near = 2e-4 * max(1.0, float(expected[kept].abs().max()))
            assert (part[kept] - expected[kept]).abs().max() <= near


@pytest.mark.parametrize("method", ["intervention", "query", "taylor", "cna", "importance"])
def test_neurons_can_be_left_out(method: str) -> None:
    decoder = pico("llama-gqa")
    whole = METHODS[method](decoder, encoded(), OPTIONS)
    heads, neurons = METHODS[method](decoder, encoded(), Options(neurons=False))
    assert neurons.isnan().all() and neurons.shape == whole[1].shape
    assert_near(heads, whole[0], 1e-6)


@pytest.mark.parametrize("method", WITH_PROMPTS)
def test_nothing_is_left_on_the_model(method: str) -> None:
    decoder = pico("llama-gqa")
    options = Options(ablation="mean", integrated_steps=2)
    act: Callable[[Decoder], None] = _forward(
        lambda decoder: METHODS[method](decoder, encoded(), options)
    )
    with pytest.raises(Boom):
        act(decoder)
    assert hooks_of(decoder) == 0
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    METHODS[method](decoder, encoded(), options)
    assert hooks_of(decoder) == 0
    assert all(parameter.grad is None for parameter in decoder.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in decoder.model.state_dict().items())
    with capture(decoder) as seen:
        decoder.final_states(**collate(encoded()).inputs)
    assert seen.final is not None
