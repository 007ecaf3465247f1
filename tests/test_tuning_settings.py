"""What tuning may be told: its loss, its layers, its end; and the adapter that is kept."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_checkpoint import dense
from torch.nn import functional

from prune_edit import verbs
from prune_edit.checkpoint.write import build_model
from prune_edit.cli import main
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError, PlanError
from prune_edit.loading import load_decoder
from prune_edit.planning import parse_layers
from prune_edit.recover import tuning as tuning_module
from prune_edit.recover.adapters import Adapter, projections, weights_digest
from prune_edit.recover.gradual import Schedule
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.tuning import ADAPTER, KINDS, Tuning, tune
from prune_edit.recover.watch import Watch, Watching
from prune_edit.scoring import Options
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.workspace import Workspace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
OPTIONS = Options()
KEPT: dict[str, tuple[Any, Any]] = {
    "llama": (((), (1, 3), (0, 1, 2, 3), (2,)), ((0, 5, 11), (), tuple(range(12)), (7,))),
    "llama-gqa": (((0, 1, 2, 5), (), (3, 7)), ((1, 2), (3,), ())),  # layer 0 has pads
    "gpt2": (((), (0, 2, 3), (1,)), ((0, 40, 127), (), (5, 6))),
}
QUICK = Tuning(steps=8, batch=8, learning_rate=1e-2, rank=4, warmup=2)


def pico(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


def rows_of(count: int = 12, seed: int = 0) -> list[Encoded]:
    chance = random.Random(seed)
    lengths = [chance.randint(4, 9) for _ in range(count)]
    return [
        Encoded(tuple(chance.randrange(1, 40) for _ in range(n)), n - 2, Example(str(i), ""))
        for i, n in enumerate(lengths)
    ]


def pruned(name: str) -> tuple[Decoder, Decoder]:
    whole = pico(name)
    return whole, shrink(whole, *KEPT[name], rows_of(), OPTIONS)


def state(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return not changed(a, b)


# The loss


def log_probs(decoder: Decoder, rows: list[Encoded]) -> torch.Tensor:
    batch = collate(rows)
    with torch.no_grad():
        logits = decoder.model(**batch.inputs).logits[batch.rows, batch.columns]
    out: torch.Tensor = logits.float().log_softmax(-1)
    return out


def divergence(dense: Decoder, small: Decoder, rows: list[Encoded]) -> float:
    one, other = log_probs(dense, rows), log_probs(small, rows)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_loss_is_its_formula(name: str) -> None:
    """The gradient of a step is that of the loss written out, for each loss."""
    whole, small = pruned(name)
    rows = sorted(rows_of(6), key=lambda row: len(row.ids))
    teacher, batch = Teacher(whole), collate(rows)
    wanted = teacher.states(rows)
    places = batch.rows, batch.columns
    gradients = {}
    for loss in ("both", "cross-entropy", "distil"):
        for parameter in small.model.parameters():
            parameter.requires_grad_(True).grad = None
        tuning_module._accumulate(small, rows, replace(QUICK, loss=loss, parts=3), teacher)
        got = {n: p.grad.clone() for n, p in small.model.named_parameters() if p.grad is not None}
        for parameter in small.model.parameters():
            parameter.grad = None
        found = small.model(**batch.inputs, output_hidden_states=True)
        logits = found.logits[places].float()
        entropy = functional.cross_entropy(logits, batch.targets)
        final = small.final_states(**batch.inputs)
        kept = [found.hidden_states[i + 1] for i in teacher.layers[:-1]]
        # The last layer's result is the input of the final norm, which no hidden state shows.
        last: list[torch.Tensor] = []
        handle = small.layers[-1].register_forward_hook(
            lambda module, args, out, _to=last: _to.append(
                out[0] if isinstance(out, tuple) else out
            )
        )
        small.final_states(**batch.inputs)
        handle.remove()
        states = torch.stack([each[places] for each in (*kept, last[0], final)], 1)
        spread = wanted.var((0, 2)).clamp(min=1e-8)
        far = ((states - wanted).square().mean((0, 2)) / spread).sum() * QUICK.features
        target = log_probs(whole, rows)
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean()
        total = {"both": entropy + far, "cross-entropy": entropy, "distil": kl + far}[loss]
        total.backward()  # type: ignore[no-untyped-call]
        for key, parameter in small.model.named_parameters():
            if parameter.grad is not None and key in got:
                torch.testing.assert_close(got[key], parameter.grad, atol=2e-4, rtol=2e-3)
        gradients[loss] = got
    assert not torch.allclose(
        *(torch.cat([g.flatten() for g in gradients[k].values()]) for k in ("both", "distil"))
    )


def test_distillation_reads_no_labels_and_comes_nearer() -> None:
    whole, small = pruned("llama")
    rows = rows_of()
    # Another last token is another label, and no input.
    other = [replace(row, ids=(*row.ids[:-1], row.ids[-1] % 39 + 1)) for row in rows]
    how = replace(QUICK, loss="distil", steps=30)
    tuned = [tune(small, each, how, OPTIONS, Teacher(whole)) for each in (rows, other)]
    assert same(state(tuned[0]), state(tuned[1]))
    labelled = [
        tune(small, each, replace(how, loss="both"), OPTIONS, Teacher(whole))
        for each in (rows, other)
    ]
    assert not same(state(labelled[0]), state(labelled[1]))
    assert divergence(whole, tuned[0], rows) < 0.7 * divergence(whole, small, rows)
    with pytest.raises(PlanError, match="needs the dense model"):
        tune(small, rows, how, OPTIONS)


def test_cross_entropy_alone_does_not_know_the_dense_model() -> None:
    whole, small = pruned("gpt2")
    how = replace(QUICK, loss="cross-entropy")
    led, alone = (tune(small, rows_of(), how, OPTIONS, each) for each in (Teacher(whole), None))
    assert same(state(led), state(alone))


# LoRA's layers


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("modules", ["all", "attention", "ffn"])
@pytest.mark.parametrize("layers", [None, (0,), (0, 2)])
def test_lora_touches_the_layers_it_is_given_and_no_others(
    name: str, modules: str, layers: tuple[int, ...] | None
) -> None:
    _, small = pruned(name)
    targets = projections(small, layers, modules)
    how = replace(QUICK, kind="lora", layers=layers, modules=modules, steps=4)
    if not targets:
        with pytest.raises(PlanError, match="is left to put LoRA on; give other --lora-layers"):
            tune(small, rows_of(), how, OPTIONS)
        return
    before = state(small)
    found = changed(before, state(tune(small, rows_of(), how, OPTIONS)))
    assert found == {f"{target}.weight" for target in targets}
    family = small.family
    for target in targets:
        layer, _, path = target.removeprefix(f"{family.layers}.").partition(".")
        assert layers is None or int(layer) in layers
        attention = path in (family.queries, family.keys, family.values, family.attention_output)
        assert modules == "all" or (modules == "attention") == attention


@pytest.mark.parametrize(
    ("text", "layers"),
    [("9", (9,)), ("0-3,7", (0, 1, 2, 3, 7)), (" 2 , 1-1,2", (1, 2)), ("4-4", (4,))],
)
def test_layers_are_read(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, "--lora-layers") == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "1.5", "0-"])
def test_what_is_no_list_of_layers_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"names no layers|goes down"):
        parse_layers(text, "--lora-layers")
    arguments = [
        "prune",
        "--recover",
        "lora",
        f"--lora-layers={text}",
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == BudgetError.exit_code
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "recover", "text"),
    [
        ({"lora_layers": (1,)}, "full", "--lora-layers means nothing to --recover full; give"),
        ({"lora_modules": "ffn"}, "auto", "--lora-modules means nothing to --recover auto"),
        ({"steps": 3}, "mean", "--steps means nothing to --recover mean; give --recover auto or"),
        ({"patience": 3}, "none", "--patience means nothing to --recover none"),
        ({"loss": "distil"}, "least-squares", "--loss means nothing to --recover least-squares"),
        ({"loss": "kl"}, "full", "--loss 'kl' is unknown; give both, cross-entropy, distil"),
        ({"lora_modules": "mlp"}, "lora", "--lora-modules 'mlp' is unknown"),
        ({"steps": 0}, "full", "give at least 1 step"),
        ({"patience": -1}, "full", "a patience from 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], recover: str, text: str, tmp_path: Path
) -> None:
    tuning = TuningSettings(**settings)
    runs: tuple[Callable[..., Any], ...] = (verbs.prune, verbs.sweep)
    for verb in runs:
        with pytest.raises(PlanError, match=re.escape(text)):
            verb("no model", recover=recover, tuning=tuning, out=tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_settings_change_what_they_say_and_nothing_else() -> None:
    usual = Schedule.of("lora")
    assert PLAIN.of(usual) is usual
    found = TuningSettings(9, 3, "distil", (1, 2), "ffn").of(usual)
    own = {"loss": "distil", "layers": (1, 2), "modules": "ffn"}
    assert found.final_tuning == replace(usual.final_tuning, steps=9, patience=3, **own)
    assert found.round_tuning == replace(usual.round_tuning, **own)
    assert found.neuron_tuning == replace(usual.neuron_tuning, **own)
    assert usual.final_tuning.watched and not usual.round_tuning.watched


# The end


class Scripted:
    """Stands in for the measuring: accuracies in turn."""

    def __init__(self, *values: float) -> None:
        self.values, self.seen = list(values), 0

    def __call__(self, *arguments: Any) -> Any:
        self.seen += 1
        return type("Found", (), {"value": self.values[self.seen - 1]})()


def watched(
    monkeypatch: pytest.MonkeyPatch,
    values: tuple[float, ...],
    enough: float | None = None,
    patience: int = 0,
) -> tuple[list[int], Decoder, dict[int, dict[str, torch.Tensor]]]:
    """The steps that were done, the result, and the weights at each of them."""
    _, small = pruned("gpt2")
    monkeypatch.setattr(Watching, "due", lambda self, done: done % 2 == 0 or done == self.steps)
    monkeypatch.setattr("prune_edit.recover.watch.measure_accuracy", Scripted(*values))
    how = replace(QUICK, watched=True, patience=patience, steps=2 * len(values))
    steps: list[int] = []
    weights: dict[int, dict[str, torch.Tensor]] = {}
    kept = tuning_module._Run._check

    def spy(self: Any, done: int) -> bool:
        weights[done] = {name: value.detach().clone() for name, value in self.parameters.items()}
        return kept(self, done)

    monkeypatch.setattr(tuning_module._Run, "_check", spy)
    options = Options(progress=lambda what, done, total: steps.append(done))
    found = tune(small, rows_of(), how, options, watch=Watch(rows_of(), enough))
    return steps, found, weights


@pytest.mark.parametrize(
    ("values", "enough", "patience", "last", "best"),
    [
        ((0.1, 0.5, 0.3, 0.4), None, 0, 8, 4),  # the best are kept, and all steps done
        ((0.1, 0.5, 0.5, 0.4), None, 0, 8, 6),  # of equals the later
        ((0.1, 0.5, 0.6, 0.9), 0.6, 0, 6, 6),  # as good as the dense model
        ((0.1, 0.5, 0.3, 0.4, 0.9), None, 2, 8, 4),  # two checks that bring nothing
        ((0.1, 0.5, 0.3, 0.6, 0.5), None, 2, 10, 8),  # a gain starts the count again
    ],
)
def test_the_best_weights_stay_and_tuning_ends_where_nothing_is_to_gain(
    values: tuple[float, ...],
    enough: float | None,
    patience: int,
    last: int,
    best: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, found, weights = watched(monkeypatch, values, enough, patience)
    assert steps == list(range(1, last + 1))
    state_ = state(found)
    assert all(torch.equal(value, state_[name]) for name, value in weights[best].items())
    if best != last:
        assert not all(torch.equal(value, state_[name]) for name, value in weights[last].items())


def test_tuning_ends_early_only_where_the_rest_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first check and its rest, a second that is not asked about the rest, a third and its."""
    scripted = Scripted(0.7, 0.5, 0.4, 0.6, 0.6)
    monkeypatch.setattr("prune_edit.recover.watch.measure_accuracy", scripted)
    decoder = pico("gpt2")
    watching = Watching(Watch(rows_of(), 0.6, rows_of()), 100, 0)
    ended = [watching.check(decoder, {}, OPTIONS) for _ in range(3)]
    assert ended == [False, False, True]
    assert scripted.seen == 5


def test_checks_are_few_and_end_with_the_last_step() -> None:
    for steps, want in ((700, 20), (500, 20), (100, 4), (60, 3), (25, 1), (10, 0)):
        watching = Watching(Watch(rows_of()), steps, 0)
        done = []
        for step in range(1, steps + 1):
            if watching.due(step):
                done.append(step)
                watching.best = {"some": torch.zeros(1)}
        assert len(done) == want
        assert not done or done[-1] == steps


def test_a_tuning_that_is_not_watched_runs_as_ever() -> None:
    _, small = pruned("gpt2")
    plain = tune(small, rows_of(), QUICK, OPTIONS)
    assert same(state(tune(small, rows_of(), QUICK, OPTIONS, watch=Watch(rows_of()))), state(plain))


def test_progress_tells_the_validation_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_edit.recover.watch._BETWEEN", 3)
    seen: list[str] = []
    options = Options(progress=lambda what, done, total: seen.append(what))
    _, small = pruned("gpt2")
    tune(small, rows_of(), replace(QUICK, watched=True), options, watch=Watch(rows_of()))
    assert seen[:2] == ["tuning", "tuning"]
    assert all(re.fullmatch(r"tuning, validation \d+\.\d%", each) for each in seen[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [4, 6, 7])
def test_a_watched_tuning_goes_on_where_it_was_killed(
    kind: str, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best came before the kill, and is found again after it."""
    monkeypatch.setattr(tuning_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Watching, "due", lambda self, done: done % 2 == 0)
    whole, small = pruned("llama-gqa")
    how = replace(QUICK, kind=kind, watched=True, patience=2, steps=12)
    teacher, work, watch = Teacher(whole), Workspace(tmp_path), Watch(rows_of())

    def script(*values: float) -> None:
        monkeypatch.setattr("prune_edit.recover.watch.measure_accuracy", Scripted(*values))

    accuracies = (0.2, 0.4, 0.3, 0.1, 0.9, 0.9)
    script(*accuracies)
    plain = tune(small, rows_of(), how, OPTIONS, teacher, watch=watch)

    def stop(what: str, done: int, total: int) -> None:
        if done == cut:
            raise KeyboardInterrupt

    script(*accuracies)
    with pytest.raises(KeyboardInterrupt):
        tune(small, rows_of(), how, Options(progress=stop), teacher, keeper=work, stage="t",
             watch=watch)  # fmt: skip
    steps: list[int] = []
    options = Options(progress=lambda what, done, total: steps.append(done))
    script(*accuracies[(cut - 1) // 2 :])
    again = tune(small, rows_of(), how, options, teacher, keeper=work, stage="t", watch=watch)
    assert steps == list(range(cut, 9)), "ended by patience, as without the break"
    assert same(state(again), state(plain))
    assert not same(state(again), state(small))


# The adapter


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_the_merged_model_less_the_adapter_is_the_base(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    _, small = pruned(name)
    work = Workspace(tmp_path / "work")
    tuned = tune(
        small, rows_of(), replace(QUICK, kind="lora"), OPTIONS, keeper=work, stage="round-1"
    )
    found = work.find_tensors(ADAPTER, "merged", weights_digest(tuned.model.state_dict()))
    assert found is not None
    assert work.find_tensors(ADAPTER, "merged", weights_digest(small.model.state_dict())) is None
    tensors, about = found
    assert about["base"] == weights_digest(small.model.state_dict())
    folder = tmp_path / "adapter"
    Adapter(tensors, about["config"], about["base"]).write(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert about["base"] in (folder / "README.md").read_text()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(projections(small))
    assert str(tmp_path) not in json.dumps(config)

    def copy_of(decoder: Decoder) -> Any:
        return build_model(decoder.model.config.to_dict(), decoder.model.state_dict())

    # Onto the base: the tuned model.
    merged = PeftModel.from_pretrained(copy_of(small), str(folder)).merge_and_unload()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, state(tuned)[key], atol=1e-6, rtol=0)
    # Off the tuned model: the base.
    model: Any = PeftModel.from_pretrained(copy_of(tuned), str(folder))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= -1
    back = model.merge_and_unload().state_dict()
    assert changed(state(tuned), state(small))
    for key, value in state(small).items():
        torch.testing.assert_close(back[key], value, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def mathgpt(request: pytest.FixtureRequest) -> str:
    shared: Path = request.getfixturevalue("shared")
    return str(shared / "models" / "mathgpt-4l4h")


BRIEF = Schedule(round_tuning=Tuning(steps=1, batch=8), final_tuning=Tuning(steps=2, batch=8))


def test_prune_keeps_the_adapter_beside_the_weights(
    mathgpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "task": "arithmetic/padded", "keep_heads": "50%", "keep_neurons": "all",
        "recover": "lora", "limit": 16, "speed": False, "schedule": BRIEF,
    }  # fmt: skip
    tuning = TuningSettings(lora_layers=(0, 1), loss="distil")
    found = verbs.prune(mathgpt, out=tmp_path / "a", tuning=tuning, **settings)
    verbs.prune(mathgpt, out=tmp_path / "b", tuning=tuning, **settings)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "a" / "adapter").iterdir()) == names
    for name in ("model.safetensors", "README.md", *(f"adapter/{each}" for each in names)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    said = found.extra["plan"]
    readme = (tmp_path / "a" / "adapter" / "README.md").read_text()
    assert said["adapter"] == "adapter" and said["adapter_base_digest"] in readme
    assert "## Adapter" in (tmp_path / "a" / "README.md").read_text()
    # What its README tells to do gives the model whose digest it names, but for rounding.
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path / "a" / "adapter")
    place: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), place)
    base, merged = place["base"].state_dict(), load_decoder(tmp_path / "a").model.state_dict()
    off = {name for name in merged if not torch.allclose(merged[name], base[name], atol=1e-7)}
    assert off and all(re.search(r"\.h\.[01]\.", name) for name in off)
    os.chdir(tmp_path)
    notes: list[str] = []
    verbs.prune(
        mathgpt, out=tmp_path / "m", format="masked", note=notes.append,
        **{**settings, "recover": "lora"},
    )  # fmt: skip
    assert not (tmp_path / "m" / "adapter").exists()
    assert any("no adapter is kept: it has the shapes of --format ragged" in n for n in notes)


def test_prune_stops_where_it_is_as_good_as_the_dense_model(mathgpt: str, tmp_path: Path) -> None:
    labels: list[tuple[str, int]] = []
    final = Tuning(steps=200, batch=8, learning_rate=1e-5, watched=True)
    verbs.prune(
        mathgpt, task="arithmetic/padded", keep_heads=15, keep_neurons="all", recover="full",
        select="one-shot", limit=16, speed=False, out=tmp_path / "p",
        schedule=replace(BRIEF, final_tuning=final), tuning=TuningSettings(steps=100),
        progress=lambda what, done, total: labels.append((what, done)),
    )  # fmt: skip
    steps = [done for what, done in labels if what.startswith("tuning")]
    assert max(steps) == 25, "the first check, of a hundred steps"
    assert [w for w, done in labels if done == 25 and w.startswith("tuning, validation")]


def test_layers_that_the_model_does_not_have_are_refused(mathgpt: str, tmp_path: Path) -> None:
    for verb in ("prune", "sweep"):
        done = CliRunner().invoke(
            main,
            [verb, "--model", mathgpt, "--task", "arithmetic/padded", "--recover", "lora",
             "--lora-layers", "9", "--out", str(tmp_path / "o")],
        )  # fmt: skip
        assert done.exit_code == 11
        assert "--lora-layers 9: the model has layers 0 to 3" in done.stderr
        assert not list(tmp_path.iterdir())


def test_no_hook_stays_behind() -> None:
    whole, small = pruned("llama-gqa")
    how = replace(QUICK, kind="lora", watched=True, loss="distil")
    tuned = tune(small, rows_of(), how, OPTIONS, Teacher(whole), watch=Watch(rows_of()))
    for module in tuned.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
