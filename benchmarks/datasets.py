"""The data sets' published figures of two small models: `python benchmarks/datasets.py`.

Measured by `prune-edit gate` with rules that only report, from the files in ../shared/data (or
PRUNE_EDIT_SHARED), of stories260K and, where its vocabulary has the words, of the reference model.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from recovery import RESULTS, commit

from prune_edit import load_decoder, verbs
from prune_edit.evaluation.comparison import environment
from prune_edit.gating.rules import parse_rules
from prune_edit.loading import REFERENCE_MODEL
from prune_edit.report.words import side

SHARED = Path(os.environ.get("PRUNE_EDIT_SHARED", Path(__file__).parents[2] / "shared"))
FIGURES = tomllib.loads("""
winobias = ["accuracy", "accuracy-pro", "accuracy-anti", "gap", "preference", "bias"]
winogender = ["correlation", "gap", "preference", "bias"]
debiaswe = ["correlation", "factual", "gap"]
blimp = ["accuracy"]
""")


def measure(model: Path) -> list[dict[str, Any]]:
    rules = [
        {"name": f"{data} {figure}", "figure": figure, "of": f"{data}:{SHARED / 'data' / data}",
         "level": "info"}
        for data, figures in FIGURES.items()
        for figure in figures
    ]  # fmt: skip
    found = verbs.gate(model, parse_rules({"rule": rules})).to_dict()["rules"]
    return [
        {key: rule[key] for key in ("name", "unit", "ideal", "model", "examples", "error")}
        | {"skipped": [note for note in rule["notes"] if "vocabulary" in note]}
        for rule in found
    ]


def main() -> None:
    models = {
        "stories260K": SHARED / "models" / "stories260K", "reference model": REFERENCE_MODEL
    }  # fmt: skip
    tables = {name: measure(path) for name, path in models.items()}
    lines = [
        "| figure | without bias | stories260K | texts | reference model | texts |",
        "|---|---|---|---|---|---|",
    ]
    for one, other in zip(*tables.values(), strict=True):
        ideal = "-" if one["ideal"] is None else f"{one['ideal']:g}"
        cells = [one["name"], ideal]
        for rule in (one, other):
            cells += ["-" if rule["error"] else side(rule, "model"), str(rule["examples"] or "-")]
        lines.append("| " + " | ".join(cells) + " |")
    result = {
        "environment": {**environment(load_decoder(), 0), "commit": commit()}, "figures": tables
    }  # fmt: skip
    text = json.dumps(result, indent=1).replace(str(SHARED), "../shared")
    (RESULTS / "datasets.json").write_text(text + "\n")
    (RESULTS / "datasets.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
