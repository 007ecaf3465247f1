"""The notebook in `examples/` runs from top to bottom, and its values show themselves."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "explore.ipynb"


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def run(source: str, names: dict[str, Any]) -> Any:
    """A cell's statements, and the value of its last expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_every_cell_runs_and_shows_what_it_found() -> None:
    names: dict[str, Any] = {}
    shown = [run(source, names) for source in cells("code")]
    assert names["question"].answer == "8"
    assert names["without_head"].probability < names["question"].probability
    pages = [each._repr_html_() for each in shown if hasattr(each, "_repr_html_")]
    assert len(pages) == 4
    assert all(page.startswith("<") and "<script" not in page for page in pages)
    assert f"head {names['layer']}^{names['head']}" in shown[3]
    assert "64 of 128 heads kept" in shown[-2]
    assert names["small"].parameters_count() < names["decoder"].parameters_count()


def test_it_is_kept_without_outputs() -> None:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert cells("markdown")[0].startswith("# ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_kernel_runs_it() -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'prune-edit[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'prune-edit[notebook]'")
    pytest.importorskip("ipykernel", reason="pip install 'prune-edit[notebook]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 4
