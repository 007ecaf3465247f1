"""`prune-edit report`: one page of what a folder's files say, for folders of every kind."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from prune_edit import plots, verbs
from prune_edit.checkpoint.manifest import read_manifest
from prune_edit.cli import main
from prune_edit.errors import GateError, ModelError, OutputExistsError, OutputWriteError
from prune_edit.evaluation.comparison import Comparison, Evaluation
from prune_edit.loading import REFERENCE_MODEL
from prune_edit.planning import Plan
from prune_edit.report.measures import compared

RULES = """
[[rule]]
name = "a < b & c"
figure = "parameters"
max_ratio = 0.9
[[rule]]
name = "sums"
figure = "accuracy"
of = "arithmetic"
max_drop = 0.0001
"""


def plan_of_half() -> Plan:
    """Every other head; no neurons in the last layer."""
    heads = tuple(tuple(range(layer % 2, 16, 2)) for layer in range(8))
    neurons = (*(tuple(range(384)),) * 7, ())
    return Plan(heads, neurons, 16, 384, method="magnitude", task="arithmetic")


def figures() -> Comparison:
    """What `prune` writes, of figures that no other number on the page equals."""

    def side(accuracy: float, size: int) -> Evaluation:
        row = {"accuracy": accuracy - 0.01, "interval": [accuracy - 0.1, 1.0], "examples": 8}
        groups = {"add": row, "sub": row}
        return Evaluation(
            accuracy, (accuracy - 0.02, accuracy + 0.013), groups, {"facts": row}, 1.734, size,
            4 * size, 2 * size,
        )  # fmt: skip

    extra = {"random": {"accuracies": [0.1234], "recover": "mean"}, "environment": {"seed": 7}}
    return Comparison("arithmetic", side(0.9871, 1_789_056), side(0.6543, 1_234_567), extra)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ragged checkpoint with figures, and a verdict beside it."""
    home = tmp_path_factory.mktemp("made")
    folder = verbs.apply(REFERENCE_MODEL, plan_of_half(), home / "slim", recover="none")
    rules = home / "gate.toml"
    rules.write_text(RULES)
    verbs.gate(folder, rules, against=REFERENCE_MODEL, out=home / "verdict", limit=8)
    (folder / "evaluation.json").write_text(figures().to_json())
    (home / "other").mkdir()
    (home / "other" / "gate.json").write_text("{}")  # no verdict: passed over
    return home


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to write into, the verdict beside it."""
    for name in ("slim", "verdict", "other"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "slim"


class Page(HTMLParser):
    """Collects a page's text, and checks that it is whole and asks for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object", "a", "form")
        assert not any(name.startswith("on") or name == "href" for name in values)
        if "src" in values:
            assert re.match(r"data:image/(png|svg\+xml);base64,", values["src"] or "")
        if tag not in ("meta", "line", "rect", "circle", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "@import" not in text
    assert "url(" not in text
    return page


def test_the_page_has_the_files_numbers_and_the_card_links_it(folder: Path) -> None:
    found = verbs.report(folder)
    page = read(folder / "report.html")
    assert found["kind"] == "pruned"
    assert found["evaluation"] == json.loads((folder / "evaluation.json").read_text())
    for row in compared(found["evaluation"]):
        for cell in row:
            assert cell in page.text
    plan = found["plan"]
    assert (plan["kept_heads"], plan["of_heads"], plan["kept_neurons"]) == (64, 128, 7 * 384)
    assert [row["neurons"] for row in plan["layers"]] == [384] * 7 + [0]
    assert "64 of 128 heads and 2,688 of 3,072 neurons kept" in page.text
    assert f"{found['model']['parameters']:,} parameters" in page.text
    (gate,) = found["gates"]
    assert gate["folder"] == "verdict"
    assert "a < b & c" in page.text
    assert "evaluation.json is not in the manifest" in page.text  # put there by hand
    assert "(report.html)" in (folder / "README.md").read_text()
    assert not verbs.verify(folder)["checks"][0]["ok"]


def test_a_second_report_has_the_same_bytes_and_the_manifest_holds(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    verbs.report(folder)
    first = {name: (folder / name).read_bytes() for name in ("report.html", "README.md")}
    assert verbs.verify(folder, against=REFERENCE_MODEL)["ok"]
    again = verbs.report(folder)
    assert first == {name: (folder / name).read_bytes() for name in first}
    assert any("no evaluation.json: prune-edit eval" in note for note in again["notes"])
    assert "report.html" in read_manifest(folder)["files"]
    (folder / "README.md").write_text("another's")
    verbs.report(folder)
    assert not verbs.verify(folder)["checks"][0]["ok"]  # what was changed before is still told


def test_only_verdicts_on_these_weights_are_shown(folder: Path, tmp_path: Path) -> None:
    verdict = tmp_path / "verdict" / "gate.json"
    assert len(verbs.report(folder, gate=verdict.parent)["gates"]) == 1
    fields = json.loads(verdict.read_text())
    fields["model"]["digest"] = "0" * 64
    verdict.write_text(json.dumps(fields))
    assert verbs.report(folder)["gates"] == []
    with pytest.raises(GateError, match=r"judged slim .0{12}., not .*; run the gate again"):
        verbs.report(folder, gate=verdict)
    with pytest.raises(GateError, match=r"other.gate\.json is no gate\.json of this version"):
        verbs.report(folder, gate=tmp_path / "other")


def test_explanations_of_these_weights_are_named(folder: Path, tmp_path: Path) -> None:
    digest = verbs.report(folder)["model"]["digest"]
    about = {"model": "slim", "model_digest": digest}
    asked = {"prompt": "3+5=", "answer": "8", "probability": 0.4321}
    why = {"kind": "prompt", "about": about, "question": asked}
    (tmp_path / "why.json").write_text(json.dumps(why))
    other = {**why, "about": {**about, "model_digest": "1"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "list.json").write_text("[1]")
    (found,) = verbs.report(folder)["explanations"]
    assert found == {"file": "why.json", "kind": "prompt", "of": "3+5=", "answer": "8",
                     "probability": 0.4321}  # fmt: skip
    assert "0.4321" in read(folder / "report.html").text


@pytest.mark.parametrize("form", ["masked", "uniform"])
def test_every_format_has_a_page(form: str, tmp_path: Path) -> None:
    folder = verbs.apply(
        REFERENCE_MODEL, plan_of_half(), tmp_path / form, format=form, recover="none"
    )
    found = verbs.report(folder)
    assert found["provenance"]["format"] == form
    assert found["plan"]["kept_heads"] == 64
    assert "heads of 16" in read(folder / "report.html").text
    (folder / "plan.json").unlink()
    left = verbs.report(folder)
    # The configuration knows the units too where it is not a stock model's whole layout.
    assert left["kind"] in ("pruned", "model")


def test_a_model_from_elsewhere_has_what_is_known(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE_MODEL, tmp_path / "foreign")
    card = (tmp_path / "foreign" / "README.md").read_bytes()
    found = verbs.report(tmp_path / "foreign")
    assert found["kind"] == "model"
    assert found["model"]["parameters"] == 1_789_056
    assert (tmp_path / "foreign" / "README.md").read_bytes() == card
    page = read(tmp_path / "foreign" / "report.html")
    assert "nothing in the folder says that prune-edit wrote it" in page.text


def test_damaged_files_are_left_out_and_said(folder: Path) -> None:
    (folder / "evaluation.json").write_text('{"task": "x", "dense": 1}')
    (folder / "edit.json").write_text("[]")
    (folder / "plan.json").write_text("{")
    (folder / "nasty.svg").write_text("<svg onload='alert(1)'><script>alert(2)</script></svg>")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    found = verbs.report(folder)
    assert found["evaluation"] is found["edit"] is found["plan"] is None
    said = " ".join(found["notes"])
    for name in ("evaluation.json", "edit.json", "plan", "weights"):
        assert f"{name}: " in said
    read(folder / "report.html")  # an image cannot run a script
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        verbs.report(folder)
    with pytest.raises(ModelError, match="is no folder; a report is of a model's files"):
        verbs.report("owner/name")


def test_nothing_is_overwritten_and_a_signature_is_not_broken(folder: Path, tmp_path: Path) -> None:
    (folder / "report.html").write_text("mine")
    with pytest.raises(OutputExistsError, match="is no report; give another --out"):
        verbs.report(folder)
    (folder / "report.html").unlink()
    (folder / "model.sig").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputWriteError, match="is signed"):
        verbs.report(folder)
    with pytest.raises(OutputWriteError, match="is signed"):
        verbs.gate(folder, tmp_path / "none.toml", record=True)
    verbs.report(folder, tmp_path / "pages" / "page.html")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    read(tmp_path / "pages" / "page.html")


def test_recording_a_verdict_keeps_the_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "evaluation.json").unlink()
    rules = tmp_path / "gate.toml"
    rules.write_text(RULES.split('[[rule]]\nname = "sums"')[0])
    verbs.gate(folder, rules, against=REFERENCE_MODEL, record=True)
    assert "## Gate: passed" in (folder / "README.md").read_text()
    assert verbs.verify(folder)["ok"]


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["report", *words])


def test_the_command_prints_the_parts_or_the_json(folder: Path, tmp_path: Path) -> None:
    shown = run(str(folder))
    assert shown.exit_code == 0, shown.output
    assert "64 of 128 heads" in shown.output
    assert "written to" in shown.output
    found = json.loads(run(str(folder), "--json", "--out", str(tmp_path / "p.html")).output)
    assert found["plan"]["kept_heads"] == 64
    assert str(tmp_path) not in json.dumps({**found, "page": ""})
    failed = run(str(tmp_path / "nowhere"))
    assert failed.exit_code == 3
    assert failed.output.count("\n") == 1


def test_a_verdict_is_drawn_the_same_every_time(made: Path, tmp_path: Path) -> None:
    drawn = made / "verdict" / "gate.svg"
    found = json.loads((made / "verdict" / "gate.json").read_text())
    png, svg = plots.draw_gate(found, tmp_path)
    assert svg.read_bytes() == drawn.read_bytes()
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert plots.draw_gate({**found, "rules": []}, tmp_path / "nowhere") == []


def test_maps_and_curves_are_drawn_of_any_values(tmp_path: Path) -> None:
    grid = [[0.5, -1.0, math.nan], [0.0, 2.0, 1.0]]
    for name in ("one", "two"):
        plots.draw_heat_maps([("all", grid), ("a_b$", grid)], "nats", tmp_path, name)
        plots.draw_curves(
            {"top": [(1, 2.0), (10, 1.0)], "random": [(1, 3.0), (10, 3.0)]},
            ("neurons", "accuracy (%)"), tmp_path, f"{name}-lines", level=("whole", 4.0), log=True,
        )  # fmt: skip
    for kind in ("", "-lines"):
        first, second = (tmp_path / f"{name}{kind}.svg" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert first.with_suffix(".png").stat().st_size > 1000


def test_sweeps_of_the_same_base_are_shown(folder: Path, tmp_path: Path) -> None:
    base = verbs.report(folder)["provenance"]["base_digest"]
    own = Plan.load(folder / "plan.json")
    for name, digest in (("sweep", base), ("another", "0" * 64)):
        (tmp_path / name).mkdir()
        plan = replace(own, model_digest=digest)
        (tmp_path / name / "plan.json").write_text(plan.to_json())
        point = {"heads": 64, "neurons": 2688, "accuracy": 0.4567, "parameters": 1_300_000,
                 "plan": "plan.json"}  # fmt: skip
        fields = {"task": "arithmetic", "method": "cna", "recover": "mean", "points": [point]}
        (tmp_path / name / "frontier.json").write_text(json.dumps(fields))
    (found,) = verbs.report(folder)["frontiers"]
    assert found["folder"] == "sweep"
    assert found["points"][0]["accuracy"] == 0.4567
    assert "45.7%" in read(folder / "report.html").text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_on_a_phone(folder: Path, tmp_path: Path) -> None:
    verbs.report(folder)
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,844",
         "--dump-dom", f"file://{folder / 'report.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert "64 of 128 heads" in unescape(shown)
    assert "</html>" in shown
