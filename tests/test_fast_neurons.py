"""Neuron importance by moments and the certified top k, against float64 sums over every token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pico_checkpoint import dense, hard_layout, ragged
from reference import Prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, PlanError
from prune_edit.scoring import METHODS, curvature, importance
from prune_edit.scoring.importance import (
    Readout,
    Traces,
    importances,
    join,
    layer_importances,
    read_out,
    trace,
)
from prune_edit.scoring.options import Options, predicted_targets
from prune_edit.scoring.topk import SLACK, Top, curvature_excess, top_neurons, top_of
from prune_edit.tasks.prompts import Batch, Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

NAMES = ("llama", "llama-gqa", "mistral", "gpt2")
PROMPTS = (
    Prompt((3, 9, 27, 4, 12, 36, 2), 5),  # two answer tokens
    Prompt((5, 25, 8), 2),
    Prompt((7, 33, 14, 21, 39, 1, 30, 6, 18), 6),  # three
    Prompt((11, 2, 19, 28), 3),
)
OPTIONS = Options()


def pico(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


def encoded(prompts: tuple[Prompt, ...] = PROMPTS) -> list[Encoded]:
    return [Encoded(p.ids, p.start, Example(str(p.ids), "")) for p in prompts]


def wide(seed: int = 0, neurons: int = 160, scale: float = 0.1) -> Decoder:
    """More neurons and tokens than a pico model has, coefficients that matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=900,
        hidden_size=24,
        intermediate_size=neurons,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        initializer_range=scale,
    )
    return Decoder(LlamaForCausalLM(config).eval(), None)  # type: ignore[arg-type]


def some_prompts(decoder: Decoder, count: int = 12) -> list[Encoded]:
    ids = torch.randint(1, len(decoder.unembedding), (count, 6))
    return [Encoded(tuple(row), 5, Example(str(i), "")) for i, row in enumerate(ids.tolist())]


# The kernel: A distributions, n neurons, V tokens


def readout(
    logits: torch.Tensor, values: torch.Tensor, unembedding: torch.Tensor, moved: torch.Tensor
) -> Readout:
    """One whose distributions are those of `logits` (A, V), with the float32 rounding they have."""
    log_p = logits.log_softmax(-1)
    p = log_p.double().exp()
    expected = (p @ unembedding.double() / p.sum(1, keepdim=True)).float()
    targets = torch.arange(len(logits)) % logits.shape[1]
    return Readout(values, moved, log_p, expected, targets, unembedding, None)


def case(name: str) -> Readout:
    torch.manual_seed(0)
    A, n, V, D = 5, 70, 1200, 8
    logits, values = torch.randn(A, V) * 2, torch.randn(n, D) / 3
    unembedding, moved = torch.randn(V, D), torch.randn(A, n) / 10
    if name == "huge coefficients":
        moved *= 10 ** torch.linspace(-4, 4, n)
    if name == "one hot":
        logits[torch.arange(A), torch.arange(A) * 7] += 60
    if name == "one hot away from the target, large":
        logits[:, 40] += 60
        moved *= 300
    if name == "outlier token":
        unembedding[17] *= 300
    if name == "outlier token that is never predicted":
        unembedding[17] *= 300
        logits[:, 17] -= 200
    if name == "shifted vocabulary":
        unembedding += 50
    if name == "no coefficient":
        moved[:, ::2] = 0
    if name == "no value":
        values[::3] = 0
    if name == "one position":
        logits, moved = logits[:1], moved[:1]
    if name == "two tokens":
        logits, unembedding = logits[:, :2], unembedding[:2]
    if name == "mixed sizes":
        moved *= 10 ** torch.randn(A, n)
    if name == "tiny":
        moved *= 1e-6
    return readout(logits, values, unembedding, moved)


CASES = (
    "plain",
    "huge coefficients",
    "one hot",
    "one hot away from the target, large",
    "outlier token",
    "outlier token that is never predicted",
    "shifted vocabulary",
    "no coefficient",
    "no value",
    "one position",
    "two tokens",
    "mixed sizes",
    "tiny",
)


def oracle(seen: Readout) -> torch.Tensor:
    """(A, n) float64."""
    images = seen.values.double() @ seen.unembedding.double().T
    return torch.stack(
        [
            reference.gains(log_p, images, m, int(w))
            for log_p, m, w in zip(seen.log_p, seen.moved, seen.targets, strict=True)
        ]
    )


def bound(seen: Readout) -> torch.Tensor:
    """The stated error: 5e-7 of truncation, and float32 rounding of what is summed, (A, n)."""
    image = seen.values.abs() @ seen.unembedding.float().abs().T
    return 1e-6 + 5e-7 * seen.moved.abs() * image.amax(1)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_sum_over_all_tokens(name: str) -> None:
    seen = case(name)
    got, want = seen.importances().double(), oracle(seen)
    assert ((got - want).abs() <= bound(seen)).all()
    assert got.isfinite().all()


def test_kernel_error_is_absolute_where_products_are_small() -> None:
    # Most neurons of a trained model: |m b| under one.
    seen = case("plain")
    images = seen.values @ seen.unembedding.T
    assert 0.5 < float((seen.moved.abs() * images.abs().amax(1)).max()) < 3
    assert (seen.importances().double() - oracle(seen)).abs().max() <= 1e-6


def test_small_curvatures_do_not_cancel() -> None:
    # C is far below the rounding of the logarithms that its definition subtracts.
    seen = case("plain")
    small = Readout(**{**vars(seen), "moved": seen.moved / 30})
    got = curvature.curvature(
        small.values, small.unembedding, small.log_p, small.expected, small.moved
    )
    want = small.first_order().double() - oracle(small)
    assert want.max() < 5e-4
    assert (got.double() - want).abs().max() < 3e-7
    assert (got >= 0).all()


@pytest.mark.parametrize("name", ["plain", "huge coefficients", "mixed sizes"])
def test_neither_blocks_nor_company_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = case(name)
    want = seen.importances()
    places = torch.tensor([3, 1])
    fewer = Readout(
        **{**vars(seen)}
        | {key: getattr(seen, key)[places] for key in ("moved", "log_p", "expected", "targets")}
    )
    assert ((fewer.importances() - want[places]).abs() <= bound(seen)[places]).all()
    some = torch.tensor([60, 2, 31])
    assert ((seen.importances(some) - want[:, some]).abs() <= bound(seen)[:, some]).all()
    monkeypatch.setattr(curvature, "_ROWS", 16)
    for block in (1 << 9, 1 << 13, 1 << 20):
        monkeypatch.setattr(importance, "block_size", lambda device, size=block: size)
        monkeypatch.setattr(curvature, "block_size", lambda device, size=block: size)
        assert ((seen.importances() - want).abs() <= bound(seen)).all()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage().nbytes() // part.element_size()
                owned = any(
                    isinstance(a, torch.Tensor)
                    and a.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
                    for a in args
                )
                self.size = max(self.size, 0 if owned else storage)
        return out


@pytest.mark.parametrize("size", [1.0, 100.0])  # by moments, and directly
def test_no_more_than_a_block_is_held(size: float) -> None:
    torch.manual_seed(0)
    A, n, V, D, block = 3, 90, 30_000, 16, 1 << 16
    seen = readout(
        torch.randn(A, V), torch.randn(n, D), torch.randn(V, D), torch.randn(A, n) / 30 * size
    )
    with Largest() as largest:
        curvature.curvature(
            seen.values, seen.unembedding, seen.log_p, seen.expected, seen.moved, block
        )
    assert n * V > 40 * block
    assert 1000 < largest.size <= 2 * block  # both blocks are one tensor


# Models


def readouts_of(decoder: Decoder, units: Units | None = None) -> list[tuple[Readout, torch.Tensor]]:
    """Every layer's, and what the kernel says of it."""
    batch = collate(encoded())
    whole = trace(decoder, batch)
    seen = whole if units is None else trace(decoder, batch, units, frozen=whole.final)
    return [
        (read_out(decoder, seen, layer), layer_importances(decoder, seen, layer))
        for layer in seen.coefficients
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ablated", [False, True])
def test_models_equal_the_float64_sum(name: str, ablated: bool) -> None:
    decoder = pico(name)
    top = torch.tensor([[1], [0], [3], [2]])
    units = Units.without_heads(decoder.head_shape, top) if ablated else None
    for seen, got in readouts_of(decoder, units):
        assert ((got.double() - oracle(seen)).abs() <= 2 * bound(seen)).all()


@torch.no_grad()
def test_bf16_weights_are_scored_in_float32() -> None:
    decoder = Decoder(dense("llama").bfloat16(), None)  # type: ignore[arg-type]
    for seen, got in readouts_of(decoder):
        assert seen.unembedding.dtype == torch.bfloat16 and got.dtype == torch.float32
        assert ((got.double() - oracle(seen)).abs() <= 2 * bound(seen)).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_models_have_nothing_where_nothing_is(name: str) -> None:
    model = dense(name)
    layout = hard_layout(name, model)
    decoder = Decoder(ragged(name, model, layout), None)  # type: ignore[arg-type]
    found, _ = importances(decoder, collate(encoded()))
    neurons = METHODS["cna"](decoder, encoded(), OPTIONS)[1]
    for layer, kept in enumerate(layout.neurons):
        there = torch.zeros(layout.n_neurons, dtype=torch.bool)
        there[list(kept)] = True
        for part in (found[0, layer], neurons[layer]):
            assert torch.equal(~part.isnan(), there)
    count = sum(map(len, layout.neurons))
    top = top_neurons(decoder, encoded(), count, OPTIONS)
    flat = top.indices[:, 0] * layout.n_neurons + top.indices[:, 1]
    assert sorted(flat.tolist()) == (~neurons.flatten().isnan()).nonzero()[:, 0].tolist()


@torch.no_grad()
def test_a_soft_cap_is_summed_in_full() -> None:
    seen = case("mixed sizes")
    capped = Readout(**{**vars(seen), "cap": 3.0})
    assert seen.linear and not capped.linear
    images = seen.values.double() @ seen.unembedding.double().T
    for a in range(len(seen.moved)):
        z, m, w = seen.log_p[a].double(), seen.moved[a].double(), int(seen.targets[a])
        after = 3 * torch.tanh((z + m[:, None] * images) / 3)
        want = after.log_softmax(-1)[:, w] - (3 * torch.tanh(z / 3)).log_softmax(-1)[w]
        assert (capped.importances()[a].double() - want).abs().max() < 5e-5
        assert (seen.importances()[a].double() - want).abs().max() > 0.1


@pytest.mark.parametrize("method", ["importance", "cna"])
def test_neither_order_nor_batches_nor_memory_matter(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = wide()
    rows = some_prompts(decoder)
    want = METHODS[method](decoder, rows, OPTIONS)[1]
    assert want.abs().max() > 1e-2
    for held, tokens in ((1 << 27, 5), (1, 4096), (20_000, 20)):
        monkeypatch.setattr(Decoder, "work", 4 * held)
        got = METHODS[method](decoder, rows[::-1], Options(batch_tokens=tokens))[1]
        assert (got - want).abs().max() < 2e-6


# The certified top k


def ranked(scores: torch.Tensor, k: int) -> tuple[set[int], torch.Tensor]:
    flat = scores.flatten().double().nan_to_num(nan=-math.inf)
    order = flat.argsort(descending=True, stable=True)[:k]
    return set(order.tolist()), flat[order]


def numbers(top: Top, width: int) -> set[int]:
    return set((top.indices[:, 0] * width + top.indices[:, 1]).tolist())


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_top_is_the_oracles(name: str, contrast: bool) -> None:
    decoder = pico(name)
    want = reference.neuron_scores(decoder.model, PROMPTS, contrast)
    for k in (1, 5, 11):
        chosen, scores = ranked(want, k)
        top = top_neurons(decoder, encoded(), k, OPTIONS, contrast)
        assert numbers(top, want.shape[1]) == chosen
        assert (top.scores.double() - scores).abs().max() < 2e-4
        assert (top.scores.diff() <= 0).all()


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("scale", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("k", [1, 30, 200])
def test_top_is_the_full_computations(contrast: bool, scale: float, k: int) -> None:
    decoder = wide(scale=scale)
    rows = some_prompts(decoder)
    method = "cna" if contrast else "importance"
    full = METHODS[method](decoder, rows, OPTIONS)[1]
    chosen, scores = ranked(full, k)
    top = top_neurons(decoder, rows, k, Options(batch_tokens=12), contrast)
    assert numbers(top, full.shape[1]) == chosen
    assert (top.scores.double() - scores).abs().max() < 2e-6
    assert top.indices.shape == (k, 2) and k / full.numel() <= top.evaluated <= 1


def test_top_evaluates_few() -> None:
    decoder = wide(neurons=700, scale=0.05)
    assert top_neurons(decoder, some_prompts(decoder), 60, OPTIONS).evaluated < 0.05


@torch.no_grad()
def test_top_breaks_ties_by_number() -> None:
    decoder = wide()
    for layer in range(3):
        decoder.layers[layer].mlp.down_proj.weight[:, 5:] = 0  # type: ignore[union-attr, index]
    full = METHODS["importance"](decoder, rows := some_prompts(decoder), OPTIONS)[1]
    above = int((full > 0).sum())
    assert 0 < above < 15 and (full == 0).sum() == 3 * 155
    for k in (above, above + 1, above + 200):
        top = top_neurons(decoder, rows, k, OPTIONS)
        assert numbers(top, 160) == ranked(full, k)[0]
        assert (top.scores[above:] == 0).all()


@torch.no_grad()
def test_top_of_unchanged_runs_costs_nothing() -> None:
    decoder = wide()
    whole = trace(decoder, collate(some_prompts(decoder)))
    top = top_of([whole, whole], decoder, 7)
    assert top.evaluated == 0 and (top.scores == 0).all()
    assert top.indices.tolist() == [[0, i] for i in range(7)]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_first_order_is_an_upper_bound(name: str) -> None:
    seen = case(name)
    want = oracle(seen)
    slack = bound(seen)
    assert (seen.first_order().double() >= want - slack).all()
    if name == "plain":  # and no loose one
        assert (seen.first_order().double() - want).median() < 0.2 * want.abs().median()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["plain", "one hot", "outlier token", "mixed sizes", "tiny"])
def test_curvature_excess_is_an_upper_bound(name: str, seed: int) -> None:
    one = case(name)
    torch.manual_seed(seed)
    nearness = 10.0 ** -(seed % 3)  # the other run is another, or almost the same
    logits = one.log_p + torch.randn_like(one.log_p) * nearness
    moved = one.moved * (1 + torch.randn_like(one.moved) * nearness)
    two = readout(logits, one.values, one.unembedding, moved)
    both = {
        key: torch.cat([getattr(one, key), getattr(two, key)])
        for key in ("moved", "log_p", "expected", "targets")
    }
    curved = [(seen.first_order().double() - oracle(seen)) for seen in (one, two)]
    want = (curved[1] - curved[0]).sum(0)
    got = curvature_excess(Readout(**{**vars(one), **both}))
    assert (got >= want - bound(one).sum(0) - bound(two).sum(0)).all()
    assert (got >= 0).all()


@pytest.mark.parametrize("method", ["cna", "importance"])
@pytest.mark.parametrize("heads", [1, 2])
def test_scores_of_the_best_alone_are_those_of_all(method: str, heads: int) -> None:
    decoder = wide(scale=0.15)
    rows = some_prompts(decoder)
    want = METHODS[method](decoder, rows, Options(top_heads=heads))
    got = METHODS[method](decoder, rows, Options(top_heads=heads, top_neurons=30, batch_tokens=12))
    torch.testing.assert_close(got[0], want[0], atol=1e-6, rtol=0)
    best = ~got[1].isnan()
    assert set(best.flatten().nonzero()[:, 0].tolist()) == ranked(want[1], 30)[0]
    torch.testing.assert_close(got[1][best], want[1][best], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"norm": "true"}, "the true norm"),
        ({"neurons": False}, "no neurons"),
        ({"contrast": tuple(encoded())}, "contrast prompts"),
        ({"adapted": pico("llama")}, "an adapter"),
    ],
)
def test_the_best_alone_are_certified_or_refused(more: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=rf"--top-neurons 3 cannot go with {text}"):
        METHODS["cna"](pico("llama"), encoded(), Options(top_neurons=3, **more))


def test_too_many_are_refused() -> None:
    decoder = pico("llama")
    for k in (0, 49):
        with pytest.raises(BudgetError, match=f"top {k} neurons .* has 48; give 1 to 48"):
            top_neurons(decoder, encoded(), k, OPTIONS)
    with pytest.raises(BudgetError, match="top 49 neurons"):
        METHODS["cna"](decoder, encoded(), Options(top_neurons=49))


# The authors' figures


@pytest.fixture(scope="module")
def golden(shared: Path) -> list[dict[str, Any]]:
    path = shared / "golden" / "cna_stories260K.json"
    if not path.is_file():
        pytest.skip(f"no figures at {path}")
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    return cases


def golden_traces(
    decoder: Decoder, golden: list[dict[str, Any]], ablated: bool
) -> tuple[list[Traces], Batch]:
    rows = [
        Encoded((*case["input_ids"], case["target"]), len(case["input_ids"]), Example("", ""))
        for case in golden
    ]
    batch = collate(rows)
    whole = trace(decoder, batch)
    if not ablated:
        return [whole], batch
    drops = torch.tensor([case["ablated_prob"] for case in golden]).flatten(1)
    units = Units.without_heads(decoder.head_shape, drops.argmin(1, keepdim=True))
    return [whole, trace(decoder, batch, units, frozen=whole.final)], batch


@torch.no_grad()
@pytest.mark.parametrize("ablated", [False, True])
def test_top_is_the_authors(
    stories260k: Decoder, golden: list[dict[str, Any]], ablated: bool
) -> None:
    want = torch.tensor([case["importance"] for case in golden])
    if ablated:
        want = want - torch.tensor([case["importance_ablated"] for case in golden])
    pair, _ = golden_traces(stories260k, golden, ablated)
    for k in (10, 50, 300):
        chosen, scores = ranked(want.double().mean(0), k)
        top = top_of(pair, stories260k, k)
        # Figures to eight places: neurons as close as that may change places.
        assert len(numbers(top, want.shape[2]) ^ chosen) <= k // 100 * 2
        assert (top.scores.double() - scores).abs().max() < 1e-5


@torch.no_grad()
def test_each_prompt_has_its_own_top(stories260k: Decoder, golden: list[dict[str, Any]]) -> None:
    pair, _ = golden_traces(stories260k, golden, ablated=True)
    for i, one in enumerate(golden):
        want = torch.tensor(one["importance"]) - torch.tensor(one["importance_ablated"])
        top = top_of([part.take(slice(i, i + 1)) for part in pair], stories260k, 20)
        assert numbers(top, want.shape[1]) == ranked(want, 20)[0]


@torch.no_grad()
def test_predicted_tokens_of_a_trained_model(stories260k: Decoder) -> None:
    fronts = [Encoded((1, 403 + i, 407, 0), 3, Example(str(i), "")) for i in range(8)]
    rows = predicted_targets(stories260k, fronts, OPTIONS)
    seen = trace(stories260k, collate(rows))
    for layer in seen.coefficients:
        view = read_out(stories260k, seen, layer)
        error = layer_importances(stories260k, join([seen]), layer).double() - oracle(view)
        assert (error.abs() <= bound(view)).all()
    assert SLACK >= 1e-6
