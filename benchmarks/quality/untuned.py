"""What stays of a task without tuning: `python benchmarks/quality/untuned.py`.

The bundled model at 5 and 25 % of its heads, and at 25 % of heads and neurons, after least squares
alone: no gradient reaches a weight. Every selection has the same recovery and the same examples,
evenly over the operations: greedy (heads backward, neurons by gates), gradual, gates, one step by
five scores, and random choice by five seeds. Mean compensation alone stands beside it. `--examples
32768 --selections greedy` adds what all train examples give, in their own shares. Rows are kept in
the JSON as they come, and `--out` may differ between runs that `--merge` brings together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recovery import RESULTS, commit, encoded

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.layout import Kept
from prune_edit.loading import load_decoder
from prune_edit.planning import keep_neurons, keep_top, split_layers
from prune_edit.recover.gradual import Rounds, Schedule, gradual
from prune_edit.recover.least_squares import EXAMPLES, enough, refit
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options
from prune_edit.selection.gates import learn_gates
from prune_edit.selection.greedy import EXAMPLES as JUDGED
from prune_edit.selection.greedy import Greedy
from prune_edit.tasks.combine import balanced
from prune_edit.workspace import Workspace

BUDGETS = (("5% heads", 6, None), ("25% heads", 32, None), ("25% heads, 25% neurons", 32, 768))
ONE_STEP = ("cna", "taylor", "wanda", "flap", "magnitude")
START = 48  # heads that greedy choice begins with, after rounds
SEEDS = 5
SCORED = 128


class Choices:
    """The selections of one model; what several budgets share is made once."""

    def __init__(self, dense: Decoder, train: list[Any], work: Workspace) -> None:
        self.dense, self.train, self.work = dense, train, work
        self.scores: dict[tuple[str, int], Any] = {}

    def one_step(self, method: str, seed: int, heads: int, neurons: int | None) -> Any:
        key = method, seed
        if key not in self.scores:
            self.scores[key] = METHODS[method](self.dense, self.train[:SCORED], Options(seed=seed))
        found = self.scores[key]
        few = self.dense.layout.neurons if neurons is None else keep_neurons(found[1], neurons)
        return keep_top(found[0], heads), few

    def gradual(self, heads: int, neurons: int | None) -> tuple[Kept, Kept]:
        schedule = Schedule.of("least-squares")
        rounds = Rounds(self.dense, self.train, "cna", Options(), schedule, Workspace(), limit=1536)
        layout = gradual(rounds, heads, neurons).layout
        return layout.heads, layout.neurons

    def gates(self, heads: int, neurons: int | None) -> tuple[Kept, Kept]:
        odds = learn_gates(self.dense, self.train, self.train[:SCORED], heads, neurons, Options())
        few = self.dense.layout.neurons if neurons is None else keep_top(odds[1], neurons)
        return keep_top(odds[0], heads), few

    def greedy(self, heads: int, neurons: int | None) -> tuple[Kept, Kept]:
        """One walk backward from 48 heads serves every budget; neurons by gates."""
        width = self.dense.head_shape[1]
        found = self.work.load_tensors("greedy")
        if found is None:
            layers = self.gradual(START, None)[0]
            start = [layer * width + head for layer, kept in enumerate(layers) for head in kept]
            judged = balanced(self.train, JUDGED)
            order = Greedy(self.dense, judged, Options()).backward(start, 6)
            found = {"start": torch.tensor(start), "order": torch.tensor(order)}
            self.work.save_tensors("greedy", found)
        gone = set(found["order"].tolist()[: START - heads])
        kept = [unit for unit in found["start"].tolist() if unit not in gone]
        few = self.dense.layout.neurons
        if neurons is not None:
            scored = self.train[:SCORED]
            few = keep_top(
                learn_gates(self.dense, self.train, scored, None, neurons, Options())[1], neurons
            )
        return split_layers(kept, *self.dense.head_shape), few


def rows(choices: Choices) -> list[tuple[str, int, Callable[[int, int | None], Any]]]:
    """Name, seed, and how the units are chosen."""
    found: list[tuple[str, int, Any]] = [
        ("greedy", 0, choices.greedy),
    ]
    for name, seed in [(name, 0) for name in ONE_STEP] + [("random", s) for s in range(SEEDS)]:
        found.append((name, seed, lambda h, n, m=name, s=seed: choices.one_step(m, s, h, n)))
    return [*found, ("gradual", 0, choices.gradual), ("gates", 0, choices.gates)]


def measure(path: Path, threads: int, examples: int, only: list[str] | None) -> dict[str, Any]:
    dense = load_decoder()
    train, test = (
        encoded(dense, "arithmetic", split, limit)
        for split, limit in (("train", None), ("test", 1024))
    )
    whole = measure_accuracy(dense, test, Options())
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    found |= {
        "dense": {"accuracy": whole.value, "interval": whole.interval},
        "environment": {**environment(dense, 0), "commit": commit(), "threads": threads},
    }
    choices = Choices(dense, train, Workspace(path.with_suffix(".work")))
    fitted = enough(train, dense, examples)
    examples = len(fitted)
    done = {(r["budget"], r["selection"], r["seed"], r["examples"]) for r in found["rows"]}
    for name, seed, choose in rows(choices):
        for budget, heads, neurons in BUDGETS:
            if (budget, name, seed, examples) in done or (only and name not in only):
                continue
            started = time.perf_counter()
            kept = choose(heads, neurons)
            chosen = time.perf_counter() - started
            small = shrink(dense, *kept, train[:SCORED], Options())
            mean = measure_accuracy(small, test, Options())
            started = time.perf_counter()
            small = refit(small, dense, fitted, Options())
            got = measure_accuracy(small, test, Options())
            row = {
                "budget": budget, "selection": name, "seed": seed, "examples": examples,
                "commit": commit(), "mean": mean.value,
                "accuracy": got.value, "interval": got.interval,
                "relative": got.value / whole.value,
                "heads": [len(units) for units in kept[0]],
                "neurons": [len(units) for units in kept[1]],
                "parameters": count_parameters(small),
                "seconds_choosing": round(chosen, 1),
                "seconds_fitting": round(time.perf_counter() - started, 1),
            }  # fmt: skip
            found["rows"].append(row)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(budget, name, seed, f"{mean.value:.3f} {got.value:.3f}", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The Markdown table."""
    names = list(dict.fromkeys((row["selection"], row["examples"]) for row in found["rows"]))
    lines = [
        "| selection | " + " | ".join(name for name, *_ in BUDGETS) + " |",
        "|---|" + "--:|" * len(BUDGETS),
    ]
    for name, examples in names:
        cells, seeds = [], 0
        for budget, *_ in BUDGETS:
            own = [
                r
                for r in found["rows"]
                if (r["selection"], r["examples"], r["budget"]) == (name, examples, budget)
            ]
            if not own:
                cells.append("")
                continue
            seeds = len(own)
            values = [100 * row["accuracy"] for row in own]
            text = f"{statistics.fmean(values):.1f} %"
            if len(own) > 1:
                text += f" ({min(values):.1f}-{max(values):.1f})"
            else:
                low, high = own[0]["interval"]
                text += f" ({100 * low:.1f}-{100 * high:.1f})"
            mean = statistics.fmean(100 * row["mean"] for row in own)
            cells.append(f"{text}; {mean:.1f} % by the mean alone")
        label = f"{name}, {seeds} seeds" if name == "random" else name
        label += "" if examples == EXAMPLES else f", fitted to {examples:,} examples"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append(f"| dense | {100 * found['dense']['accuracy']:.1f} % | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="that are fitted to")
    parser.add_argument("--selections", nargs="+", help="only these")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="rows of other runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-untuned.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.merge:
        parts = [json.loads(path.read_text()) for path in given.merge]
        every = [row for part in parts for row in part["rows"]]
        rows = {(r["budget"], r["selection"], r["seed"], r["examples"]): r for r in every}
        merged = {**parts[0], "rows": list(rows.values())}
        given.out.write_text(json.dumps(merged, indent=1) + "\n")
        text = table(merged)
    else:
        text = table(measure(given.out, given.threads, given.examples, given.selections))
    given.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
