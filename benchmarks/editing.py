"""Bias taken out and what it cost: `python benchmarks/editing.py [ROW ...]`.

Each row is one `prune-edit edit`: the search with its defaults, the paper's way, the plain ways, on
the reference model; pronouns after roles on `stories260K`. The last are `prune-edit prune --edit`:
the reference model edited and pruned to 25 % of its heads, beside the same pruning without the edit
(what the dense model says is retained alike), and beside the other order, pruned first and edited
then. ROW is a name or the start of one. Rows are kept in the JSON as they come, so that a killed
run goes on where it stopped.
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
from prune_edit.editing.concept import load_concept
from prune_edit.editing.said import said_task
from prune_edit.errors import PruneEditError
from prune_edit.evaluation.comparison import environment
from prune_edit.recover.settings import TuningSettings
from prune_edit.scoring import Options
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.composed import SHARE

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
COMMON: dict[str, Any] = {"keep_heads": "25%", "keep_neurons": "all", "speed": False}
PRUNED: dict[str, dict[str, Any]] = {
    "least squares": {**COMMON, "recover": "least-squares", "select": "one-shot"},
    "tuned in full, 600 steps": {**COMMON, "recover": "full", "tuning": TuningSettings(steps=600)},
}
MAIN = ("held-out prompts", "held-out prompts and answers")
TASKS = ("arithmetic", "factual-gender")


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


def edited(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    return verbs.edit(**settings, out=out)


def pruned(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """edit.json's content, with the sides of a pruned model that was not edited, or edited last."""
    verbs.prune(**settings, edit="gender", out=out)
    report: dict[str, Any] = json.loads((out / "edit.json").read_text())
    evaluation = json.loads((out / "evaluation.json").read_text())
    dense, concept = load_decoder(), load_concept("gender")
    retained = [(each, SHARE) for each in (factual_gender(), said_task(dense, concept, Options()))]
    plain = out.with_name("pruned")
    verbs.prune(**settings, retain=retained, out=plain)
    last = verbs.edit(plain, retain=["arithmetic"], out=out.with_name("last"))
    return {
        **report,
        "plan": evaluation["plan"],
        "not edited": last["before"],
        "edited last": last["after"],
    }


HEAD = [
    "| model | bias, held-out prompts | bias, held-out prompts and answers | arithmetic "
    "| factual gender | mass on plausible answers |",
    "|---|--:|--:|--:|--:|--:|",
]


def both_rows(recovery: str, report: dict[str, Any]) -> list[str]:
    """Dense, edited, pruned, and both in either order: what each still does."""
    lines = []
    usual = report["before"]["bias"]
    plan = report["plan"]
    kept = f"{plan['kept_heads']} of {plan['of_heads']} heads"
    for name, key in (
        ("dense", "before"),
        (f"edited, {len(report['units'])} units", "edited"),
        (f"pruned to {kept}, {recovery}", "not edited"),
        (f"pruned, {recovery}, then edited", "edited last"),
        (f"**edited, then pruned, {recovery}** (`prune --edit`)", "after"),
    ):
        side = report[key]
        found = []
        for view in MAIN:
            nats = side["bias"][view]["nats"]
            gone = 1 - abs(nats) / usual[view]["nats"]
            found.append(f"{nats:.3f}" + ("" if key == "before" else f", {-100 * gone:+.0f} %"))
        found += [f"{side['tasks'][task]['accuracy']:.1%}" for task in TASKS]
        found.append(f"{side['plausible_mass']:.1%}")
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    chance = [sum(report["random"][view]) / len(report["random"][view]) for view in MAIN]
    found = [
        f"{nats:.3f}, {-100 * (1 - nats / usual[view]['nats']):+.0f} %"
        for nats, view in zip(chance, MAIN, strict=True)
    ]
    lines.insert(2, f"| as many random units edited, mean of 20 | {' | '.join(found)} |  |  |  |")
    return lines


def run(make: Any, settings: dict[str, Any]) -> dict[str, Any]:
    start, worked = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = make(settings, Path(folder) / "edited")
        except PruneEditError as error:
            report = {"refused": str(error)}
    return {
        **report,
        "seconds": time.monotonic() - start,
        "processor_seconds": time.process_time() - worked,
        "commit": commit(),
    }


def save(reports: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = {"environment": environment(load_decoder(), 0), "reports": reports}
    (RESULTS / "editing.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "| edit | neurons | bias, held-out prompts | bias, held-out prompts and answers "
        "| 20 random choices | factual gender | other skills, points | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(cells(name, reports[name]) for name in ROWS if name in reports),
    ]
    (RESULTS / "editing.md").write_text("\n".join(lines) + "\n")
    both = [(name, reports[name]) for name in PRUNED if "after" in reports.get(name, {})]
    rows = [row for name, report in both for row in both_rows(name, report)]
    # The dense and the edited model are in every row.
    (RESULTS / "editing-pruned.md").write_text("\n".join([*HEAD, *dict.fromkeys(rows)]) + "\n")


def main() -> None:
    path = RESULTS / "editing.json"
    reports = json.loads(path.read_text())["reports"] if path.is_file() else {}
    todo = {name: (edited, settings) for name, settings in ROWS.items()}
    todo |= {name: (pruned, settings) for name, settings in PRUNED.items()}
    for name, (make, settings) in todo.items():
        asked = any(name.startswith(start) for start in sys.argv[1:])
        if (sys.argv[1:] and not asked) or (name in reports and not asked):
            continue
        if "model" in settings and not Path(settings["model"]).is_dir():
            continue
        reports[name] = run(make, settings)
        save(reports)
        print(name, reports[name].get("refused", "done"), flush=True)


if __name__ == "__main__":
    main()
