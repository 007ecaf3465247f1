"""The README says what is so: help pages, tables and examples. UPDATE_README=1 rewrites it."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prune_edit.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def block(kind: str, name: str) -> re.Pattern[str]:
    start, end = re.escape(f"<!-- {kind}: {name} -->"), re.escape(f"<!-- /{kind} -->")
    return re.compile(f"({start}\n)(.*?)({end})", re.DOTALL)


def check(kind: str, name: str, wanted: str) -> None:
    text = README.read_text(encoding="utf-8")
    found = block(kind, name).search(text)
    assert found is not None, f"README.md has no block <!-- {kind}: {name} -->"
    if os.environ.get("UPDATE_README"):
        replaced = block(kind, name).sub(lambda m: m[1] + wanted + m[3], text)
        README.write_text(replaced, encoding="utf-8")
    else:
        assert found[2] == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_help_pages_are_the_programs(command: str) -> None:
    shown = CliRunner().invoke(
        main, [command, "--help"], prog_name="prune-edit", terminal_width=100
    )
    assert shown.exit_code == 0
    check("help", command, f"```text\n{shown.output.rstrip()}\n```\n")


def test_the_headline_is_what_the_command_printed() -> None:
    printed = (ROOT / "benchmarks" / "results" / "headline.txt").read_text(encoding="utf-8")
    assert printed.startswith("$ prune-edit prune --task arithmetic --keep-heads 5%\n")
    assert printed[2:].splitlines()[0] in README.read_text(encoding="utf-8")
    check("text", "headline", f"```text\n{printed.rstrip()}\n```\n")


@pytest.mark.parametrize(
    "name",
    [
        "quality-few-heads",
        "quality-untuned",
        "quality-selections",
        "quality-smallest-mathgpt-4l4h",
        "quality-smallest-reference",
        "quality-paper-recipe",
        "recovery-reference",
        "recovery-mathgpt",
        "editing",
        "editing-pruned",
        "explain",
        "datasets",
        "scoring-heads",
        "scoring-neurons",
        "checkpoint-stream",
        "speed",
    ],
)
def test_tables_are_the_benchmarks(name: str) -> None:
    table = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    check("table", name, table)


def test_the_python_block_and_the_example_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert 0.0 <= float(capsys.readouterr().out) <= 1.0
    monkeypatch.setattr(sys, "argv", ["prune_for_arithmetic.py", str(tmp_path / "sums")])
    runpy.run_path(str(ROOT / "examples" / "prune_for_arithmetic.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "keeping 64 heads" in shown
    assert shown.rstrip().splitlines()[-1].endswith("27+48=75")
