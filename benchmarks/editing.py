"""Bias taken out and what it cost: `python benchmarks/editing.py [ROW ...]`.

Each row is one `prune-edit edit`: the search with its defaults, the paper's way, the plain ways, on
the reference model; pronouns after roles on `stories260K`; and the search on a pruned model. Rows
are kept in the JSON as they come, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recovery import RESULTS, commit

from prune_edit import load_decoder, verbs
from prune_edit.errors import PruneEditError
from prune_edit.evaluation.comparison import environment

SHARED = Path(os.environ.get("PRUNE_EDIT_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K"
PAPER = {"guard_weight": 0.0, "protect": "0%"}
ROWS: dict[str, dict[str, Any]] = {
    "reference, search (default)": {},
    "reference, 18 zeroed (the paper's way)": {"neurons": 18, "scale": 0.0, **PAPER},
    "reference, 50 at their mean": {"neurons": 50, "suppress": "mean", **PAPER},
    "stories260K, pronouns after roles, search": {
        "model": STORIES,
        "concept": "gender-pronouns",
        "uneven": "drop",
        "reduce": "50%",
        "neurons": 40,
    },
}
MAIN = ("held-out prompts", "held-out prompts and answers")


def cells(name: str, report: dict[str, Any]) -> str:
    if "refused" in report:
        return f"| {name} | refused: {report['refused']} |  |  |  |  |  |  |"
    before, after = report["before"], report["after"]
    kinds = [row["kind"] for row in report["units"]]
    found = [f"{kinds.count('neuron')} of {report['of']['neurons']:,}"]
    for view in MAIN:
        then, now = before["bias"][view], after["bias"][view]
        low, high = now["interval"]
        test = report["tests"][view]
        found.append(
            f"{then['nats']:.3f} -> {now['nats']:.3f} ({low:.2f} to {high:.2f}), "
            f"{-100 * test['reduction']:+.0f} %"
        )
    chance = report["random"][MAIN[0]]
    usual = before["bias"][MAIN[0]]["nats"]
    found.append(f"{-100 * (1 - sum(chance) / len(chance) / usual):+.1f} %")
    tasks = {
        task: 100 * (after["tasks"][task]["accuracy"] - row["accuracy"])
        for task, row in before["tasks"].items()
        if row
    }
    factual = tasks.pop("factual-gender", None)
    found.append("" if factual is None else f"{factual:+.1f}")
    worst = min(tasks, key=lambda task: tasks[task], default=None)
    found.append(
        "" if worst is None
        else f"{sum(tasks.values()) / len(tasks):+.1f} (worst: {worst} {tasks[worst]:+.1f})"
    )  # fmt: skip
    found.append(f"{100 * (after['perplexity'] / before['perplexity'] - 1):+.1f} %")
    return f"| {name} | " + " | ".join(found) + " |"


def main() -> None:
    path = RESULTS / "editing.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    reports = result.get("reports") if isinstance(result.get("reports"), dict) else {}
    assert isinstance(reports, dict)
    for name, settings in ROWS.items():
        if (name in reports and name not in sys.argv[1:]) or (
            "model" in settings and not Path(settings["model"]).is_dir()
        ):
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = verbs.edit(**settings, out=Path(folder) / "edited")
            except PruneEditError as error:
                report = {"refused": str(error)}
        reports[name] = {**report, "seconds": time.monotonic() - start, "commit": commit()}
        result = {"environment": environment(load_decoder(), 0), "reports": reports}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(cells(name, reports[name]), flush=True)
        lines = [
            "| edit | neurons | bias, held-out prompts | bias, held-out prompts and answers "
            "| 20 random choices | factual gender | other skills, points | perplexity |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
            *(cells(name, reports[name]) for name in ROWS if name in reports),
        ]
        (RESULTS / "editing.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
