"""Accuracy against heads and neurons kept: `python benchmarks/quality/selections.py`.

Every selection here, and random choice by five seeds, at 2, 5, 10, 25 and 50 % of the heads (all
neurons stay) and 2, 5, 10, 20 and 50 % of the neurons (all heads stay), each with the same
recoveries: nothing, the mean, least squares, and LoRA for a moment (after the mean). Beside what
was tuned stands a fresh model of the pruned shape, all of it trained for the same steps on the same
examples with the same loss. What longer tuning makes of choices is in `benchmarks/recovery.py` and
`few_heads.py`. On the bundled model (arithmetic), `--model PATH/mathgpt-4l4h` (three-digit sums)
and `--model PATH/stories260K` (the dense model's own next token in little stories). Rows are kept
in the JSON as they come; a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from few_heads import fresh
from recovery import RESULTS, commit, encoded

from prune_edit import plots
from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy, wilson
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.layout import Kept
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, keep_neurons, keep_top
from prune_edit.recover.gradual import Rounds, Schedule, gradual
from prune_edit.recover.least_squares import refit
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.tuning import Tuning, tune
from prune_edit.scoring import METHODS, Options, predicted_targets
from prune_edit.selection.gates import GateTraining, learn_gates
from prune_edit.tasks import Example
from prune_edit.tasks.prompts import Encoded, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.workspace import Workspace

SHARES = {
    "heads": ("50%", "25%", "10%", "5%", "2%"),
    "neurons": ("50%", "20%", "10%", "5%", "2%"),
}
ONE_SHOT = {
    "heads": ("cna", "taylor", "wanda", "flap", "activation", "magnitude"),
    "neurons": (
        "cna", "circuit", "importance", "taylor", "wanda", "flap", "activation", "magnitude",
    ),
}  # fmt: skip
SEEDS = 5
RECOVERIES = ("none", "mean", "least-squares", "lora")
TUNING = Tuning(steps=40, kind="lora", batch=64, warmup=10)
EXAMPLES = 1024  # that least squares fits to, for time; `untuned.py` has what more of them give
SCORED = 128
TESTED = 512
GATES = GateTraining(steps=200)


def story_rows(decoder: Decoder, split: str, count: int) -> list[Encoded]:
    """Places in little stories, each with the dense model's own next token as the answer."""
    rows = []
    for number, text in enumerate(stories(split, count)):
        ids = text_ids(decoder.tokenizer, text)[:96]
        start = 8 + number * 7 % max(1, len(ids) - 9)
        rows.append(Encoded(tuple(ids[: start + 1]), start, Example(text, "")))
    return predicted_targets(decoder, rows, Options())


def data_of(model: str | None, decoder: Decoder) -> tuple[str, list[Encoded], list[Encoded]]:
    """The task's name, its train rows and the test rows."""
    name = Path(model).name if model else "reference"
    if name == "stories260K":
        return "stories, own next token", story_rows(decoder, "train", 6000), story_rows(
            decoder, "test", TESTED
        )  # fmt: skip
    task = "arithmetic/padded" if model else "arithmetic"
    return task, encoded(decoder, task, "train", None), encoded(decoder, task, "test", TESTED)


def selections(
    decoder: Decoder, axis: str, train: Sequence[Encoded]
) -> Iterator[tuple[str, int, Any]]:
    """Name, seed, and what gives the kept units (heads, neurons) for a count."""
    layout = decoder.layout
    scored = train[:SCORED]
    for name, seed in [(name, 0) for name in ONE_SHOT[axis]] + [
        ("random", seed) for seed in range(SEEDS)
    ]:
        options = Options(seed=seed, neurons=axis == "neurons")
        cache: list[Any] = []

        def choose(count: int, name: str = name, options: Options = options, cache: Any = cache):
            if not cache:
                cache.append(METHODS[name](decoder, scored, options))
            heads, neurons = cache[0]
            if axis == "heads":
                return keep_top(heads, count), layout.neurons
            return layout.heads, keep_neurons(neurons, count)

        yield name, seed, choose

    def gates(count: int) -> tuple[Kept, Kept]:
        budgets = (count, None) if axis == "heads" else (None, count)
        heads, neurons = learn_gates(decoder, train, scored, *budgets, Options(), GATES)
        if axis == "heads":
            return keep_top(heads, count), layout.neurons
        return layout.heads, keep_top(neurons, count)

    yield "gates", 0, gates


def gradually(decoder: Decoder, heads: int, train: Sequence[Encoded]) -> Decoder:
    """So many heads, in rounds with least squares after each."""
    schedule = Schedule.of("least-squares")
    rounds = Rounds(decoder, train[:EXAMPLES], "cna", Options(), schedule, Workspace())
    return gradual(rounds, heads)


def _total(decoder: Decoder, axis: str) -> int:
    return sum(map(len, getattr(decoder.layout, axis)))


def recovered(
    decoder: Decoder,
    kept: tuple[Kept, Kept],
    recovery: str,
    train: Sequence[Encoded],
    teacher: Teacher,
) -> Decoder:
    """The model with these units and one recovery."""
    means = None if recovery == "none" else train[:SCORED]
    small = shrink(decoder, *kept, means, Options())
    if recovery == "least-squares":
        # The values of all heads take long, and no head lacks where only neurons went.
        values = kept[0] != decoder.layout.heads
        return refit(small, decoder, train[:EXAMPLES], Options(), values=values)
    if recovery == "lora":
        return tune(small, train, TUNING, Options(), teacher)
    return small


def anew(
    decoder: Decoder, kept: tuple[Kept, Kept], train: Sequence[Encoded], teacher: Teacher
) -> Decoder:
    """A model of this shape that starts from nothing, tuned as long."""
    start = fresh(shrink(decoder, *kept, None, Options()), seed=0)
    return tune(start, train, replace(TUNING, kind="full"), Options(), teacher)


def measure(
    model: str | None, path: Path, axes: Sequence[str], recoveries: Sequence[str], threads: int
) -> dict[str, Any]:
    decoder = load_decoder(model)
    task, train, test = data_of(model, decoder)
    dense, teacher = measure_accuracy(decoder, test, Options()), Teacher(decoder)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    found |= {
        "model": Path(model).name if model else "reference model",
        "model_digest": decoder.digest,
        "task": task,
        "totals": {axis: _total(decoder, axis) for axis in SHARES},
        "least_squares_examples": EXAMPLES,
        "lora": asdict(TUNING),
        "environment": {**environment(decoder, 0), "commit": commit(), "threads": threads},
        "dense": {"accuracy": dense.value, "interval": dense.interval, "examples": dense.total},
    }
    done = {
        (r["axis"], r["share"], r["selection"], r["seed"], r["recovery"]) for r in found["rows"]
    }

    def add(axis: str, share: str, name: str, seed: int, recovery: str, small: Any) -> None:
        started = time.perf_counter()
        small = small()
        seconds = time.perf_counter() - started
        got = measure_accuracy(small, test, Options())
        row = {
            "axis": axis, "share": share, "selection": name, "seed": seed, "recovery": recovery,
            "kept": _total(small, axis), "accuracy": got.value, "interval": got.interval,
            "parameters": count_parameters(small), "seconds": round(seconds, 2),
        }  # fmt: skip
        found["rows"].append(row)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(axis, share, name, seed, recovery, f"{got.value:.3f}", f"{seconds:.1f} s", flush=True)

    for axis in axes:
        for share in SHARES[axis]:
            count = Budget.parse(share, axis).of(_total(decoder, axis), axis)
            for name, seed, choose in selections(decoder, axis, train):
                todo = [r for r in recoveries if (axis, share, name, seed, r) not in done]
                kept = choose(count) if todo else None
                for recovery in todo:
                    add(
                        axis, share, name, seed, recovery,
                        lambda r=recovery, k=kept: recovered(decoder, k, r, train, teacher),
                    )  # fmt: skip
            again = (axis, share, "fresh model", 0, "lora")
            if "lora" in recoveries and again not in done:
                kept = next(selections(decoder, axis, train))[2](count)
                add(
                    axis,
                    share,
                    "fresh model",
                    0,
                    "lora",
                    lambda k=kept: anew(decoder, k, train, teacher),
                )
            # Rounds of neurons by the thousand take long: heads alone.
            rounds = axis == "heads" and "least-squares" in recoveries
            if rounds and (axis, share, "gradual", 0, "least-squares") not in done:
                add(axis, share, "gradual", 0, "least-squares",
                    lambda c=count: gradually(decoder, c, train))  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The Markdown table: a row for every selection, a column for every budget and recovery."""
    parts = []
    for axis, shares in SHARES.items():
        rows = [row for row in found["rows"] if row["axis"] == axis]
        if not rows:
            continue
        names = list(dict.fromkeys(row["selection"] for row in rows))
        for recovery in RECOVERIES:
            own = [row for row in rows if row["recovery"] == recovery]
            parts += [
                f"| {axis} kept, {recovery} | " + " | ".join(shares) + " |",
                "|---|" + "--:|" * len(shares),
            ]
            best = {
                share: max((r["accuracy"] for r in own if r["share"] == share), default=0.0)
                for share in shares
            }
            for name in names:
                cells = []
                for share in shares:
                    got = [
                        r["accuracy"] for r in own if (r["selection"], r["share"]) == (name, share)
                    ]
                    if not got:
                        cells.append("")
                        continue
                    mean = statistics.fmean(got)
                    text = f"{100 * mean:.1f}"
                    if len(got) > 1:
                        text += f" ({100 * min(got):.1f}-{100 * max(got):.1f})"
                    cells.append(f"**{text}**" if mean == best[share] else text)
                if any(cells):
                    label = f"random, {SEEDS} seeds" if name == "random" else name
                    parts.append(f"| {label} | " + " | ".join(cells) + " |")
            parts.append("")
    dense = found["dense"]
    low, high = dense["interval"]
    parts.append(f"Dense: {dense['accuracy']:.1%} ({low:.1%}-{high:.1%}), {found['task']}.")
    return "\n".join(parts)


def summary() -> str:
    """The Markdown table of all models measured: what is best by what, CNA, random, fresh."""
    lines = [
        "| model | kept | dense | best untouched | best by least squares | CNA | random, 5 seeds "
        "| best by LoRA | random | fresh |",
        "|---|--:|--:|---|---|--:|--:|---|--:|--:|",
    ]
    for path in sorted(RESULTS.glob("quality-selections-*.json")):
        found = json.loads(path.read_text())
        for axis, shares in SHARES.items():
            for share in shares:
                rows = [r for r in found["rows"] if (r["axis"], r["share"]) == (axis, share)]
                bare = [r for r in rows if (r["recovery"], r["seed"]) == ("none", 0)]
                cells = [_best(bare)]
                for recovery in ("least-squares", "lora"):
                    own = {r["selection"]: r["accuracy"] for r in rows if r["recovery"] == recovery}
                    chance = [
                        r["accuracy"]
                        for r in rows
                        if (r["selection"], r["recovery"]) == ("random", recovery)
                    ]
                    chosen = [
                        r
                        for r in rows
                        if r["recovery"] == recovery
                        and r["selection"] not in ("random", "fresh model")
                    ]
                    if len(chance) < SEEDS:
                        cells += [""] * 3
                        continue
                    spread = f"{statistics.fmean(chance):.1%} ({min(chance):.1%}-{max(chance):.1%})"
                    last = own["cna"] if recovery == "least-squares" else own.get("fresh model")
                    shown = "" if last is None else f"{last:.1%}"
                    cells += [_best(chosen)]
                    cells += [shown, spread] if recovery == "least-squares" else [spread, shown]
                if any(cells[1:]):
                    dense = f"{found['dense']['accuracy']:.1%}"
                    row = [found["model"], f"{share} {axis}", dense, *cells]
                    lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _best(rows: Sequence[dict[str, Any]]) -> str:
    best = max(rows, key=lambda row: row["accuracy"], default=None)
    return "" if best is None else f"{best['selection']} {best['accuracy']:.1%}"


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """One picture: a row of panels an axis, a panel a recovery."""
    panels = []
    for axis in SHARES:
        for recovery in RECOVERIES:
            own = [r for r in found["rows"] if (r["axis"], r["recovery"]) == (axis, recovery)]
            lines: dict[str, list[tuple[float, float, float, float]]] = {}
            for selection in dict.fromkeys(r["selection"] for r in own):
                for share in SHARES[axis]:
                    got = [r for r in own if (r["selection"], r["share"]) == (selection, share)]
                    if not got:
                        continue
                    values = [r["accuracy"] for r in got]
                    examples = found["dense"]["examples"]
                    low, high = wilson(round(values[0] * examples), examples)
                    if len(values) > 1:
                        low, high = min(values), max(values)
                    point = (float(share[:-1]), statistics.fmean(values), low, high)
                    lines.setdefault(selection, []).append(point)
            if lines:
                panels.append((f"{axis}, {recovery}", f"{axis} kept, %", lines))
    return plots.draw_selections(panels, found["dense"]["accuracy"], folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--axes", nargs="+", default=list(SHARES))
    parser.add_argument("--recoveries", nargs="+", default=list(RECOVERIES), choices=RECOVERIES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    parser.add_argument("--summary", action="store_true", help="only sum up all models' results")
    given = parser.parse_args()
    if given.summary:
        text = summary()
        (RESULTS / "quality-selections.md").write_text(text + "\n")
        print(text)
        return
    torch.set_num_threads(given.threads)
    name = f"quality-selections-{Path(given.model).name if given.model else 'reference'}"
    path = given.out or RESULTS / f"{name}.json"
    found = (
        json.loads(path.read_text())
        if given.draw
        else measure(given.model, path, given.axes, given.recoveries, given.threads)
    )
    path.with_suffix(".md").write_text(table(found) + "\n")
    for picture in draw(found, path.parent, path.stem):
        print(picture.name)
    print(table(found))


if __name__ == "__main__":
    main()
