"""`--keep-accuracy 99%` against a sweep: `python benchmarks/quality/smallest.py`.

A grid of budgets over heads and neurons is walked as `prune-edit sweep` walks it, and every model
of it measured on validation; the smallest that has 99 % of the dense model's accuracy there stands
beside the model that the search finds, in parameters, with what both took. Both have the same
recovery, examples and validation prompts, with one thread; cost is processor seconds, which other
programs on the machine do not change. A sweep that the result file holds, with the
same settings, is not walked again. Test accuracy is shown beside, and decides nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recovery import RESULTS, commit, encoded

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.frontier import walk
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget
from prune_edit.pruning import Pruning
from prune_edit.recovery import Recovery
from prune_edit.samples import Samples
from prune_edit.scoring import Options
from prune_edit.tasks.registry import load_task
from prune_edit.workspace import Workspace

SHARE = 0.99
RATIO = 0.85  # between neighbours of the grid
SMALLEST = {"heads": 0.15, "neurons": 0.25}  # of the grid


def grid(total: int, share: float) -> list[int]:
    """Numbers of units from all of them down, each `RATIO` of the one before."""
    counts = [total]
    while counts[-1] * RATIO >= share * total:
        counts.append(min(counts[-1] - 1, round(counts[-1] * RATIO)))
    return counts


def fresh(decoder: Decoder, task: str, recover: str, limit: int | None) -> Recovery:
    data = Samples(load_task(task), decoder, limit)
    found = Recovery(
        decoder, data, recover, 0.0, "cna", "answer", Options(), Workspace(), lambda text: None
    )
    found.strongest()
    return found


def row(recovery: Recovery, small: Decoder, test: Any) -> dict[str, Any]:
    found = measure_accuracy(small, recovery.validation, recovery.options, "validation")
    heads, neurons = (sum(map(len, u)) for u in (small.layout.heads, small.layout.neurons))
    return {
        "heads": heads, "neurons": neurons, "parameters": count_parameters(small),
        "validation": found.value, "interval": found.interval,
        "test": measure_accuracy(small, test, recovery.options).value,
    }  # fmt: skip


def sweep(
    decoder: Decoder, test: Any, task: str, recover: str, limit: int | None
) -> dict[str, Any]:
    """Every model of the grid, and the processor seconds they took."""
    totals = [sum(map(len, u)) for u in (decoder.layout.heads, decoder.layout.neurons)]
    counts = [grid(total, share) for total, share in zip(totals, SMALLEST.values(), strict=True)]
    started = time.process_time()
    recovery = fresh(decoder, task, recover, limit)
    spent, rows = 0.0, []
    for _, _, small in walk(recovery, *counts):
        recovery.accuracy(small)
        spent += time.process_time() - started
        rows.append(row(recovery, small, test))  # what is shown beside is not the sweep's cost
        print(rows[-1], f"{spent:.0f} s", flush=True)
        started = time.process_time()
    return {"grid": counts, "rows": rows, "seconds": spent, "commit": commit()}


def measure(model: str | None, recover: str, limit: int | None, path: Path) -> dict[str, Any]:
    """The sweep, unless the file has it from these settings, and the search."""
    decoder = load_decoder(model)
    task = "arithmetic/padded" if model else "arithmetic"
    test = encoded(decoder, task, "test", 1024)
    before = json.loads(path.read_text()) if path.exists() else {}
    settings = {
        "model": Path(model).name if model else "reference model", "task": task,
        "recover": recover, "examples": limit, "share": SHARE,
    }  # fmt: skip
    if settings.items() <= before.items():
        swept = before["sweep"]
    else:
        swept = sweep(decoder, test, task, recover, limit)
        path.write_text(json.dumps({**settings, "sweep": swept}, indent=1) + "\n")
    started = time.process_time()
    recovery = fresh(decoder, task, recover, limit)
    pruning = Pruning(recovery, Budget.parse("all", "heads"), None, SHARE)
    small, _ = pruning.result()
    searched = time.process_time() - started
    dense = row(recovery, decoder, test)
    floor = SHARE * dense["validation"]
    good = [each for each in swept["rows"] if each["validation"] >= floor]
    return {
        **settings, "dense": dense, "floor": floor, "sweep": swept,
        "smallest": min(good, key=lambda each: each["parameters"]),
        "search": row(recovery, small, test), "tries": pruning.report["keep_accuracy"]["tries"],
        "seconds": {"sweep": swept["seconds"], "search": searched},
        "environment": {**environment(decoder, 0), "commit": commit()},
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The Markdown table."""
    lines = [
        "| | heads | neurons | parameters | validation | test | models | processor time |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, each, tries, seconds in (
        ("dense", found["dense"], "", None),
        ("smallest of the sweep", found["smallest"], len(found["sweep"]["rows"]), "sweep"),
        ("`--keep-accuracy 99%`", found["search"], len(found["tries"]), "search"),
    ):
        took = "" if seconds is None else f"{found['seconds'][seconds]:.0f} s"
        lines.append(
            f"| {name} | {each['heads']} | {each['neurons']:,} | {each['parameters'] / 1e6:.3f} M "
            f"| {each['validation']:.1%} | {each['test']:.1%} | {tries} | {took} |"
        )
    larger = found["search"]["parameters"] / found["smallest"]["parameters"] - 1
    cost = found["seconds"]["search"] / found["seconds"]["sweep"]
    examples = "the usual" if found["examples"] is None else format(found["examples"], ",")
    lines += [
        "",
        f"The search's model has {larger:+.1%} of the parameters of the sweep's smallest, at "
        f"{cost:.1%} of the sweep's cost ({found['recover']}, {examples} examples).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder that answers arithmetic/padded")
    parser.add_argument("--recover", default="least-squares")
    parser.add_argument("--examples", type=int, help="of each step, at most; else the usual")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-smallest.json")
    given = parser.parse_args()
    torch.set_num_threads(1)  # processor seconds of one thread are the work done
    found = measure(given.model, given.recover, given.examples, given.out)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
