"""Tuning learns, is decided by its seed and follows the dense model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recovering import KEPT, NAMES, OPTIONS, QUICK, logits, loss, pico, rows_of, same, state

from prune_edit.decoder import Decoder
from prune_edit.hooks import answers_only, scale
from prune_edit.recover import teacher as teacher_module
from prune_edit.recover import tuning as tuning_module
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher, matched_layers
from prune_edit.recover.tuning import KINDS, Tuning, tune
from prune_edit.scoring import Options
from prune_edit.tasks.prompts import collate
from prune_edit.units import Units
from prune_edit.workspace import Workspace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_tuning_learns_and_the_seed_decides(name: str, kind: str) -> None:
    def made(seed: int, callers: int) -> Decoder:
        small = shrink(pico(name), *KEPT[name], rows_of(), OPTIONS)
        torch.manual_seed(callers)  # what the caller draws must not matter
        # Fewer a step than there are, so that the draw matters.
        how = replace(QUICK, kind=kind, steps=20, batch=2)
        return tune(small, rows_of(), how, Options(seed=seed))

    before = loss(shrink(pico(name), *KEPT[name], rows_of(), OPTIONS), rows_of())
    assert before > 1
    first, again, other = made(0, 1), made(0, 2), made(1, 1)
    assert loss(first, rows_of()) < 0.8 * before
    assert same(state(first), state(again))
    assert not same(state(first), state(other))
    assert not first.model.training
    assert not any(parameter.requires_grad for parameter in first.model.parameters())
    assert (first.layout.heads, first.layout.neurons) == KEPT[name]
    assert not any("lora" in key for key in first.model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_leaves_the_callers_random_numbers_and_model_alone(kind: str) -> None:
    for name in ("llama-gqa", "gpt2"):
        decoder = pico(name)
        before, seen = state(decoder), torch.random.get_rng_state()
        text = type(decoder.model).__name__
        tuned = tune(decoder, rows_of(), replace(QUICK, kind=kind), OPTIONS)
        assert torch.equal(torch.random.get_rng_state(), seen)
        assert type(decoder.model).__name__ == text
        assert same(state(decoder), before), "the model that was handed in has changed"
        assert not same(state(tuned), before)


def test_no_steps_change_nothing() -> None:
    decoder = pico("llama")
    assert tune(decoder, rows_of(), Tuning(steps=0), OPTIONS) is decoder


def test_tuning_leaves_no_hook() -> None:
    decoder = pico("llama-gqa")
    tuned = tune(decoder, rows_of(), QUICK, OPTIONS, Teacher(decoder))
    for module in tuned.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensated", [False, True])
def test_pads_stay_zero(compensated: bool, kind: str) -> None:
    prompts = rows_of() if compensated else None
    small = shrink(pico("llama-gqa"), *KEPT["llama-gqa"], prompts, OPTIONS)
    assert small.layout.slots[0] == (0, 1, 2, 5, None, None)
    untuned = small.attention_output(0).weight.detach().clone()  # type: ignore[union-attr]
    tuned = tune(small, rows_of(), replace(QUICK, kind=kind), OPTIONS)
    weight: Any = tuned.attention_output(0).weight  # type: ignore[union-attr]
    pads = weight[:, 4 * tuned.head_dim :]
    assert pads.shape == (32, 8)
    assert torch.equal(pads, torch.zeros_like(pads))
    assert not torch.equal(weight[:, : 4 * tuned.head_dim], untuned[:, : 4 * tuned.head_dim])
    ones = Units(heads=torch.ones(tuned.head_shape))
    want = logits(tuned)
    with scale(tuned, ones):
        assert torch.equal(logits(tuned), want)


def test_progress_counts_the_steps() -> None:
    seen: list[tuple[str, int, int]] = []
    options = Options(progress=lambda *event: seen.append(event))
    tune(pico("gpt2"), rows_of(), Tuning(steps=3, batch=2, rank=1), options, what="mending")
    assert seen == [("mending", i, 3) for i in (1, 2, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_layers_above_the_last_heads_need_the_answers_only(name: str) -> None:
    """Same states and gradients where answers are predicted, and nothing else computed."""
    decoder = pico(name)
    layers, heads = decoder.head_shape
    below = (tuple(range(heads)), *((),) * (layers - 1))
    small = shrink(decoder, below, decoder.layout.neurons, rows_of(), OPTIONS)
    batch = collate(rows_of())
    places = batch.rows, batch.columns
    seen: list[torch.Size] = []
    last: Any = small.ffn_output(layers - 1)
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    weight = last.weight.requires_grad_(True)

    def run(narrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with answers_only(small, batch, (0, layers - 1)) if narrow else nullcontext() as inner:
            final = small.final_states(**batch.inputs)[places]
        (slope,) = torch.autograd.grad(final.square().sum(), weight)
        if inner is not None:
            hidden = small.model(**batch.inputs, output_hidden_states=True).hidden_states
            assert torch.allclose(inner[0], hidden[1][places], atol=1e-5)
            assert inner[layers - 1].shape == inner[0].shape
        return final, slope

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert seen[0][:2] == (1, len(batch.targets))
    assert seen[-1][:2] == batch.input_ids.shape
    handle.remove()
    assert not last._forward_pre_hooks


def test_a_model_with_heads_in_its_last_layer_runs_as_ever() -> None:
    decoder, batch = pico("llama"), collate(rows_of())
    want = decoder.final_states(**batch.inputs)
    with answers_only(decoder, batch):
        assert torch.equal(decoder.final_states(**batch.inputs), want)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_leads_back_to_the_dense_models_states(name: str) -> None:
    decoder = pico(name)
    small = shrink(decoder, *KEPT[name], rows_of(), OPTIONS)
    teacher = Teacher(decoder)
    assert teacher.layers == matched_layers(decoder.n_layers)
    batch = collate(rows_of())

    def states(model: Decoder) -> torch.Tensor:
        hidden = model.model(**batch.inputs, output_hidden_states=True).hidden_states
        final = model.final_states(**batch.inputs)
        # The last of the hidden states has passed the final norm.
        kept = [hidden[i + 1] for i in teacher.layers if i + 1 < model.n_layers]
        return torch.stack([*kept, final], 1)[batch.rows, :, batch.columns]

    want = states(decoder)
    got = teacher.states(rows_of())
    assert torch.allclose(got[:, [*range(len(teacher.layers) - 1), -1]], want, atol=1e-5)
    again = teacher.states(rows_of()[::-1])
    assert torch.allclose(again.sum(), got.sum(), atol=1e-3), "found again, in another order"
    how = replace(QUICK, steps=60, features=64.0)
    led, alone = (tune(small, rows_of(), how, OPTIONS, each) for each in (teacher, None))

    def far(model: Decoder) -> float:
        return float((states(model) - want).square().mean().detach())

    assert far(led) < 0.6 * far(small)
    assert far(led) < 0.6 * far(alone)


@pytest.mark.parametrize(
    ("count", "layers"),
    [
        (1, (0,)),
        (2, (0, 1)),
        (4, (1, 2, 3)),
        (8, (2, 3, 4, 5, 6, 7)),
        (24, (8, 11, 14, 17, 20, 23)),
    ],
)
def test_matched_layers_are_few_and_above_the_first_quarter(
    count: int, layers: tuple[int, ...]
) -> None:
    assert matched_layers(count) == layers


def test_a_teachers_states_do_not_depend_on_what_was_asked_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of()
    monkeypatch.setattr(teacher_module, "_TEACHER_BATCH", 3)
    for room in (1 << 20, 1):  # all are kept, or none
        monkeypatch.setattr(teacher_module, "_CACHED_NUMBERS", room)
        first, second = Teacher(pico("llama")), Teacher(pico("llama"))
        for teacher in (first, second):
            teacher.expect(rows)
        for row in rows:
            first.states([row])
        got, want = first.states(rows), second.states(rows)
        assert got.numpy().tobytes() == want.numpy().tobytes()
        assert bool(first._found) == (room > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_goes_on_from_what_was_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "SAVE_SECONDS", 0.0)
    decoder = pico("gpt2")
    small, how = shrink(decoder, *KEPT["gpt2"], rows_of(), OPTIONS), replace(QUICK, kind=kind)
    teacher, work = Teacher(decoder), Workspace(tmp_path)
    whole = tune(small, rows_of(), how, OPTIONS, teacher)
    steps: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        steps.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(small, rows_of(), how, Options(progress=stop), teacher, keeper=work, stage="t")
    steps.clear()
    options = Options(progress=lambda what, done, total: steps.append(done))
    again = tune(small, rows_of(), how, options, teacher, keeper=work, stage="t")
    assert steps == [5, 6, 7, 8], "the four kept steps were made again"
    assert same(state(again), state(whole))
