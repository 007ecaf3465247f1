"""`benchmarks/paper/`: every table has its command, its published numbers, and a fair judge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "paper"
SCRIPT = BENCHMARKS / "paper" / "paper.py"


@pytest.fixture(scope="module")
def paper() -> Iterator[ModuleType]:
    """The script as a module; what it brought along is forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), str(BENCHMARKS), *sys.path])
        before = set(sys.modules)
        yield import_module("paper")
        for name in set(sys.modules) - before:
            where = getattr(sys.modules[name], "__file__", None) or ""
            if where.startswith(str(BENCHMARKS)):
                del sys.modules[name]


def found_of(paper: ModuleType, table: str, **rows: dict[str, float]) -> Any:
    published = import_module("published").PUBLISHED[table].rows
    return import_module("found").Found(table, "a title", {**published, **rows})


def test_every_table_the_issue_names_has_a_command_and_numbers(paper: ModuleType) -> None:
    named = {"1", "2", "3", "5", "6", "8", "9", "10", "11", "13", "18", "19", "20", "21",
             "24", "25", "26", "27", "figure-1", "figure-2"}  # fmt: skip
    assert named <= set(paper.TABLES)
    published = import_module("published").PUBLISHED
    assert set(published) == set(paper.TABLES)
    rows = published["24"].rows
    assert list(rows) == ["1D+", "2D+", "3D+"]
    assert rows["1D+"]["17^22"] == 47.6
    case = published["section-4.2"].rows["probability of 8"]
    assert (case["ori"], case["17^22"]) == (0.3776, 0.0616)


@pytest.mark.parametrize("table", ["1", "4", "section-4.2", "5", "8", "13", "24", "figure-1"])
def test_the_papers_own_numbers_agree_and_others_do_not(paper: ModuleType, table: str) -> None:
    same = found_of(paper, table)
    verdict = same.verdict("huggyllama/llama-7b")
    assert verdict
    assert all(each["ok"] for each in verdict)
    assert same.verdict("prune-edit/reference-model") is None
    assert same.verdict("EleutherAI/gpt-j-6b") is None  # not its table
    row, cells = next(iter(same.rows.items()))
    column = next(iter(cells))
    wrong = found_of(paper, table, **{row: {k: v for k, v in cells.items() if k != column}})
    bad = [each for each in wrong.verdict("huggyllama/llama-7b") if not each["ok"]]
    assert [(each["row"], each["column"]) for each in bad] == [(row, column)]
    value = cells[column]
    if value is not None:
        near = import_module("published").PUBLISHED[table].tolerance(row)
        off = found_of(paper, table, **{row: {**cells, column: value + 1.01 * near}})
        assert sum(not each["ok"] for each in off.verdict("huggyllama/llama-7b")) == 1
        assert f"{row}, {column}: " in off.markdown("huggyllama/llama-7b")


def test_gptj_is_judged_by_its_own_tables(paper: ModuleType) -> None:
    found = found_of(paper, "18")
    assert all(each["ok"] for each in found.verdict("EleutherAI/gpt-j-6b"))
    assert found.verdict("huggyllama/llama-7b") is None
    assert "*GPT-J*" in found.markdown("x")


def test_a_command_measures_prints_and_writes(tmp_path: Path) -> None:
    tables = ("section-4.2", "4", "27", "3")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *tables, "--cases", "2", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "| Llama-7B, the paper | ori | 17^22 |" in done.stdout
    found = json.loads((tmp_path / "section-4.2.json").read_text())
    ((name, cells),) = found["rows"].items()
    assert name == "probability of 8"
    assert cells["ori"] > 0.9
    assert all(value < cells["ori"] for key, value in cells.items() if key != "ori")
    assert found["judged"] is None
    assert found["environment"]["seed"] == 0
    neurons = json.loads((tmp_path / "table-4.json").read_text())["rows"]
    for name, change in neurons["change"].items():
        parts = [neurons[row][name] for row in ("importance", "importance without the head")]
        assert change == pytest.approx(parts[0] - parts[1], abs=2e-4)
    page = (tmp_path / "README.md").read_text()
    assert page.index("### Table 3") < page.index("### Section 4.2") < page.index("### Table 27")


def test_a_model_that_cannot_add_gets_one_line(shared: Path) -> None:
    model = shared / "models" / "stories260K"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "6", "--cases", "2", "--model", str(model)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("Table 6: ")]
    assert said[0].startswith("Table 6: stories260K answers none of ")
    assert "Traceback" not in done.stderr


def test_the_committed_page_is_of_the_committed_figures(paper: ModuleType) -> None:
    assert (RESULTS / "README.md").read_text() == paper.page(RESULTS)
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["model"] == "prune-edit/reference-model"
        assert found["table"] in paper.TABLES
