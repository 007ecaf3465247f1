"""The command line: flags, streams, exit codes, and the one line every error ends as."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import prune_edit
import prune_edit.verbs as real_verbs
from prune_edit import errors, textfile
from prune_edit.allocate import KV_RULES
from prune_edit.cli import COMMANDS, main, options, render
from prune_edit.costs import KINDS
from prune_edit.evaluation.comparison import Comparison, Evaluation
from prune_edit.planning import Plan
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.scoring import METHODS, Scores
from prune_edit.tasks import BUILT_IN, load_task

ROOT = Path(prune_edit.__file__).parent.parent
PLAN = Plan(((0, 2), ()), ((1,), (0, 3)), 4, 6, "cna", "toy", seed=3)
SIDE = Evaluation(
    accuracy=0.975,
    accuracy_interval=(0.95, 0.99),
    groups={
        "add": {"accuracy": 1.0, "interval": [0.9, 1.0], "examples": 20},
        "sub": {"accuracy": 0.95, "interval": [0.8, 1.0], "examples": 20},
    },
    retained={"facts": {"accuracy": 0.5, "interval": [0.4, 0.6], "examples": 80}},
    perplexity=3.5,
    parameters=1_000_000,
    bytes=4_000_000,
    flops_per_token=2_000_000,
    speed={
        "prompt_tokens": 32,
        "batch_1": {
            "prefill": {"tokens_per_second": 100.0, "seconds": 0.32},
            "decode": {"tokens_per_second": 10.0, "seconds": 0.1},
            "repeats": 5,
            "peak_memory_bytes": 5_000_000,
        },
    },
)
COMPARISON = Comparison("toy", SIDE, SIDE, {"plan": {"kept_heads": 2}})


def _bias(nats: float) -> dict[str, Any]:
    return {"nats": nats, "interval": [nats - 0.5, nats + 0.5]}


EDIT: dict[str, Any] = {
    "concept": "gender",
    "suppress": "scale",
    "units": [
        {
            "kind": "neuron", "name": "0_1", "factor": 0.0, "constant": 0.0, "score": 2.0,
            "promotes": [["nurse", 0.5]],
        }
    ],
    "of": {"neurons": 12, "heads": 8},
    "before": {
        "bias": {"training": _bias(1.5), "held-out prompts": _bias(1.25)},
        "tasks": {"factual-gender": {"accuracy": 1.0}, "facts": None},
        "perplexity": 3.0,
        "plausible_mass": 0.9,
    },
    "after": {
        "bias": {"training": _bias(0.5), "held-out prompts": _bias(-0.25)},
        "tasks": {"factual-gender": {"accuracy": 0.975}, "facts": None},
        "perplexity": 3.3,
        "plausible_mass": 0.8,
    },
    "tests": {
        name: {"reduction": 0.8, "absolute": 0.7, "p": 0.002}
        for name in ("training", "held-out prompts")
    },
    "random": {"training": [1.25, 1.75], "held-out prompts": [1.0, 2.0]},
    "generation": {"before": {"follows": 0.8}, "after": {"follows": 0.5}},
}  # fmt: skip


class Verbs(SimpleNamespace):
    """Stands in for `prune_edit.verbs`; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, Any] = {}
        self.raises: BaseException | None = None

    def _answer(self, arguments: dict[str, Any], value: Any) -> Any:
        self.called = arguments
        print("a library prints this")
        arguments["progress"]("working", 1, 2)
        if "note" in arguments:
            arguments["note"]("a note with [brackets]")
        if self.raises is not None:
            raise self.raises
        return value

    def prune(self, **rest: Any) -> Comparison:
        found: Comparison = self._answer(rest, COMPARISON)
        rest["out"].mkdir(exist_ok=True)
        (rest["out"] / "plan.json").write_text(PLAN.to_json())
        return found

    def score(self, **rest: Any) -> Scores:
        import torch

        found: Scores = self._answer(
            rest, Scores(torch.ones(2, 4), torch.ones(2, 6), {"method": rest["method"]})
        )
        return found

    def plan(self, scores: Scores, **rest: Any) -> Plan:
        found: Plan = self._answer({"scores": scores, **rest}, PLAN)
        return found

    def apply(self, model: str | None, plan: Plan, out: Path, **rest: Any) -> Path:
        found: Path = self._answer({"model": model, "plan": plan, "out": out, **rest}, out)
        return found

    def edit(self, **rest: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(rest, EDIT)
        return found

    def undo(self, edited: Path, out: Path, **rest: Any) -> dict[str, Any]:
        self.called = {"edited": edited, "out": out, **rest}
        return {"out": str(out), "restored": ["config.json", "model.safetensors"]}

    def evaluate(self, model: str, **rest: Any) -> Comparison | Evaluation:
        found: Comparison | Evaluation = self._answer(
            {"model": model, **rest}, COMPARISON if rest["against"] else SIDE
        )
        return found


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Verbs:
    fake = Verbs()
    monkeypatch.setitem(sys.modules, "prune_edit.verbs", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(prune_edit, "verbs", fake, raising=False)
    monkeypatch.delenv("PRUNE_EDIT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="prune-edit")


# Help


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from prune_edit.cli import main
for words in ([], *([name] for name in {COMMANDS!r})):
    try:
        main([*words, "--help"], prog_name="prune-edit")
    except SystemExit as end:
        assert end.code == 0, words
heavy = [name for name in ("torch", "transformers", "rich", "numpy") if name in sys.modules]
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: prune-edit {name}" in done.stdout


def test_the_tasks_command_needs_no_torch() -> None:
    done = python(
        "import sys\nfrom prune_edit.cli import main\nmain(['tasks'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr
    for name in BUILT_IN:
        assert name in done.stdout
    assert f"{len(load_task('facts').split('test')):,}" in done.stdout


def test_the_flags_of_the_contract_are_there() -> None:
    flags = {
        "prune": "--model --task --keep-heads --keep-neurons --max-drop --score --format --recover "
        "--retain --out --limit --seed --device --dtype --overwrite --json",
        "score": "--model --task --score --split --target --out",
        "edit": "--model --concept --neurons --scale --out --seed --json",
        "eval": "--against --task --speed --no-speed --out --json",
    }
    for command, names in flags.items():
        text = run(command, "--help").output
        for name in names.split():
            assert name in text, (command, name)


def test_choices_are_those_of_the_library() -> None:
    assert (options.COSTS, options.KV_RULES) == (KINDS, KV_RULES)
    assert tuple(METHODS) == options.METHODS


# What reaches the verbs


def test_prune_passes_every_flag(verbs: Verbs) -> None:
    done = run(
        "prune", "--model", "m", "--task", "facts", "--keep-heads", "5%", "--keep-neurons", "12",
        "--max-drop", "2", "--score", "random", "--format", "masked", "--recover", "lora",
        "--retain", "order", "--retain", "copying", "--out", "o", "--limit", "7", "--seed", "9",
        "--device", "cuda", "--dtype", "bfloat16", "--overwrite", "--no-speed", "--select",
        "one-shot", "--align", "8", "--kv", "keep-groups", "--random", "2",
        "--neuron-layers", "0,2-3", "--adapter", "tuned", "--edit", "gender", "--reduce", "50%",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    del verbs.called["progress"], verbs.called["note"]
    assert verbs.called == {
        "model": "m", "task": "facts", "keep_heads": "5%", "keep_neurons": "12", "max_drop": 2.0,
        "score": "random", "format": "masked", "recover": "lora", "retain": ("order", "copying"),
        "out": Path("o"), "limit": 7, "seed": 9, "device": "cuda", "dtype": "bfloat16",
        "overwrite": True, "speed": False, "target": "answer", "select": "one-shot",
        "keep_accuracy": None, "tuning": PLAIN, "budget": None, "budget_of": "parameters",
        "align": 8, "kv": "keep-groups", "whole_blocks": False, "serve": "", "random": 2,
        "neuron_layers": "0,2-3", "adapter": "tuned", "edit": "gender", "reduce": "50%",
    }  # fmt: skip


def test_tuning_is_one_value(verbs: Verbs) -> None:
    words = ("--steps", "9", "--patience", "2", "--loss", "distil", "--lora-layers", "0-1,3",
             "--lora-modules", "ffn")  # fmt: skip
    Path("plan.json").write_text(PLAN.to_json())
    for command in (("prune",), ("apply", "plan.json"), ("sweep",)):
        if command == ("sweep",):
            verbs.sweep = verbs.prune
        run(*command, *words)
        assert verbs.called["tuning"] == TuningSettings(9, 2, "distil", (0, 1, 3), "ffn")
        verbs.called = {}


def test_tasks_are_one_or_several(verbs: Verbs) -> None:
    for command in ("prune", "score"):
        run(command, "--task", "facts")
        assert verbs.called["task"] == "facts"
        run(command, "--task", "facts", "--task", "order", "--overwrite")
        assert verbs.called["task"] == ("facts", "order")
    assert run("eval", "m", "--task", "order", "--task", "facts", "--json").exit_code == 0
    assert verbs.called["task"] == ("order", "facts")
    assert run("plan", "scores").exit_code == 0
    assert verbs.called["task"] is None


def test_one_budget_reaches_the_verbs(verbs: Verbs) -> None:
    words = ("--budget", "20%", "--budget-of", "latency", "--whole-blocks")
    assert run("score", "--out", "s").exit_code == 0
    for command in (("prune",), ("plan", "s")):
        assert run(*command, *words).exit_code == 0
        got = {name: verbs.called[name] for name in ("budget", "budget_of", "whole_blocks")}
        assert got == {"budget": "20%", "budget_of": "latency", "whole_blocks": True}
        assert verbs.called["keep_heads"] in (None, "all") and verbs.called["keep_neurons"] is None


def test_defaults_are_those_of_the_contract(verbs: Verbs) -> None:
    assert run("prune").exit_code == 0
    expected = {
        "model": None, "task": "arithmetic", "keep_heads": None, "keep_neurons": None,
        "max_drop": 1.0, "score": "auto", "format": "ragged", "recover": "auto",
        "out": Path("pruned"), "overwrite": False, "speed": True, "seed": 0, "limit": None,
    }  # fmt: skip
    assert {name: verbs.called[name] for name in expected} == expected


def test_the_three_steps_go_through_files(verbs: Verbs) -> None:
    assert run("score", "--split", "all", "--target", "predicted", "--out", "s").exit_code == 0
    assert verbs.called["split"] == "all"
    assert verbs.called["target"] == "predicted"
    assert run("plan", "s", "--keep-heads", "50%", "--out", "p.json").exit_code == 0
    assert verbs.called["scores"].heads.shape == (2, 4)
    assert verbs.called["keep_heads"] == "50%"
    assert Plan.load("p.json") == PLAN
    assert run("apply", "p.json", "--model", "m", "--out", "d").exit_code == 0
    assert verbs.called["plan"] == PLAN
    assert (verbs.called["model"], verbs.called["out"]) == ("m", Path("d"))
    assert (verbs.called["recover"], verbs.called["format"]) == ("mean", "ragged")


def test_score_passes_every_flag(verbs: Verbs) -> None:
    done = run(
        "score", "--model", "m", "--task", "facts", "--score", "intervention", "--split", "test",
        "--target", "predicted", "--top-heads", "2", "--adapter", "a", "--contrast", "--norm",
        "true", "--ablation", "mean", "--measure", "accuracy", "--integrated-steps", "4",
        "--query-neurons", "5", "--neurons", "--top-neurons", "6", "--out", "o", "--limit", "7",
        "--seed", "9", "--device", "cuda", "--dtype", "bfloat16", "--batch-tokens", "64",
        "--device-map", "auto", "--max-memory", "1GiB", "--no-cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    del verbs.called["progress"], verbs.called["note"], verbs.called["shown"]
    assert verbs.called == {
        "model": "m", "task": "facts", "method": "intervention", "split": "test",
        "target": "predicted", "top_heads": 2, "adapter": "a", "contrast": True, "norm": "true",
        "ablation": "mean", "measure": "accuracy", "integrated_steps": 4, "query_neurons": 5,
        "neurons": True, "top_neurons": 6, "limit": 7, "seed": 9, "device": "cuda",
        "dtype": "bfloat16",
        "batch_tokens": 64, "device_map": "auto", "max_memory": "1GiB", "cache": False,
        "launched": True, "show": 0,
    }  # fmt: skip
    assert set(verbs.called) < set(inspect.signature(real_verbs.score).parameters)
    assert run("score", "--out", "p").exit_code == 0
    defaults = inspect.signature(real_verbs.score).parameters
    for name, value in verbs.called.items():
        if name not in ("cache", "launched", "progress", "note", "shown"):
            assert value == defaults[name].default, name


def test_neurons_that_were_left_out_are_said(verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    scores = Scores(torch.ones(2, 4), torch.full((2, 6), torch.nan), {})
    monkeypatch.setattr(verbs, "score", lambda **rest: scores, raising=False)
    said = run("score", "--score", "intervention").stdout
    assert "2 layers of 4 heads and no neurons by intervention" in said
    assert "--neurons scores them too" in said
    assert "--neurons" not in run("score", "--no-neurons", "--out", "o").stdout


def test_top_units_are_headed_by_their_unit(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "1^2", "score": 0.5, "coefficient": None, "tokens": [["a", 0.9]]}
    for unit in ("nats", "share"):
        render.top_units({"heads": [row], "neurons": []}, unit)
        shown = capsys.readouterr().out.splitlines()
        assert ["head", unit, "promotes"] in [line.split() for line in shown]


def test_edit_and_eval_pass_their_flags(verbs: Verbs) -> None:
    assert run("edit", "--neurons", "5", "--scale", "0.5", "--concept", "c.jsonl").exit_code == 0
    assert verbs.called["neurons"] == 5
    assert verbs.called["scale"] == 0.5
    assert verbs.called["concept"] == "c.jsonl"
    assert run("eval", "m", "--against", "d", "--task", "facts").exit_code == 0
    assert (verbs.called["model"], verbs.called["against"]) == ("m", "d")


# Streams


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("prune",), COMPARISON.to_dict()),
        (("eval", "m", "--against", "d"), COMPARISON.to_dict()),
        (("eval", "m", "--task", "toy"), {"task": "toy", **SIDE.to_dict()}),
        (("edit",), None),
        (("score",), None),
    ],
)
def test_json_is_all_that_standard_output_holds(
    verbs: Verbs, words: tuple[str, ...], expected: Any
) -> None:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert expected is None or found == json.loads(json.dumps(expected))
    assert "a library prints this" in done.stderr
    if words[0] in ("prune", "edit"):
        assert "a note with [brackets]" in done.stderr


def test_plan_json_is_the_file(verbs: Verbs) -> None:
    run("score", "--out", "s")
    done = run("plan", "s", "--json")
    assert done.stdout == PLAN.to_json() == Path("plan.json").read_text()


def test_tables_show_dense_pruned_and_change(verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("prune").stdout
    rows = {line.strip().split("  ")[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["accuracy"][1:] == ["97.5%", "97.5%", "+0.0", "points"]
    assert rows["accuracy: sub"][2:4] == ["95.0%", "95.0%"]
    assert rows["accuracy, retained: facts"][-3:] == ["50.0%", "+0.0", "points"]
    assert rows["parameters"][1:] == ["1M", "1M", "x1.00"]
    assert rows["decode ms a call, batch 1"][-3:] == ["100.00", "100.00", "x1.00"]
    assert "kept heads: 2 of 8" in text
    assert text.endswith("written to pruned\n")


def test_a_heat_map_never_hides_a_kept_head() -> None:
    assert render.heat_row((0, 2), 4) == "█ █ "
    assert render.heat_row((), 3) == "   "
    assert render.heat_row((127,), 128) == " " * 63 + "▒"
    assert render.heat_row((639,), 640) == " " * 63 + "░"
    assert len(render.heat_row(tuple(range(100)), 100)) == 50


def test_an_edit_is_shown_beside_random_choices(verbs: Verbs) -> None:
    text = run("edit").stdout
    rows = {line.strip().split("  ")[0]: line.split() for line in text.splitlines() if line.strip()}
    held_out = ["1.250", "(0.75-1.75)", "-0.250", "(-0.75-0.25)", "80%", "0.0020"]
    assert rows["held-out prompts"][2:] == [*held_out, "1.00", "to", "2.00"]
    assert rows["accuracy: factual-gender"][2:] == ["100.0%", "97.5%", "-2.5", "points"]
    assert rows["accuracy: facts"][2:] == ["-", "-", "-"]
    assert rows["perplexity of plain text"][-3:] == ["3.00", "3.30", "x1.10"]
    assert rows["mass on plausible answers"][-4:] == ["90.0%", "80.0%", "-10.0", "points"]
    assert rows["0_1"] == ["0_1", "0.00", "+0.00", "+2.0000", "'nurse'"]
    assert "1 of 12 neurons and 0 of 8 heads changed (scale); chance: 20 random" in text


def test_an_edit_is_taken_off(verbs: Verbs, tmp_path: Path) -> None:
    done = run("edit", "--undo", str(tmp_path / "e"), "--out", str(tmp_path / "o"))
    assert done.exit_code == 0
    assert verbs.called["edited"] == tmp_path / "e"
    assert done.stdout == f"restored to {tmp_path / 'o'}: config.json, model.safetensors\n"


def test_eval_writes_its_json(verbs: Verbs) -> None:
    assert run("eval", "m", "--against", "d", "--out", "e.json").exit_code == 0
    assert Comparison.from_json(Path("e.json").read_text()) == COMPARISON


# Bad input


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PruneEditError, 1),
        (errors.ModelError, 3),
        (errors.UnsupportedFamilyError, 4),
        (errors.UnsafeCheckpointError, 5),
        (errors.TaskError, 6),
        (errors.BudgetError, 7),
        (errors.OutputExistsError, 8),
        (errors.OutputWriteError, 9),
        (errors.VerificationError, 10),
        (errors.PlanError, 11),
    ],
)
def test_every_kind_of_error_is_one_line_and_has_its_code(
    verbs: Verbs, error: Callable[[str], Exception], code: int
) -> None:
    verbs.raises = error("what it is;\n  how to mend it")
    done = run("prune", "--json")
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: what it is; how to mend it"


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            KeyboardInterrupt(),
            130,
            "interrupted; no output was written, the same command goes on from here",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/model.safetensors"),
            9,
            "error: the output could not be written: No space left on device "
            "(x/model.safetensors); free some space or give another --out",
        ),
        (
            RuntimeError("shapes\ndiffer"),
            1,
            "error: unexpected RuntimeError: shapes differ; set PRUNE_EDIT_DEBUG=1 to see where, "
            "and please report it",
        ),
    ],
)
def test_other_ends_are_one_line_too(
    verbs: Verbs, raised: BaseException, code: int, text: str
) -> None:
    verbs.raises = raised
    done = run("prune")
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == text


def test_debugging_shows_the_error_itself(verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs.raises = errors.TaskError("x")
    monkeypatch.setenv("PRUNE_EDIT_DEBUG", "1")
    assert run("prune").exception is verbs.raises


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            "abc",
            "error: --keep-heads 'abc' is not a budget; give a share such as 5%, a count such as "
            "12, or all",
        ),
        ("0%", "error: --keep-heads 0%: a share must be above 0% and at most 100%"),
        ("150%", "error: --keep-heads 150%: a share must be above 0% and at most 100%"),
        ("0", "error: --keep-heads 0: at least one unit must stay"),
    ],
)
def test_a_bad_budget_fails_before_anything_runs(verbs: Verbs, budget: str, text: str) -> None:
    done = run("prune", "--keep-heads", budget)
    assert (done.exit_code, done.stderr) == (7, text + "\n")
    assert verbs.called == {}


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "--limit", "0"),
        ("prune", "--max-drop", "nan"),
        ("prune", "--align", "0"),
        ("prune", "--budget", "20%", "--budget-of", "joules"),
        ("plan", "s", "--kv", "pads"),
        ("prune", "--score", "cnaa"),
        ("prune", "--keep-head", "5%", "--unknown"),
        ("eval",),
        ("nothing",),
    ],
)
def test_misuse_is_clicks_code_2(verbs: Verbs, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert verbs.called == {}


def test_files_that_exist_are_kept_unless_told_otherwise(verbs: Verbs) -> None:
    Path("e.json").write_text("mine")
    done = run("eval", "m", "--out", "e.json")
    assert (done.exit_code, done.stderr) == (
        8,
        "error: e.json exists; give another --out, or --overwrite\n",
    )
    assert verbs.called == {}
    assert Path("e.json").read_text() == "mine"
    assert run("eval", "m", "--out", "e.json", "--overwrite").exit_code == 0
    assert json.loads(Path("e.json").read_text())["accuracy"] == SIDE.accuracy


def test_an_output_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: Path, *rest: Any, **more: Any) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(errors.OutputWriteError, match="No space left on device; give another"):
        textfile.write_text(tmp_path / "plan.json", "text")
    assert list(tmp_path.iterdir()) == []


def test_missing_files_are_named(verbs: Verbs) -> None:
    done = run("apply", "nowhere.json")
    assert done.exit_code == 11
    assert done.stderr.startswith("error: plan nowhere.json cannot be read: ")
    assert len(done.stderr.splitlines()) == 1
    assert run("plan", "nowhere").exit_code == 11


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_the_real_process(tmp_path: Path) -> None:
    code = f"""
import sys, time, types
fake = types.ModuleType("prune_edit.verbs")
def prune(**rest):
    print("running", file=sys.stderr, flush=True)
    time.sleep(60)
fake.prune = prune
import prune_edit
sys.modules["prune_edit.verbs"] = prune_edit.verbs = fake
from prune_edit.cli import main
main(["prune", "--out", {str(tmp_path / "out")!r}], prog_name="prune-edit")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A shell's background jobs ignore the signal, and what they start does, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr == "interrupted; no output was written, the same command goes on from here\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_folder_in_the_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prune_edit", "eval", str(tmp_path / "none"), "--no-speed"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: model folder ")


def test_the_real_verbs_take_what_the_commands_pass(verbs: Verbs) -> None:
    commands = {
        "prune": ("prune",),
        "score": ("score", "--out", "s"),
        "plan": ("plan", "s"),
        "apply": ("apply", "plan.json"),
        "evaluate": ("eval", "m"),
        "edit": ("edit",),
    }
    for name, words in commands.items():
        assert run(*words).exit_code == 0
        inspect.signature(getattr(real_verbs, name)).bind(**verbs.called)
