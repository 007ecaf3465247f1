"""The gate: rules, what they are held against, the verdict, and the two models of the example."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from prune_edit import plots, verbs
from prune_edit.cli import main
from prune_edit.editing.bias import measure_bias
from prune_edit.editing.concept import load_concept
from prune_edit.errors import GateError, OutputExistsError
from prune_edit.evaluation.perplexity import measure_perplexity, plain_texts
from prune_edit.gating.bench import Bench
from prune_edit.gating.measure import measure
from prune_edit.gating.measured import Measured, Outcome, Quantity, exact, of_times
from prune_edit.gating.provenance import check_base
from prune_edit.gating.rules import load_rules, parse_rules
from prune_edit.gating.verdict import Judged, Verdict, check_bound, judge, worst_examples
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.report.card import with_section
from prune_edit.scoring import Options

ROOT = Path(__file__).parents[1]


def rules(*entries: dict[str, Any]) -> Any:
    return parse_rules({"rule": list(entries)}).rules


# Rules


def test_the_example_rules_are_read() -> None:
    found = load_rules(ROOT / "examples" / "gate.toml")
    assert found.limit == 512
    by_name = {rule.name: rule for rule in found.rules}
    sums = by_name["still does arithmetic"]
    assert sums.bounds == {"min": 0.9, "max_drop": 0.04}
    assert by_name["still knows who is she and who is he"].of == "factual-gender"
    assert by_name["fits the device"].bounds == {"max": 7.2e6}
    assert by_name["little bias in all"].level == "warn"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"figure": "acuracy", "of": "facts", "min": 0.5}, "'acuracy'; did you mean 'accuracy'?"),
        ({"figure": "accuracy", "of": "facts", "minn": 0.5}, "'minn'; did you mean 'min'?"),
        ({"figure": "accuracy", "of": "facts", "min": 0.5, "level": "bloc"}, "mean 'block'?"),
        ({"figure": "accuracy", "of": "facts"}, "no bound; give one of min, max"),
        ({"of": "facts", "min": 1}, "names no figure"),
        ({"figure": "accuracy", "min": 0.5}, "accuracy is of a task; give of"),
        ({"figure": "bytes", "of": "x", "max": 5}, "the model's own; leave out of"),
        ({"figure": "accuracy", "of": "facts", "min": 95}, '95 is no share.*write "95%"'),
        ({"figure": "accuracy", "of": "facts", "max_drop": 2}, 'write "2 points"'),
        ({"figure": "accuracy", "of": "facts", "max_drop": -0.1}, "below 0"),
        ({"figure": "accuracy", "of": "facts", "max_distance": 0.1}, "no ideal value"),
        ({"figure": "bias", "of": "gender", "max": "5%"}, "figure is in nats"),
        ({"figure": "bias", "of": "gender", "max": "much"}, "'much' is no number"),
        ({"figure": "bias", "of": "gender", "max": float("nan")}, "no finite size"),
        ({"figure": "bias", "of": "gender", "min_reduction": 2}, "no share; give one"),
        ({"figure": "bytes", "max": "4XB"}, "unit 'XB' is unknown"),
        ({"figure": "bytes", "group": "a", "max": 4}, "has no groups"),
        ({"figure": "preference", "min": 0.5}, 'it is a data set\'s: give of = "winobias:PATH"'),
        ({"figure": "icatt", "of": "stereoset:x", "min": 0.5}, "did you mean 'icat'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_said(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(GateError, match=f"^rules rule 1.*{said}"):
        rules(entry)


def test_files_and_tables_that_make_no_sense_are_said(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="unknown key 'rules'; did you mean 'rule'"):
        parse_rules({"rules": []})
    with pytest.raises(GateError, match="has no rules"):
        parse_rules({})
    with pytest.raises(GateError, match="'sed'; did you mean 'seed'"):
        parse_rules({"gate": {"sed": 1}, "rule": []})
    with pytest.raises(GateError, match="limit must be a whole number of at least 1"):
        parse_rules({"gate": {"limit": 0}, "rule": []})
    with pytest.raises(GateError, match="cannot be read"):
        load_rules(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(GateError, match="are not TOML"):
        load_rules(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("figure", "one", "other"),
    [
        ({"figure": "bytes"}, {"min": "5MB"}, {"max": "4MB"}),
        ({"figure": "perplexity"}, {"min_ratio": 1.2}, {"max_ratio": 1.1}),
        ({"figure": "bias", "of": "gender"}, {"max_distance": 0.2}, {"min": 0.5}),
    ],
)
def test_rules_that_contradict_are_refused(
    figure: dict[str, str], one: dict[str, Any], other: dict[str, Any]
) -> None:
    with pytest.raises(
        GateError, match=r"no model can meet both .* of rule 'b' and .* of rule 'a'"
    ):
        rules({**figure, **one, "name": "a"}, {**figure, **other, "name": "b", "level": "warn"})
    rules({**figure, **one, "name": "a"}, {"figure": "parameters", "max": 1e9, "name": "b"})
    with pytest.raises(GateError, match="two rules are named 'a'"):
        rules({**figure, **one, "name": "a"}, {"figure": "parameters", "max": 9, "name": "a"})


# Bounds


@pytest.mark.parametrize(
    ("bound", "limit", "interval", "worst", "margin"),
    [
        ("min", 0.9, (0.88, 0.96), 0.88, -0.02),
        ("max", 1.0, (0.7, 0.9), 0.9, 0.1),
        ("max_drop", 0.02, (-0.05, 0.01), -0.05, -0.03),
        ("max_rise", 0.1, (-0.1, 0.2), 0.2, -0.1),
        ("min_ratio", 0.9, (0.95, 1.2), 0.95, 0.05),
        ("max_ratio", 1.05, (1.0, 1.2), 1.2, -0.15),
        ("max_distance", 0.5, (-0.7, 0.3), -0.7, -0.2),
        ("min_reduction", 0.5, (0.4, 0.8), 0.4, -0.1),
    ],
)
def test_a_bound_is_held_against_the_worst_side(
    bound: str, limit: float, interval: tuple[float, float], worst: float, margin: float
) -> None:
    middle = sum(interval) / 2
    found = check_bound(bound, limit, Quantity(middle, interval), 0.0)
    assert found.worst == worst
    assert found.margin == pytest.approx(margin)
    assert found.met == (margin >= 0)
    exact_one = check_bound(bound, limit, Quantity.exact(middle), 0.0)
    assert exact_one.met == found.inside
    assert check_bound("max", 0.5, Quantity.exact(0.5), None).met  # the limit itself is allowed


def test_the_worst_examples_are_those_that_fell_most() -> None:
    outcomes = tuple(
        Outcome(text, "", model, base)
        for text, model, base in (("a", 1, 1), ("b", 0, 1), ("c", 1, 0), ("d", 0, 0))
    )
    fell = Measured(Quantity.exact(0.5), Quantity.exact(0.5), outcomes=outcomes)
    drop = check_bound("max_drop", 0.0, Quantity(0.0, (-0.5, 0.5)), None)
    assert [each.text for each in worst_examples(fell, drop, None)] == ["b"]
    least = check_bound("min", 0.9, Quantity.exact(0.5), None)
    assert [each.text for each in worst_examples(fell, least, None)] == ["b", "d"]


def judged(level: str, met: bool | None) -> Judged:
    (rule,) = rules({"figure": "bytes", "max": 5, "level": level, "name": f"{level} {met}"})
    if met is None:
        return Judged(rule, error="no")
    check = check_bound("max", 5, Quantity.exact(4 if met else 6), None)
    return Judged(rule, exact(1, None), (check,))


@pytest.mark.parametrize(
    ("states", "verdict", "code"),
    [
        ([("block", True), ("warn", False), ("info", False), ("info", None)], "passed", 0),
        ([("block", False), ("block", True)], "blocked", 1),
        ([("block", None), ("block", True)], "unmeasured", 2),
        ([("warn", None)], "unmeasured", 2),
        ([("block", False), ("block", None)], "blocked", 1),
    ],
)
def test_levels_decide_the_exit_code(
    states: list[tuple[str, bool | None]], verdict: str, code: int
) -> None:
    found = Verdict({}, None, tuple(judged(level, met) for level, met in states), "r.toml")
    assert (found.verdict, found.exit_code) == (verdict, code)


# Measuring


def bench(*sources: Any, limit: int | None = 64) -> Bench:
    return Bench(tuple(map(load_decoder, sources)), Options(), limit)


def test_figures_are_those_of_the_rooms_that_measure_them(tmp_path: Path) -> None:
    texts = plain_texts()[:6]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    found = bench(REFERENCE_MODEL, REFERENCE_MODEL)
    wanted = rules(
        {"figure": "bias", "of": "gender", "max_rise": 0.1},
        {"figure": "perplexity", "of": str(tmp_path / "texts.txt"), "max_ratio": 1.01},
        {"figure": "accuracy", "of": "arithmetic/mul", "max_drop": "5 points"},
        {"figure": "accuracy", "of": "factual-gender", "group": "woman", "min": 0.5},
        {"figure": "parameters", "max_ratio": 1},
        {"figure": "flops", "max_ratio": 1},
    )
    bias, perplexity, accuracy, grouped, parameters, flops = (
        measure(found, rule) for rule in wanted
    )
    held_out = measure_bias(found.model, load_concept("gender").held_out, Options())
    assert bias.model.value == pytest.approx(held_out.value, abs=1e-6)
    assert perplexity.model.value == pytest.approx(measure_perplexity(found.model, texts), rel=1e-9)
    low, high = perplexity.model.interval
    assert low < perplexity.model.value < high
    # A model beside itself: no change. Shares stay in doubt, as few examples are.
    for same in (bias, perplexity):
        assert same.change is not None
        assert same.change.interval == (0.0, 0.0)
        assert same.ratio is not None
        assert same.ratio.value == 1.0
    assert accuracy.change is not None
    assert accuracy.change.value == 0.0
    assert accuracy.change.interval[0] < -0.01
    assert accuracy.examples == 64
    assert 0 < grouped.examples < 64
    assert parameters.ratio == flops.ratio == Quantity.exact(1.0)
    assert all(each.status == "passed" for each in judge(wanted[:2], found))


def test_what_cannot_be_measured_is_said_and_the_rest_is_measured(
    tmp_path: Path, shared: Path
) -> None:
    one = {"prompt": "3+5=", "answer": "8"}
    path = tmp_path / "hard.jsonl"
    rows = [{**one, "prompt": f"{a}+1=", "answer": str(a + 3), "group": "g"} for a in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text("\n".join(json.dumps({**one, "prompt": f"{a}+2=", "answer": str(a + 2)})
                                for a in range(3)))  # fmt: skip
    (tmp_path / "words.txt").write_text("A zyx wrote.\nQwerty.\n")
    found = judge(
        rules(
            {"figure": "accuracy", "of": str(path), "max_drop": 0.1},
            {"figure": "accuracy", "of": str(path), "group": "h", "min": 0.1},
            {"figure": "accuracy", "of": str(lonely), "min": 0.1},
            {"figure": "accuracy", "of": "nothing", "min": 0.1},
            {"figure": "perplexity", "of": str(tmp_path / "words.txt"), "max": 5},
            {"figure": "decode", "of": "batch x", "min": 5},
            {"figure": "preference", "of": f"winobias:{shared / 'data' / 'winobias'}", "min": 0.1},
            {"figure": "bytes", "max": "1GB"},
        ),
        bench(REFERENCE_MODEL, REFERENCE_MODEL),
    )
    said = [each.error for each in found]
    assert said[0].startswith(f"the base cannot do {path}: 0.0% right")
    assert said[1].endswith("there is no such group; known are g")
    assert "one example says nothing of a group" in said[2]
    assert said[3].startswith("unknown task 'nothing'")
    assert said[4].startswith("perplexity: the tokenizer cannot write the texts")
    assert "of = 'batch x' is no batch size" in said[5]
    assert said[6].startswith("winobias: the model's vocabulary can write none of its")
    assert said[7] == ""
    assert found[0].measured is not None  # what was measured is kept


def test_speed_is_the_ratio_of_times_taken_in_turns() -> None:
    slow, fast = [0.2, 0.22, 0.18, 0.2, 0.3], [0.1, 0.11, 0.09, 0.1, 0.15]
    found = of_times([fast, slow], 32, 0)
    assert found.model.value == pytest.approx(320)
    assert found.ratio is not None
    # Both slowed down together, so the ratio is sure.
    assert found.ratio.value == pytest.approx(2.0)
    assert found.ratio.interval == (pytest.approx(2.0), pytest.approx(2.0))


# Bases


def test_a_base_that_is_another_model_is_refused(mathgpt: Any) -> None:
    reference = load_decoder()
    with pytest.raises(GateError, match=r"is another model than .*: a gpt2, not a llama"):
        check_base(reference, mathgpt)
    assert "gpt2" in check_base(reference, mathgpt, other_base=True)[0]
    assert check_base(reference, reference) == ["MODEL and its base are the same model"]


def fake(digest: str, block: dict[str, str] | None, name: str) -> Any:
    reference = load_decoder()
    config = SimpleNamespace(**({"prune_edit": block} if block else {}))
    shape = {"head_shape": (1, 2), "neuron_shape": (1, 3), "unembedding": reference.unembedding}
    return SimpleNamespace(
        model=SimpleNamespace(config=config), digest=digest, source=name,
        family=reference.family, tokenizer=reference.tokenizer, **shape,
    )  # fmt: skip


def test_bases_are_known_by_the_digest_in_the_configuration() -> None:
    made = fake("new", {"base_model": "dense", "base_digest": "abc"}, "release")
    assert check_base(made, fake("abc", None, "dense")) == []
    with pytest.raises(GateError, match=r"release was made from dense \(abc\), not from other"):
        check_base(made, fake("xyz", None, "other"))
    sister = fake("xyz", {"base_digest": "abc"}, "last release")
    assert check_base(made, sister) == ["release and last release were both made from abc"]
    (said,) = check_base(fake("new", None, "release"), fake("abc", None, "dense"))
    assert said.startswith("nothing in release says what it was made from")


# The command


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, run once: one model that passes, one that is blocked."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gate_demo.py", str(folder)])
        runpy.run_path(str(ROOT / "examples" / "gate_demo.py"), run_name="__main__")
    return folder


def gate(*words: str) -> Any:
    return CliRunner().invoke(main, ["gate", *words], prog_name="prune-edit")


def write_rules(folder: Path, text: str) -> str:
    path = folder / "quick.toml"
    path.write_text(text)
    return str(path)


QUICK = """
[gate]
limit = 64
[[rule]]
name = "sums"
figure = "accuracy"
of = "arithmetic/add"
max_drop = "20 points"
"""


def test_the_example_has_a_model_that_passes_and_one_that_is_blocked(demo: Path) -> None:
    passed, blocked = (
        json.loads((demo / f"{name}-gate" / "gate.json").read_text())
        for name in ("passes", "blocked")
    )
    assert (passed["verdict"], passed["exit_code"]) == ("passed", 0)
    assert (blocked["verdict"], blocked["exit_code"]) == ("blocked", 1)
    assert passed["model"]["made_from_digest"] == passed["base"]["digest"]
    failed = [rule for rule in blocked["rules"] if rule["status"] == "failed"]
    sums = next(rule for rule in failed if rule["name"] == "still does arithmetic")
    assert len(sums["worst"]) == 10
    assert all(each["model"] == 0.0 for each in sums["worst"])
    for name in ("passes", "blocked"):
        names = {path.name for path in (demo / f"{name}-gate").iterdir()}
        drawn = {"gate.png", "gate.svg"} if plots.available() else set()
        reports = {"gate.json", "gate.xml", "gate.md", "gate.sarif", "gate.html"}
        assert names == reports | drawn


def test_exit_codes_and_explanations_of_the_command(demo: Path, tmp_path: Path) -> None:
    quick = write_rules(tmp_path, QUICK)
    base = ("--against", str(REFERENCE_MODEL), "--rules", quick)
    good = gate(str(demo / "passes"), *base)
    assert good.exit_code == 0, good.output
    assert good.stdout.rstrip().endswith("against prune-edit/reference-model: passed")
    bad = gate(str(demo / "blocked"), *base, "--explain", "--out", str(tmp_path / "out"))
    assert bad.exit_code == 1
    assert "blocked: accuracy of arithmetic/add: -" in bad.stdout
    assert "wanted a fall of at most 20.0 points; the worst side, -" in bad.stdout
    assert "  right -> wrong  " in bad.stdout
    written = json.loads((tmp_path / "out" / "gate.json").read_text())
    again = gate(str(demo / "blocked"), *base, "--json")
    assert (again.exit_code, json.loads(again.stdout)["rules"]) == (1, written["rules"])
    # What keeps it from a verdict is 2, whatever it is; nothing is written.
    for words in (
        (str(tmp_path / "none"), *base),
        (str(demo / "passes"), "--rules", quick),
        (str(demo / "passes"), "--rules", str(tmp_path / "none.toml")),
        (str(demo / "passes"), *base, "--out", str(tmp_path / "out")),
        (str(demo / "passes"), *base, "--record", "--device", "nonsense"),
    ):
        done = gate(*words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    assert json.loads((tmp_path / "out" / "gate.json").read_text()) == written
    unknown = write_rules(tmp_path, QUICK.replace("arithmetic/add", "nowhere.jsonl"))
    done = gate(str(demo / "passes"), *base[:3], unknown)
    assert done.exit_code == 2
    assert "unmeasured: task file nowhere.jsonl cannot be read" in done.stdout


def test_unexpected_errors_are_no_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*words: Any, **settings: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.delenv("PRUNE_EDIT_DEBUG", raising=False)
    monkeypatch.setattr(verbs, "gate", broken)
    done = gate("m", "--rules", "r.toml")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: unexpected ZeroDivisionError: by zero; set PRUNE_EDIT")


def test_a_folder_of_other_things_is_not_replaced(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    path = write_rules(tmp_path, QUICK)
    with pytest.raises(OutputExistsError):
        verbs.gate(demo / "passes", path, against=REFERENCE_MODEL, out=tmp_path / "mine",
                   overwrite=True)  # fmt: skip
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_verdict_goes_into_the_model_card_once(demo: Path, tmp_path: Path) -> None:
    before = (demo / "passes" / "config.json").read_text()
    wanted = parse_rules({"rule": [{"figure": "parameters", "max_ratio": 1.0}]})
    for _ in range(2):
        verdict = verbs.gate(demo / "passes", wanted, against=REFERENCE_MODEL, record=True)
    card = (demo / "passes" / "README.md").read_text()
    assert card.count("## Gate: passed") == 1
    assert "does not mean that a bias is gone" in card
    assert "unbiased" not in card
    assert (demo / "passes" / "config.json").read_text() == before
    blocked = replace(verdict, rules=(judged("block", False),))
    other = with_section(card, blocked.to_dict())
    assert other.count("## Gate") == 1
    assert "## Gate: blocked" in other


# CI


@pytest.mark.parametrize("name", ["github-actions", "gitlab-ci", "pre-commit-config"])
def test_the_ci_files_are_yaml_that_call_the_command(name: str) -> None:
    text = (ROOT / "examples" / "ci" / f"{name}.yml").read_text() if "pre" not in name else (
        ROOT / "examples" / "ci" / f"{name}.yaml"
    ).read_text()  # fmt: skip
    content = yaml.safe_load(text)
    (line,) = [
        line for line in text.splitlines() if "prune-edit gate " in line and "name" not in line
    ]
    words = line[line.index("prune-edit gate ") :].split()[2:]
    known = {option for option in words if option.startswith("--")}
    shown = gate("--help").output
    assert known <= set(shown.split())
    if name == "github-actions":
        assert [step.get("name") for step in content["jobs"]["gate"]["steps"]][-1] == "Reports"
    elif name == "gitlab-ci":
        assert content["gate"]["artifacts"]["reports"]["junit"] == "gate/gate.xml"
    else:
        (hook,) = content["repos"][0]["hooks"]
        assert hook["stages"] == ["pre-push"]
