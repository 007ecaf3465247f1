"""The fast head scores are the slow ones: branches, shared prefixes, packing and memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from pico_checkpoint import D
from pico_families import NAMES, family_model
from reference import Prompt
from test_scoring import KEPT, assert_near, encoded, mask_of, pico

from prune_edit.decoder import Decoder
from prune_edit.hooks import scale
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options, branches, intervention, predicted_targets
from prune_edit.scoring.ablation import unit_drops
from prune_edit.scoring.intervention import (
    all_head_drops,
    branched_drops,
    fast,
    head_drops,
    packing_of,
    score_intervention,
)
from prune_edit.scoring.prefixes import Forest, Question, forest, pack, questions_of
from prune_edit.scoring.statistics import moments
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import collate, encode_all
from prune_edit.units import Units

OPTIONS = Options()
LLAMA_LIKE = ("llama", "llama-gqa", "llama-biased", "mistral")
PROMPTS = (
    Prompt((3, 9, 27, 4, 12, 36, 2), 5),  # two answer tokens
    Prompt((3, 9, 27, 4, 8, 1), 4),  # shares four of its tokens, one of them asked
    Prompt((3, 9, 27, 4, 12, 30), 5),  # another answer after the same prefix
    Prompt((5, 25, 8), 2),
    Prompt((7, 33, 14, 21, 39, 1, 30, 6, 18), 6),  # longer than the sliding windows
    Prompt((11, 2, 19, 28), 3),
    Prompt((5, 25, 8), 2),  # the same again
)

TEMPLATE = tuple(Prompt((1, 2, 3, a, 4, b, 5, 6), 7) for a in range(8) for b in range(8))


def questions(prompts: tuple[Prompt, ...] = PROMPTS) -> list[Question]:
    return [Question.of(row) for row in encoded(prompts)]


def replayed(decoder: Decoder, prompts: tuple[Prompt, ...] = PROMPTS) -> torch.Tensor:
    return unit_drops(decoder, collate(encoded(prompts)), OPTIONS, "heads")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Equality


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_branches_equal_the_oracle(name: str) -> None:
    decoder = pico(name)
    assert fast(decoder)
    got = branched_drops(decoder, questions(), OPTIONS)
    for i, prompt in enumerate(PROMPTS):
        want = [
            [reference.head_drop(decoder.model, prompt, (layer, head)) for head in range(width)]
            for layer, width in enumerate([got.shape[2]] * got.shape[1])
        ]
        assert_near(got[i], torch.tensor(want), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_as_its_own_modules_say(name: str) -> None:
    decoder = Decoder(family_model(name), None)  # type: ignore[arg-type]
    assert fast(decoder) is (name in ("llama", "mistral", "qwen2"))
    assert_near(all_head_drops(decoder, encoded(PROMPTS), OPTIONS), replayed(decoder), 2e-5)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "mistral"])
def test_a_pruned_model_branches(name: str) -> None:
    decoder = pico(name)
    heads, neurons = KEPT[name]
    small = shrink(decoder, heads, neurons, encoded(), OPTIONS)  # means make constant outputs
    assert fast(small)
    got, want = branched_drops(small, questions(), OPTIONS), replayed(small)
    kept = mask_of(decoder.head_shape, heads).bool()
    assert_near(got[:, kept], want[:, kept], 2e-5)
    assert got[:, ~kept].isnan().all()


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_batch_size_and_order_do_not_matter(name: str, tokens: int) -> None:
    decoder = pico(name)
    want = replayed(decoder)
    order = [4, 6, 2, 0, 5, 3, 1]
    rows = [encoded(PROMPTS)[i] for i in order]
    got = all_head_drops(decoder, rows, Options(batch_tokens=tokens))
    assert_near(got, want[order], 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_unpacked(side: str) -> None:
    batch = collate(encoded(PROMPTS), side)
    assert questions_of(batch) == questions()
    decoder = pico("llama")
    assert_near(head_drops(decoder, batch, OPTIONS), replayed(decoder), 1e-5)
    shifted = replace(batch, position_ids=batch.position_ids + 1)
    assert questions_of(shifted) is None


def test_all_prompts_or_one_by_one() -> None:
    decoder = pico("llama-gqa")
    alone = [all_head_drops(decoder, [row], OPTIONS)[0] for row in encoded(PROMPTS)]
    together = all_head_drops(decoder, encoded(PROMPTS), OPTIONS)
    assert_near(together, torch.stack(alone), 1e-5)
    scores, _ = score_intervention(decoder, encoded(PROMPTS), replace(OPTIONS, neurons=False))
    assert_near(scores, together.mean(0), 1e-5)


def test_products_joined_with_the_dense_run_change_nothing(monkeypatch: Any) -> None:
    decoder = pico("llama-biased")
    asked = []

    def always(*args: Any) -> bool:
        asked.append(args)
        return True

    monkeypatch.setattr(branches, "_worth", always)
    assert_near(branched_drops(decoder, questions(), OPTIONS), replayed(decoder), 1e-5)
    assert len(asked) == decoder.n_layers


@pytest.mark.parametrize("scale_by", [1.0, 60.0])
def test_large_logits_do_not_overflow(scale_by: float) -> None:
    decoder = pico("llama")
    decoder.model.get_output_embeddings().weight.mul_(scale_by)
    got, want = branched_drops(decoder, questions(), OPTIONS), replayed(decoder)
    assert_near(got, want, 1e-5 * max(1.0, float(want.abs().max())))


def test_half_precision_is_near() -> None:
    decoder = pico("llama")
    want = replayed(decoder)
    low = Decoder(decoder.model.to(torch.bfloat16), None)  # type: ignore[arg-type]
    assert fast(low)
    got = branched_drops(low, questions(), OPTIONS)
    error = (got - want).abs().mean()
    assert error < 2 * (replayed(low) - want).abs().mean() + 1e-3


def test_half_precision_keeps_the_order_of_a_trained_models_heads(reference_model: Decoder) -> None:
    # Where the model is sure of its answers, what a head is worth is far below a logit's rounding.
    task = load_task("arithmetic")
    rows = encode_all(reference_model.tokenizer, task.sample("train", 24), "arithmetic")
    want = all_head_drops(reference_model, rows, OPTIONS).mean(0).flatten()
    low = reference_model.with_model(copy.deepcopy(reference_model.model).to(torch.bfloat16))
    assert fast(low)
    got = all_head_drops(low, rows, OPTIONS).mean(0).flatten()
    assert float((got - want).abs().mean()) < 5e-3
    ranks = torch.stack([want.argsort().argsort(), got.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95


def test_a_model_that_was_asked_for_its_attentions_still_branches() -> None:
    decoder = pico("llama")
    decoder.model(torch.tensor([[1, 2, 3]]), output_attentions=True, output_hidden_states=True)
    assert any(module._forward_hooks for module in decoder.model.modules())
    assert fast(decoder)
    rows = encoded(PROMPTS)
    assert torch.allclose(
        all_head_drops(decoder, rows, OPTIONS), all_head_drops(pico("llama"), rows, OPTIONS)
    )
    other = pico("llama")
    other.model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    assert not fast(other)


@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("measure", ["logprob", "accuracy"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_branches_ablate_and_measure_as_the_modules_do(
    name: str, measure: str, ablation: str
) -> None:
    decoder = pico(name)
    if measure == "accuracy":  # of random weights the predictions are right, so that some change
        rows = predicted_targets(decoder, encoded(PROMPTS), OPTIONS)
    else:
        rows = encoded(PROMPTS)
    options = replace(OPTIONS, ablation=ablation, measure=measure, neurons=False)
    assert fast(decoder)
    got, _ = score_intervention(decoder, rows, options)
    means = moments(decoder, rows, options) if ablation == "mean" else None
    want = unit_drops(decoder, collate(rows), options, "heads", means).mean(0)
    assert_near(got, want, 1e-5)
    assert float(got.nan_to_num().abs().max()) > 0


# When to branch


def test_watched_and_altered_models_are_left_to_their_modules() -> None:
    decoder = pico("llama")
    assert fast(decoder)
    with scale(decoder, Units(heads=torch.full(decoder.head_shape, 0.5))):
        assert not fast(decoder)
    assert fast(decoder)
    decoder.model.train()
    assert not fast(decoder)
    decoder.model.eval()
    layer: Any = decoder.layers[0]
    layer.extra_norm = torch.nn.LayerNorm(D)
    assert not fast(decoder)
    del layer.extra_norm
    layer.forward = layer.forward
    assert not fast(decoder)


def test_a_model_that_only_looks_alike_is_found_out(monkeypatch: Any) -> None:
    decoder = pico("llama")
    attention = type(decoder.attention(1))
    real = attention.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = real(self, *args, **kwargs)
        return output * 1.01, weights

    monkeypatch.setattr(attention, "forward", other)
    assert not fast(decoder)
    got = all_head_drops(decoder, encoded(PROMPTS), OPTIONS)
    # The same modules in other batches: rounding, far below what a scale of 1.01 does.
    assert torch.allclose(got, replayed(decoder), atol=1e-5)


# Prefixes


def trees_of(prompts: tuple[Prompt, ...], most: int) -> Forest:
    asked = questions(prompts)
    packing = pack(asked, row_cost=1000.0, pair_cost=1.0, most=most)
    return forest(asked, packing.windows, packing.width)


def test_shared_prefixes_are_run_once() -> None:
    prefixes = {p.ids[:end] for p in PROMPTS for end in range(1, len(p.ids))}
    trees = trees_of(PROMPTS, 1000)
    assert trees.nodes == len(prefixes) == 20
    assert trees.tokens.numel() == 20, "one window, nothing to fill up"
    assert sum(len(q.read) for q in questions()) == 31
    places = {p.ids[:end] for p in PROMPTS for end in range(p.start, len(p.ids))}
    assert len(trees.asked) == len(places) < len(trees.pairs) == 11


def test_rows_see_their_prefix_and_nothing_else() -> None:
    trees = trees_of(PROMPTS, 12)
    assert len(trees.tokens) > 1
    seen = set()
    for w in range(len(trees.tokens)):
        for row in range(trees.tokens.shape[1]):
            before = trees.visible[w, row].nonzero()[:, 0]
            assert trees.depths[w, before].tolist() == list(range(len(before)))
            assert int(before[-1]) == row
            seen.add(tuple(trees.tokens[w, before].tolist()))
    want = {p.ids[:end] for p in PROMPTS for end in range(1, len(p.ids))}
    assert want <= seen <= want | {(0,)}


def test_packing_keeps_to_its_width() -> None:
    asked = questions()
    for most in (1, 8, 12, 1000):
        packing = pack(asked, 1000.0, 1.0, most)
        assert packing.width <= max(8, most)  # the longest prompt reads eight tokens
        assert sorted(i for window in packing.windows for i in window) == list(range(len(asked)))
    # Where sight is dear, windows are narrow.
    asked = questions(TEMPLATE)
    assert pack(asked, 1.0, 1000.0, 1000).width < 30 < pack(asked, 1000.0, 1.0, 1000).width


def test_prompts_of_one_template_share() -> None:
    decoder = pico("llama")
    packing = packing_of(decoder, questions(TEMPLATE), OPTIONS)
    assert packing.rows < 0.6 * 64 * 7
    got = all_head_drops(decoder, encoded(TEMPLATE), OPTIONS)
    assert_near(got, replayed(decoder, TEMPLATE), 1e-5)


# Memory and progress


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_rows_in_flight_are_bounded(tokens: int, monkeypatch: Any) -> None:
    decoder = pico("llama-gqa")
    assert fast(decoder)
    rows = []
    real = branches.answer_values

    def watched(decoder: Any, trees: Forest, heads: Any, space: Any, *how: Any) -> torch.Tensor:
        found = real(decoder, trees, heads, space, *how)
        rows.append((len(heads) + 1) * trees.tokens.numel())
        assert space.kept["states"].numel() <= D * max(rows)
        return found

    monkeypatch.setattr(intervention.branches, "answer_values", watched)
    all_head_drops(decoder, encoded(PROMPTS), Options(batch_tokens=tokens))
    assert max(rows) <= max(4 * tokens, 2 * 8)


def test_progress_ends_with_all_prompts() -> None:
    for name in ("llama", "gpt2"):
        seen: list[tuple[str, int, int]] = []
        options = Options(batch_tokens=8, progress=lambda *step, seen=seen: seen.append(step))
        all_head_drops(pico(name), encoded(PROMPTS), options)
        assert seen[0] == ("heads", 0, 7)
        assert seen[-1] == ("heads", 7, 7)
        assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_methods_take_the_fast_heads() -> None:
    decoder = pico("llama-gqa")
    heads, _ = METHODS["cna"](decoder, encoded(PROMPTS), OPTIONS)
    assert_near(heads, replayed(decoder).mean(0), 1e-5)
