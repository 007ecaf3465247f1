"""Scores equal the authors' figures and the slow oracle, however the prompts are batched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pico_checkpoint import V, dense
from reference import Prompt

from prune_edit.decoder import Decoder
from prune_edit.errors import OutputWriteError, PlanError
from prune_edit.hooks import capture, scale
from prune_edit.recover.shrink import shrink
from prune_edit.replay import record
from prune_edit.scoring import METHODS, Options, Scores, predicted_targets
from prune_edit.scoring.importance import importances
from prune_edit.scoring.intervention import head_drops, score_intervention
from prune_edit.tasks.prompts import Batch, Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

NAMES = ("llama", "llama-gqa", "mistral", "gpt2")
OPTIONS = Options()
PROMPTS = (
    Prompt((3, 9, 27, 4, 12, 36, 2), 5),  # two answer tokens
    Prompt((5, 25, 8), 2),
    Prompt((7, 33, 14, 21, 39, 1, 30, 6, 18), 6),  # three
    Prompt((11, 2, 19, 28), 3),
)


def pico(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


def encoded(prompts: tuple[Prompt, ...] = PROMPTS) -> list[Encoded]:
    return [Encoded(p.ids, p.start, Example(str(p.ids), "")) for p in prompts]


def hooks_of(decoder: Decoder) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in decoder.model.modules()
    )


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    assert want.abs().max() > 10 * tolerance, "the figures are too small to tell anything"
    assert (got - want).abs().max() <= tolerance


# The authors' code


@pytest.fixture(scope="module")
def golden(shared: Path) -> list[dict[str, Any]]:
    path = shared / "golden" / "cna_stories260K.json"
    if not path.is_file():
        pytest.skip(f"no figures at {path}")
    return json.loads(path.read_text())["cases"]


@pytest.fixture(scope="module")
def golden_batch(golden: list[dict[str, Any]]) -> Batch:
    rows = [
        Encoded((*case["input_ids"], case["target"]), len(case["input_ids"]), Example("", ""))
        for case in golden
    ]
    assert len({len(row.ids) for row in rows}) > 1, "padding should take part"
    return collate(rows)


def test_predicted_target_is_the_authors(
    stories260k: Decoder, golden: list[dict[str, Any]]
) -> None:
    fronts = [
        Encoded((*case["input_ids"], 0, 5), len(case["input_ids"]), Example(str(i), ""))
        for i, case in enumerate(golden)
    ]
    found = predicted_targets(stories260k, fronts, Options(batch_tokens=24))
    assert [row.answer for row in found] == [(case["target"],) for case in golden]
    assert [row.example.prompt for row in found] == [str(i) for i in range(len(golden))]


@torch.no_grad()
def test_heads_are_the_authors(
    stories260k: Decoder, golden: list[dict[str, Any]], golden_batch: Batch
) -> None:
    drops = head_drops(stories260k, golden_batch, OPTIONS)
    for i, case in enumerate(golden):
        dense_log_prob = torch.tensor(case["prob"]).log()
        ablated = (dense_log_prob - drops[i]).exp()
        assert_near(ablated, torch.tensor(case["ablated_prob"]))
        assert list(divmod(int(drops[i].argmax()), drops.shape[2])) == case["top_head"]


@torch.no_grad()
def test_neurons_are_the_authors(
    stories260k: Decoder, golden: list[dict[str, Any]], golden_batch: Batch
) -> None:
    top = torch.tensor([[layer * 8 + head] for layer, head in (c["top_head"] for c in golden)])
    units = Units.without_heads(stories260k.head_shape, top)
    whole, final = importances(stories260k, golden_batch)
    ablated, _ = importances(stories260k, golden_batch, units, frozen=final)
    with capture(stories260k) as seen:
        stories260k.final_states(**golden_batch.inputs)
    for i, case in enumerate(golden):
        want, want_ablated = (
            torch.tensor(case[name]) for name in ("importance", "importance_ablated")
        )
        assert_near(whole[i], want)
        assert_near(ablated[i], want_ablated)
        assert_near(whole[i] - ablated[i], want - want_ablated)
        place = (int(golden_batch.rows[i]), int(golden_batch.columns[i]))
        got = torch.stack([seen.coefficients[layer][place] for layer in range(5)])
        assert_near(got, torch.tensor(case["coefficient"]))


@pytest.mark.parametrize("method", ["cna", "importance"])
def test_whole_methods_are_the_authors(
    stories260k: Decoder, golden: list[dict[str, Any]], method: str
) -> None:
    fronts = [
        Encoded((*case["input_ids"], 0), len(case["input_ids"]), Example(str(i), ""))
        for i, case in enumerate(golden)
    ]
    prompts = predicted_targets(stories260k, fronts, OPTIONS)
    heads, neurons = METHODS[method](stories260k, prompts, OPTIONS)
    importance, ablated, probs = (
        torch.tensor([case[name] for case in golden])
        for name in ("importance", "importance_ablated", "ablated_prob")
    )
    want = importance - ablated if method == "cna" else importance
    assert_near(neurons, want.mean(0))
    dense_probs = torch.tensor([case["prob"] for case in golden])[:, None, None]
    # Probabilities are given to eight places, so their logs are good to 1e-4 only where not tiny.
    assert_near(heads, (dense_probs.log() - probs.log()).mean(0), 2e-4)


# The oracle


@pytest.mark.parametrize("method", ["cna", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_methods_equal_the_oracle(name: str, method: str) -> None:
    decoder = pico(name)
    heads, neurons = METHODS[method](decoder, encoded(), OPTIONS)
    assert heads.dtype == neurons.dtype == torch.float32
    assert_near(heads, reference.head_scores(decoder.model, PROMPTS))
    want = reference.neuron_scores(decoder.model, PROMPTS, contrast=method == "cna")
    assert_near(neurons, want)
    alone, _ = score_intervention(decoder, encoded(), replace(OPTIONS, neurons=False))
    assert torch.equal(heads, alone)


def test_several_top_heads_are_ablated_together() -> None:
    decoder = pico("llama-gqa")
    one = METHODS["cna"](decoder, encoded(), OPTIONS)[1]
    two = METHODS["cna"](decoder, encoded(), Options(top_heads=2))[1]
    want = reference.neuron_scores(decoder.model, PROMPTS, contrast=True, top_heads=2)
    assert_near(two, want)
    assert (two - one).abs().max() > 1e-2


def test_oracle_states_are_those_of_the_model() -> None:
    # The oracle itself: its residual output, coefficients and FFN rebuild the layer (eq. 1 and 5).
    for name in NAMES:
        model: Any = dense(name)
        ids = PROMPTS[0].ids
        last = len(reference.layers(model)) - 1
        ffn = reference.coefficients(model, last, ids) @ reference.values(model, last)
        bias = reference.ffn_bias(model, last)
        rebuilt = reference.residual_outputs(model, last, ids) + ffn + (0 if bias is None else bias)
        assert torch.allclose(rebuilt, reference.final_states(model, ids), atol=1e-4)


# Theorems


@pytest.mark.parametrize("name", NAMES)
def test_order_and_batch_size_do_not_matter(name: str) -> None:
    decoder = pico(name)
    want = METHODS["cna"](decoder, encoded(), OPTIONS)
    for order, tokens in ((PROMPTS[::-1], 4096), (PROMPTS, 1), (PROMPTS[2:] + PROMPTS[:2], 16)):
        got = METHODS["cna"](decoder, encoded(order), Options(batch_tokens=tokens))
        for part, expected in zip(got, want, strict=True):
            assert_near(part, expected, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_padding_side_does_not_matter(name: str) -> None:
    decoder = pico(name)
    top = torch.tensor([[1], [0], [5], [2]])
    units = Units.without_heads(decoder.head_shape, top)
    found = []
    for side in ("right", "left"):
        batch = collate(encoded(), side)
        found.append((head_drops(decoder, batch, OPTIONS), *importances(decoder, batch, units)))
    for right, left in zip(*found, strict=True):
        assert_near(left, right, 5e-5)


@torch.no_grad()
def test_as_many_examples_as_tokens() -> None:
    # A tensor of T numbers must not be taken for one of B examples when the model is replayed.
    prompts = tuple(Prompt((*ids, 4, 9), 4) for ids in ((1, 2, 3), (4, 8, 6), (7, 5, 9), (3, 2, 8)))
    assert collate(encoded(prompts)).input_ids.shape == (4, 4)
    for name in NAMES:
        decoder = pico(name)
        got = head_drops(decoder, collate(encoded(prompts)), OPTIONS)
        for i, prompt in enumerate(prompts):
            alone = head_drops(decoder, collate(encoded((prompt,))), OPTIONS)[0]
            assert_near(got[i], alone, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_hooked_ablation_is_zeroed_weights(name: str) -> None:
    decoder = pico(name)
    inputs = collate(encoded()).inputs
    before = decoder.model(**inputs).logits
    heads, neurons = [(0, 1), (1, 3)], [(0, 2), (0, 11), (1, 5)]
    flat_heads = torch.tensor([layer * decoder.head_shape[1] + unit for layer, unit in heads])
    factors = torch.ones(decoder.neuron_shape)
    for place in neurons:
        factors[place] = 0.0
    units = Units(Units.without_heads(decoder.head_shape, flat_heads).heads, factors)
    with scale(decoder, units):
        got = decoder.model(**inputs).logits
    want = reference.without(decoder.model, heads, neurons)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert_near(got[real], want[real], 2e-5)
    assert (got - before)[real].abs().max() > 1e-2
    assert torch.equal(decoder.model(**inputs).logits, before)


@torch.no_grad()
def test_each_example_can_have_its_own_factors() -> None:
    decoder = pico("gpt2")
    inputs = collate(encoded()).inputs
    factors = torch.rand(len(PROMPTS), *decoder.head_shape)
    widths = torch.rand(len(PROMPTS), *decoder.neuron_shape)
    with scale(decoder, Units(factors, widths)):
        together = decoder.model(**inputs).logits
    for i in range(len(PROMPTS)):
        with scale(decoder, Units(factors[i], widths[i])):
            alone = decoder.model(**inputs).logits[i]
        assert_near(together[i], alone, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_scaling_by_one_changes_nothing(name: str) -> None:
    decoder = pico(name)
    inputs = collate(encoded()).inputs
    before = decoder.model(**inputs).logits
    ones = Units(torch.ones(decoder.head_shape), torch.ones(decoder.neuron_shape))
    for units in (ones, Units()):
        with scale(decoder, units):
            assert torch.equal(decoder.model(**inputs).logits, before)
    for units in (Units(heads=ones.heads * 1.01), Units(neurons=ones.neurons * 1.01)):  # type: ignore[operator]
        with scale(decoder, units):
            assert not torch.equal(decoder.model(**inputs).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_units_sum_to_their_block(name: str) -> None:
    """Eq. 2 and eq. 5: what is captured, through the output projection, is the block's output."""
    decoder = pico(name)
    outputs: dict[tuple[str, int], torch.Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, key=(part, layer): outputs.update({key: output})
        )
        for layer in range(decoder.n_layers)
        for part, module in (
            ("heads", decoder.attention_output(layer)),
            ("neurons", decoder.ffn_output(layer)),
        )
    ]
    with capture(decoder) as seen:
        decoder.final_states(**collate(encoded()).inputs)
    for handle in handles:
        handle.remove()
    size = decoder.head_dim
    assert size * decoder.head_shape[1] == seen.heads[0].shape[-1]
    for layer in range(decoder.n_layers):
        projection: Any = decoder.attention_output(layer)
        weight = decoder.output_weight(projection)
        total = sum(
            seen.heads[layer][..., head * size : (head + 1) * size]
            @ weight[head * size : (head + 1) * size]
            for head in range(decoder.head_shape[1])
        )
        bias = 0 if projection.bias is None else projection.bias
        assert torch.allclose(total + bias, outputs["heads", layer], atol=1e-4)
        total = torch.einsum("btn,nd->btd", seen.coefficients[layer], decoder.values(layer))
        bias = getattr(decoder.ffn_output(layer), "bias", None)
        total = total if bias is None else total + bias
        assert torch.allclose(total, outputs["neurons", layer], atol=1e-4)


@torch.no_grad()
def test_a_hook_after_the_projection_would_tell_something_else() -> None:
    decoder = pico("llama")
    layer, size = 1, decoder.head_dim
    prompt = PROMPTS[0]
    projection: Any = decoder.attention_output(layer)

    def wrong_drop(head: int) -> float:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[..., head * size : (head + 1) * size] = 0
            return output

        handle = projection.register_forward_hook(hook)
        left = reference.answer_log_prob(decoder.model, prompt)
        handle.remove()
        return reference.answer_log_prob(decoder.model, prompt) - left

    right = head_drops(decoder, collate(encoded((prompt,))), OPTIONS)[0, layer]
    want = [reference.head_drop(decoder.model, prompt, (layer, head)) for head in range(4)]
    wrong = [wrong_drop(head) for head in range(4)]
    assert_near(right, torch.tensor(want))
    assert (right - torch.tensor(wrong)).abs().max() > 0.1


class Boom(Exception):
    """Raised inside hooks' reach."""


def _boom(*args: Any) -> None:
    raise Boom


def _inside_scale(decoder: Decoder) -> None:
    with scale(decoder, Units(torch.ones(decoder.head_shape), torch.ones(decoder.neuron_shape))):
        assert hooks_of(decoder) == 1 + 2 * decoder.n_layers
        raise Boom


def _inside_capture(decoder: Decoder) -> None:
    with capture(decoder):
        assert hooks_of(decoder) == 1 + 4 * decoder.n_layers + 1
        raise Boom


def _forward(call: Callable[[Decoder], Any]) -> Callable[[Decoder], None]:
    def act(decoder: Decoder) -> None:
        handle = decoder.layers[-1].register_forward_hook(_boom)
        try:
            call(decoder)
        finally:
            handle.remove()

    return act


@pytest.mark.parametrize(
    "act",
    [
        _inside_scale,
        _inside_capture,
        _forward(lambda decoder: record(decoder, collate(encoded()).inputs)),
        _forward(lambda decoder: head_drops(decoder, collate(encoded()), OPTIONS)),
        _forward(lambda decoder: importances(decoder, collate(encoded()), Units())),
        _forward(lambda decoder: METHODS["cna"](decoder, encoded(), OPTIONS)),
    ],
    ids=["scale", "capture", "record", "head_drops", "importances", "cna"],
)
def test_no_hook_survives_an_exception(act: Callable[[Decoder], None]) -> None:
    decoder = pico("llama")
    witness = decoder.model.register_forward_hook(lambda *args: None)
    assert hooks_of(decoder) == 1
    with pytest.raises(Boom):
        act(decoder)
    assert hooks_of(decoder) == 1
    witness.remove()
    METHODS["cna"](decoder, encoded(), OPTIONS)
    assert hooks_of(decoder) == 0


# Pruned models

KEPT: dict[str, tuple[Any, Any]] = {
    "llama": (((), (1, 3), (0, 1, 2, 3), (2,)), ((0, 5, 11), (), tuple(range(12)), (7,))),
    "llama-gqa": (((0, 1, 2, 5), (), (3, 7)), ((1, 2), (3,), ())),  # layer 0 has pads
    "mistral": (((1,), (0, 2, 3)), ((0, 1, 2), (4, 9))),
    "gpt2": (((), (0, 2, 3), (1,)), ((0, 40, 127), (), (5, 6))),
}


def mask_of(shape: tuple[int, int], kept: Any) -> torch.Tensor:
    mask = torch.zeros(shape)
    for layer, units in enumerate(kept):
        mask[layer, list(units)] = 1
    return mask


@pytest.mark.parametrize("method", ["cna", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_scores_as_the_masked_one(name: str, method: str) -> None:
    decoder = pico(name)
    heads, neurons = KEPT[name]
    small = shrink(decoder, heads, neurons, None, OPTIONS)
    assert small.model.num_parameters() < decoder.model.num_parameters()
    masks = [mask_of(decoder.head_shape, heads), mask_of(decoder.neuron_shape, neurons)]
    with scale(decoder, Units(*masks)):
        want = METHODS[method](decoder, encoded(), OPTIONS)
        best = head_drops(decoder, collate(encoded()), OPTIONS).flatten(1).max(1).values
    assert best.min() > 0, "a removed head would be the top head"
    got = METHODS[method](small, encoded(), OPTIONS)
    for part, expected, mask in zip(got, want, masks, strict=True):
        kept = mask.bool()
        assert_near(part[kept], expected[kept], 2e-4)
        assert part[~kept].isnan().all()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_baselines_of_a_pruned_model(name: str) -> None:
    decoder = pico(name)
    heads, neurons = KEPT[name]
    small = shrink(decoder, heads, neurons, None, OPTIONS)
    masks = [mask_of(decoder.head_shape, heads), mask_of(decoder.neuron_shape, neurons)]
    for method in ("random", "magnitude"):
        want, got = (METHODS[method](model, [], OPTIONS) for model in (decoder, small))
        for part, expected, mask in zip(got, want, masks, strict=True):
            assert_near(part[mask.bool()], expected[mask.bool()], 1e-5)
            assert part[~mask.bool()].isnan().all()


# Baselines


def test_random_follows_the_seed() -> None:
    decoder = pico("llama")
    first, again, other = (METHODS["random"](decoder, [], Options(seed=s)) for s in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert 0 <= a.min() < a.max() <= 1
    state = torch.random.get_rng_state()
    METHODS["random"](decoder, [], OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_magnitude_by_hand() -> None:
    model: Any = dense("llama-gqa")  # 8 query heads on 2 KV heads, E = 4
    heads, neurons = METHODS["magnitude"](Decoder(model, None), [], OPTIONS)  # type: ignore[arg-type]
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    parts = (
        attention.q_proj.weight[20:24],  # head 5
        attention.k_proj.weight[4:8],  # its group's, the second
        attention.v_proj.weight[4:8],
        attention.o_proj.weight[:, 20:24],
    )
    want = sum(float(part.detach().pow(2).sum()) for part in parts) ** 0.5
    assert float(heads[1, 5]) == pytest.approx(want, rel=1e-5)
    parts = (mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3])
    want = sum(float(part.detach().pow(2).sum()) for part in parts) ** 0.5
    assert float(neurons[1, 3]) == pytest.approx(want, rel=1e-5)


def test_magnitude_by_hand_of_a_fused_projection() -> None:
    model: Any = dense("gpt2")  # 4 heads, E = 8; one (D, 3 D) projection
    heads, neurons = METHODS["magnitude"](Decoder(model, None), [], OPTIONS)  # type: ignore[arg-type]
    block = model.transformer.h[2]
    fused = block.attn.c_attn.weight
    parts = (
        fused[:, 8:16],
        fused[:, 32 + 8 : 32 + 16],
        fused[:, 64 + 8 : 64 + 16],
        block.attn.c_proj.weight[8:16],
    )
    want = sum(float(part.detach().pow(2).sum()) for part in parts) ** 0.5
    assert float(heads[2, 1]) == pytest.approx(want, rel=1e-5)
    parts = (block.mlp.c_fc.weight[:, 100], block.mlp.c_proj.weight[100])
    want = sum(float(part.detach().pow(2).sum()) for part in parts) ** 0.5
    assert float(neurons[2, 100]) == pytest.approx(want, rel=1e-5)


# Progress and files


@pytest.mark.parametrize("method", ["cna", "importance"])
def test_progress_counts_the_prompts(method: str) -> None:
    seen: list[tuple[int, int]] = []
    options = Options(batch_tokens=1, progress=lambda what, done, total: seen.append((done, total)))
    METHODS[method](pico("llama"), encoded(), options)
    assert seen == [(i, len(PROMPTS)) for i in range(len(PROMPTS) + 1)]


def some_scores(**metadata: str) -> Scores:
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(2, 4, generator=generator)
    heads[1, 2] = float("nan")
    return Scores(heads, torch.rand(2, 6, generator=generator), metadata)


@pytest.mark.parametrize("place", ["scores.safetensors", "a folder", "deep/er/x.safetensors"])
def test_scores_survive_their_file(place: str, tmp_path: Path) -> None:
    scores = some_scores(method="cna", task="arithmetic", seed="0")
    scores.save(tmp_path / place)
    back = Scores.load(tmp_path / place)
    assert torch.equal(back.heads.nan_to_num(-1), scores.heads.nan_to_num(-1))
    assert torch.equal(back.neurons, scores.neurons)
    assert back.metadata == scores.metadata
    assert back.digest == scores.digest
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".safetensors"], "something is left over"


def test_digest_follows_every_part() -> None:
    base = some_scores(method="cna")
    moved = base.neurons.clone()
    moved[1, 5] += 1e-6
    digests = {
        base.digest,
        some_scores(method="random").digest,
        Scores(base.heads, moved, base.metadata).digest,
        Scores(base.heads.view(4, 2), base.neurons, base.metadata).digest,
    }
    assert len(digests) == 4
    assert some_scores(method="cna").digest == base.digest
    assert all(len(digest) == 64 for digest in digests)


def test_bad_score_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    missing = tmp_path / "none.safetensors"
    with pytest.raises(PlanError, match=r"none\.safetensors cannot be read.*prune-edit score"):
        Scores.load(missing)
    missing.write_bytes(b"rubbish")
    with pytest.raises(PlanError, match="cannot be read"):
        Scores.load(missing)
    tensors = {"heads": torch.ones(1, 1), "neurons": torch.ones(1, 1)}
    save_file(tensors, missing, metadata={"schema": "99"})
    with pytest.raises(PlanError, match=r"of another schema; make them again"):
        Scores.load(missing)
    save_file({"heads": torch.ones(1, 1)}, missing, metadata={"schema": "1"})
    with pytest.raises(PlanError, match="neurons"):
        Scores.load(missing)


def test_scores_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputWriteError, match="give another --out"):
        some_scores().save(tmp_path / "file" / "scores.safetensors")


def test_pico_vocabulary_holds_the_prompts() -> None:
    assert max(itertools.chain.from_iterable(p.ids for p in PROMPTS)) < V
