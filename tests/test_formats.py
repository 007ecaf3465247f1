"""Masked, uniform, ragged and the hooked dense model are one model, for every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pico_families import NAMES, D, N, family_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_edit.caching import decode, prefill
from prune_edit.checkpoint.compensation import Compensation
from prune_edit.checkpoint.slim import output_biases, slim_config, slim_tensors
from prune_edit.checkpoint.write import build_model, write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.families import family_of
from prune_edit.hooks import scale
from prune_edit.layout import Layout
from prune_edit.modeling import register
from prune_edit.units import Units

register()
IDS = torch.tensor([[3, 9, 27, 4, 12, 36, 2], [5, 25, 8, 1, 2, 3, 30]])
LAYERS, HEADS = 3, 4
# PRUNE_EDIT_PLANS=200 looks longer, before a release.
PLANS = int(os.environ.get("PRUNE_EDIT_PLANS", "2"))
every_family = pytest.mark.parametrize("name", NAMES)


@cache
def dense(name: str) -> Decoder:
    return Decoder(family_model(name, LAYERS), None)  # type: ignore[arg-type]


def ragged(decoder: Decoder, layout: Layout, constants: Compensation | None) -> PreTrainedModel:
    have, model = decoder.layout, decoder.model
    fields = slim_config(
        model.config.to_dict(),
        decoder.family,
        have,
        layout,
        output_bias=constants is not None,
        provenance={},
    )
    tensors = dict(slim_tensors(decoder.family, model.state_dict(), have, layout, constants))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return attending_alike(build_model(fields, tensors), decoder)


def attending_alike(model: Any, decoder: Decoder) -> Any:
    """The model with the other's attention, which no file keeps; Falcon's differ with ALiBi."""
    model.config._attn_implementation = decoder.model.config._attn_implementation
    return model


@contextmanager
def hooked(decoder: Decoder, layout: Layout, constants: Compensation | None) -> Iterator[None]:
    """The dense model with the removed units scaled to zero and the constants added."""
    units = Units(torch.zeros(decoder.head_shape), torch.zeros(decoder.neuron_shape))
    for factors, kept in ((units.heads, layout.heads), (units.neurons, layout.neurons)):
        assert factors is not None
        for layer, each in enumerate(kept):
            factors[layer, list(each)] = 1
    with ExitStack() as stack:
        stack.enter_context(scale(decoder, units))
        for layer in range(decoder.n_layers if constants is not None else 0):
            assert constants is not None
            for module, constant in (
                (decoder.attention_output(layer), constants.attention[layer]),
                (decoder.ffn_output(layer), constants.ffn[layer]),
            ):
                assert module is not None and constant is not None
                handle = module.register_forward_hook(
                    lambda module, args, output, constant=constant: output + constant.to(output)
                )
                stack.callback(handle.remove)
        yield


@torch.no_grad()
def steps(model: Any) -> torch.Tensor:
    """Logits of all positions, prefilled, and of the last two decoded on a cache: (B, T + 2, V)."""
    whole = model(IDS, use_cache=False).logits
    _, past = prefill(model, IDS[:, :-2])
    cached = [decode(model, IDS[:, t : t + 1], past).logits for t in (-2,)]
    cached.append(decode(model, IDS[:, -1:], past).logits)
    return torch.cat([whole, *cached], 1)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max())


def written(folder: Path, form: str, decoder: Decoder, kv: str | None = None) -> Any:
    folder.mkdir(parents=True)
    write_checkpoint(
        folder,
        form,
        decoder.family,
        decoder.model.config.to_dict(),
        decoder.model.state_dict(),
        decoder.layout,
        kv=kv,
    )
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return attending_alike(model.eval(), decoder)


def plans(decoder: Decoder) -> st.SearchStrategy[Layout]:
    """Any units of every layer, none at all in some; the model keeps a head somewhere."""

    def kept(count: int) -> st.SearchStrategy[tuple[int, ...]]:
        some = st.sets(st.integers(0, count - 1)).map(lambda units: tuple(sorted(units)))
        return st.one_of(st.just(()), some, st.just(tuple(range(count))))

    def layers(count: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
        return st.tuples(*[kept(count)] * LAYERS)

    heads = layers(HEADS).filter(any)
    return st.builds(decoder.layout.keep, heads, layers(N))


def constants(seed: int = 0) -> Compensation:
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randn(D, generator=generator) for _ in range(LAYERS)] for _ in range(2)]
    return Compensation(tuple(drawn[0]), tuple(drawn[1]))


def has_room(small: Decoder) -> bool:
    """Whether the stock architecture, or one that computes the same, has the output biases."""
    attention, ffn = output_biases(small.model.config.to_dict(), small.family)
    own = (small.family, *map(family_of, small.family.same_as))
    slides = getattr(small.model.config, "sliding_window", None) is not None
    rows = own[:1] if slides else own
    return any(
        (not attention or row.biases[1] is not False) and (not ffn or row.biases[2] is not False)
        for row in rows
    )


FORMS = (("masked", None), ("uniform", None), ("uniform", "duplicate"), ("ragged", None),
         ("ragged", "duplicate"))  # fmt: skip


@every_family
def test_all_forms_of_a_random_plan_are_one_model(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    decoder = dense(name)

    @settings(
        max_examples=PLANS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(plans(decoder), st.booleans())
    def check(layout: Layout, compensated: bool) -> None:
        extra = constants() if compensated else None
        with hooked(decoder, layout, extra):
            want = steps(decoder.model)
        small = decoder.with_model(ragged(decoder, layout, extra))
        assert distance(steps(small.model), want) <= 1e-5
        folder = tmp_path_factory.mktemp(name)
        for form, kv in FORMS:
            if form != "ragged" and not has_room(small):
                with pytest.raises(PlanError, match="no stock checkpoint can hold"):
                    written(folder / f"{form}-{kv}", form, small, kv)
                continue
            model = written(folder / f"{form}-{kv}", form, small, kv)
            assert distance(steps(model), want) <= 1e-5, (form, kv)
            if form != "ragged":
                assert type(model).__module__.startswith("transformers.")

    check()


# Layer 0 without attention, one without FFN, a short group; then layer 0 without either.
HARD = (
    (((), (0, 1, 3), (2,)), ((0, 5, 11), (), (1, 2, 3, 4))),
    (((), (1,), (0, 2, 3)), ((), tuple(range(N)), (7,))),
)


def hard(name: str, which: int = 0, extra: Compensation | None = None) -> tuple[Decoder, Layout]:
    decoder = dense(name)
    layout = decoder.layout.keep(*HARD[which])
    return decoder.with_model(ragged(decoder, layout, extra)), layout


@every_family
def test_bfloat16_within_its_rounding(name: str) -> None:
    decoder = dense(name)
    layout = decoder.layout.keep(*HARD[0])
    halved = decoder.with_model(family_model(name, LAYERS).to(torch.bfloat16))
    attending_alike(halved.model, decoder)
    small: Any = attending_alike(ragged(halved, layout, constants()), decoder)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with hooked(decoder, layout, constants()):
        exact = steps(decoder.model)
    with hooked(halved, layout, constants()):
        rounding = distance(steps(halved.model).float(), exact)
    assert distance(steps(small).float(), exact) <= 2 * rounding + 2**-8


@every_family
def test_generates_and_saves_again(name: str, tmp_path: Path) -> None:
    small, _ = hard(name, 1, constants())
    model: Any = small.model
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "disable_compile": True,
        "pad_token_id": 0,
    }
    able = model._can_set_attn_implementation()
    kinds = ["eager", *["sdpa"] * model._supports_sdpa] if able else [None]
    caches = ("dynamic",) if getattr(model.config, "alibi", False) else ("dynamic", "static")
    found = []
    for kind in kinds:
        if kind is not None:
            model.set_attn_implementation(kind)
        for form in caches:  # stock ALiBi takes no static one
            found.append(model.generate(IDS, cache_implementation=form, **options))
    assert all(torch.equal(found[0], other) for other in found)
    masked = written(tmp_path / "masked", "masked", small) if has_room(small) else None
    if masked is not None:
        assert torch.equal(masked.generate(IDS, **options), found[0])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    attending_alike(again, small)
    assert torch.equal(again.generate(IDS, **options), found[0])
    assert Layout.of_config(again.config) == small.layout


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "olmo2", "gpt_neox", "opt"])
def test_exports_and_puts_layers_on_disk(name: str, tmp_path: Path) -> None:
    small, _ = hard(name, 0, constants())
    want = steps(small.model)[:, : IDS.shape[1]]
    with torch.no_grad():
        program = torch.export.export(small.model, (IDS,), {"use_cache": False}, strict=False)
        assert distance(program.module()(IDS, use_cache=False).logits, want) <= 1e-5
    written(tmp_path / "slim", "ragged", small)
    load: Any = AutoModelForCausalLM.from_pretrained
    half = sum(p.numel() for p in small.model.parameters()) * 2
    spread = load(
        tmp_path / "slim",
        device_map="auto",
        max_memory={"cpu": half},
        offload_folder=tmp_path / "disk",
    )
    assert "disk" in spread.hf_device_map.values()
    assert distance(steps(spread)[:, : IDS.shape[1]], want) <= 1e-5
    alone = load(tmp_path / "slim", device_map="auto")
    assert distance(steps(alone)[:, : IDS.shape[1]], want) <= 1e-5


def test_the_prefix_is_all_that_keeps_a_folder_from_being_stock(tmp_path: Path) -> None:
    """transformers' own schema and its own layers give the shapes, once `pruned_` is off."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    small, layout = hard("qwen3", 0)
    written(tmp_path / "slim", "ragged", small)
    path = tmp_path / "slim" / "config.json"
    fields = json.loads(path.read_text())
    assert fields["model_type"] == "pruned_qwen3"
    path.write_text(json.dumps({**fields, "model_type": "qwen3"}))
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert type(config).__module__.startswith("transformers.")
    tensors = small.model.state_dict()
    for layer, heads in enumerate(layout.slots):
        own = config.per_layer_config[layer]
        if not heads or not layout.neurons[layer]:
            skipped = {"attention"} if not heads else {"ffn"}
            assert skipped <= set(own.skip)
            continue
        assert own.num_attention_heads == len(heads)
        for name, tensor in Qwen3DecoderLayer(own, layer).state_dict().items():
            assert tensor.shape == tensors[f"model.layers.{layer}.{name}"].shape


def test_compiles_as_one_graph() -> None:
    small, _ = hard("opt", 0, constants())
    model: Any = small.model
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert distance(compiled(IDS), model(IDS, use_cache=False).logits) <= 1e-5


@pytest.mark.parametrize("name", ["phi3", "falcon-new", "opt"])
def test_lora_trains_saves_and_merges(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    small, _ = hard(name, 0)
    again: Any = written(tmp_path / "slim", "ragged", small)
    tuned = get_peft_model(again, LoraConfig(target_modules="all-linear", r=2))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()
    changed = tuned(IDS).logits.detach()
    assert distance(changed, small.model(IDS).logits) > 1e-4
    tuned.save_pretrained(tmp_path / "adapter")
    fresh: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert distance(loaded(IDS).logits, changed) <= 1e-5
    assert distance(loaded.merge_and_unload()(IDS).logits, changed) <= 1e-5


def test_every_family_loads_with_remote_code_and_without_prune_edit(tmp_path: Path) -> None:
    names = [name for name in NAMES if "-" not in name]
    for name in names:
        small, _ = hard(name, 1, constants())
        written(tmp_path / name, "ragged", small)
        with torch.no_grad():
            save_file({"logits": small.model(IDS).logits}, tmp_path / name / "expected")
    script = f"""
import sys
sys.modules["prune_edit"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name in {names!r}:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__, type(model)
    with torch.no_grad():
        logits = model(torch.tensor({IDS.tolist()})).logits
    want = load_file(name + "/expected")["logits"]
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max(), name
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
