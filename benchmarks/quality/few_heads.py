"""5 % of the heads, tuned for minutes: `python benchmarks/quality/few_heads.py [--neurons 10%]`.

The reference model's 128 heads go down to 6, all neurons stay or so many, as `prune-edit prune`
does it. Beside it, with the same steps, data and loss: random heads (gradually,
too), and a fresh model of the pruned shape, which has nothing but the shape; and that fresh model
without the dense one to follow. Accuracy on 1,024 test examples no model saw, in training, scoring
or tuning. Rows are kept in the JSON as they come; a killed run goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recovery import RESULTS, commit, encoded

from prune_edit.checkpoint.write import build_model
from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, keep_top
from prune_edit.recover.gradual import Rounds, Schedule, gradual
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.tuning import Tuning, tune
from prune_edit.scoring import Options
from prune_edit.selection.gates import learn_gates
from prune_edit.workspace import Workspace

HEADS, STEPS = 6, 2400
ROWS = (
    ("chosen", "cna", 0),
    ("chosen, neurons by both sides", "circuit", 0),
    ("chosen, then neurons by gates", "gates", 0),
    ("fresh model, same loss", "fresh", 0),
    ("random units", "random", 0),
    ("fresh model, cross-entropy alone", "plain", 0),
    ("random units", "random", 1),
    ("random units", "random", 2),
)


def fresh(like: Decoder, seed: int) -> Decoder:
    """A model of the same shape as initialised before training."""
    config = like.model.config
    torch.manual_seed(seed)
    made = type(like.model)(config)
    state = {name: value.detach().clone() for name, value in made.state_dict().items()}
    return like.with_model(build_model(config.to_dict(), state))


def run(
    kind: str,
    seed: int,
    steps: int,
    dense: Decoder,
    train: Any,
    chosen: Decoder | None,
    neurons: int | None,
) -> Decoder:
    options = Options(seed=seed)
    teacher = Teacher(dense)
    tuning = Tuning(steps=steps)
    if kind in ("cna", "circuit", "random"):
        schedule = replace(Schedule.of("full"), final_tuning=tuning)
        rounds = Rounds(dense, train, kind, options, schedule, Workspace(), teacher=teacher)
        return gradual(rounds, HEADS, neurons)
    if kind == "gates":
        assert neurons is not None
        return by_gates(dense, train, tuning, neurons, options, teacher)
    assert chosen is not None
    start = fresh(chosen, seed)
    if kind == "plain":
        return tune(start, train, replace(tuning, features=0.0), options)
    return tune(start, train, tuning, options, teacher)


def by_gates(
    dense: Decoder, train: Any, tuning: Tuning, neurons: int, options: Options, teacher: Teacher
) -> Decoder:
    """Heads first, tuned for a quarter of the steps; then neurons by gates, tuned for the rest."""
    first = replace(tuning, steps=tuning.steps // 4)
    schedule = replace(Schedule.of("full"), final_tuning=first)
    rounds = Rounds(dense, train, "cna", options, schedule, Workspace(), teacher=teacher)
    whole = gradual(rounds, HEADS)
    scored = train[: schedule.scoring_examples]
    odds = learn_gates(whole, train, scored, None, neurons, options)[1]
    small = shrink(whole, whole.layout.heads, keep_top(odds, neurons), scored, options)
    return tune(small, train, replace(tuning, steps=tuning.steps - first.steps), options, teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--neurons", default="all", help="that stay: all, 10%%, ...")
    parser.add_argument("--kinds", nargs="+", default=sorted({kind for _, kind, _ in ROWS}))
    parser.add_argument("--seeds", type=int, default=3, help="of random heads")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-few-heads.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dense = load_decoder()
    train, test = encoded(dense, "arithmetic", "train", None), encoded(
        dense, "arithmetic", "test", 1024
    )  # fmt: skip
    found: dict[str, Any] = {"rows": []}
    if given.out.exists():
        found = json.loads(given.out.read_text())
    accuracy = measure_accuracy(dense, test, Options())
    found |= {
        "heads": HEADS,
        "of": sum(map(len, dense.layout.heads)),
        "dense": {"accuracy": accuracy.value, "interval": accuracy.interval},
    }
    done = {(row["kind"], row["seed"], row["steps"], row["neurons"]) for row in found["rows"]}
    total = sum(map(len, dense.layout.neurons))
    neurons = Budget.parse(given.neurons, "--neurons").of(total, "--neurons")
    chosen_path = given.out.with_suffix(".work")
    stage = f"chosen-{neurons}"
    for name, kind, seed in ROWS:
        if kind not in given.kinds or seed >= given.seeds:
            continue
        if kind == "gates" and neurons == total:  # nothing for them to choose
            continue
        if (kind, seed, given.steps, neurons) in done:
            continue
        chosen = Workspace(chosen_path).load_model(stage, dense)
        few = None if neurons == total else neurons
        started = time.perf_counter()
        small = run(kind, seed, given.steps, dense, train, chosen, few)
        seconds = time.perf_counter() - started
        if kind in ("cna", "circuit"):
            Workspace(chosen_path).save_model(stage, small)
        accuracy = measure_accuracy(small, test, Options())
        row = {
            "name": name,
            "kind": kind,
            "seed": seed,
            "steps": given.steps,
            "neurons": neurons,
            "accuracy": accuracy.value,
            "interval": accuracy.interval,
            "relative": accuracy.value / found["dense"]["accuracy"],
            "heads": [len(units) for units in small.layout.heads],
            "neurons_by_layer": [len(units) for units in small.layout.neurons],
            "parameters": count_parameters(small),
            "seconds": round(seconds, 1),
            "threads": given.threads,
            "environment": {**environment(dense, seed), "commit": commit()},
        }
        # Read again: rows may come from several runs at once.
        if given.out.exists():
            found["rows"] = json.loads(given.out.read_text())["rows"]
        found["rows"].append(row)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print({key: row[key] for key in ("name", "seed", "accuracy", "seconds")}, flush=True)
    text = table(found)
    given.out.with_suffix(".md").write_text(text + "\n")
    print(text)


def table(found: dict[str, Any]) -> str:
    """The Markdown table."""
    lines = [
        "| 6 of 128 heads | neurons | steps | accuracy | of dense | parameters |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(found["rows"], key=lambda row: (-row["neurons"], -row["accuracy"])):
        low, high = row["interval"]
        name = row["name"] + (f", seed {row['seed']}" if row["kind"] == "random" else "")
        lines.append(
            f"| {name} | {row['neurons']:,} | {row['steps']:,} | "
            f"{row['accuracy']:.1%} ({low:.1%}-{high:.1%}) | {row['relative']:.1%} | "
            f"{row['parameters'] / 1e6:.2f} M |"
        )
    low, high = found["dense"]["interval"]
    lines.append(
        f"| dense model, {found['of']} heads | 3,072 | | {found['dense']['accuracy']:.1%} "
        f"({low:.1%}-{high:.1%}) | | 1.79 M |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
