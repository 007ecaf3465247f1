"""How long an explanation takes: `python benchmarks/explain.py [--threads 2] [--repeats 3]`.

A full page for one prompt (every edge cut, page and JSON written) and an explanation of a task, on
the reference model; the clock runs from the call to the written files, the model loaded. The
fastest and the median of the repeats are kept, with the seconds of computing (of all threads) and
the load of the machine before each: on one that others use, the clock says little. Writes
`benchmarks/results/explain.json` and `.md`. A row for a model of 7B parameters on a GPU is made by
`--model huggyllama/llama-7b --device cuda --dtype bfloat16`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recovery import RESULTS, commit

from prune_edit.evaluation.comparison import environment
from prune_edit.explain import explain_prompt, explain_task
from prune_edit.loading import load_decoder
from prune_edit.samples import Samples
from prune_edit.scoring import Options
from prune_edit.tasks import load_task

PROMPT, TASK, EXAMPLES = "3+5=", "arithmetic", 64
LIMIT_SECONDS = {"prompt": 20.0, "task": None}


def timed(act: Callable[[], Any], repeats: int) -> dict[str, Any]:
    seconds, loads, used = [], [], []
    for _ in range(repeats):
        loads.append(os.getloadavg()[0])
        start = time.perf_counter()
        cpu = time.process_time()
        found = act()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "page.html").write_text(found.to_html(), encoding="utf-8")
            (Path(folder) / "page.json").write_text(json.dumps(found.to_dict()))
            size = (Path(folder) / "page.html").stat().st_size
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
    return {
        "seconds": seconds,
        "fastest": min(seconds),
        "median": statistics.median(seconds),
        "cpu_seconds": used,
        "load_before": loads,
        "page_bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; the bundled reference model without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("prompt", "task"), action="append")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    decoder = load_decoder(given.model, device=given.device, dtype=given.dtype)
    options = Options()
    name = "reference model" if given.model is None else given.model
    rows = Samples(load_task(TASK), decoder, EXAMPLES).encoded("test", EXAMPLES)
    acts: dict[str, Callable[[], Any]] = {
        "prompt": lambda: explain_prompt(decoder, PROMPT, options, verify=True),
        "task": lambda: explain_task(decoder, TASK, rows, options),
    }
    path = RESULTS / "explain.json"
    result = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    for kind in given.only or acts:
        found = timed(acts[kind], given.repeats)
        result["rows"][f"{name}, {kind}"] = {
            **found,
            "kind": kind,
            "limit": LIMIT_SECONDS[kind],
            "environment": {**environment(decoder, options.seed), "commit": commit()},
        }
        print(kind, found, flush=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "explain.md").write_text(table(result["rows"]), encoding="utf-8")


def table(rows: dict[str, Any]) -> str:
    what = {
        "prompt": f"page of `{PROMPT}`, every edge cut",
        "task": f"page of {TASK}, {EXAMPLES} prompts",
    }
    lines = [
        "| model | explanation | seconds, fastest (median) | of it computing | load of the machine "
        "| device, threads |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, row in rows.items():
        made, used = row["environment"], min(row["cpu_seconds"])
        lines.append(
            f"| {name.rpartition(', ')[0]} | {what[row['kind']]} | {row['fastest']:.1f} "
            f"({row['median']:.1f}) | {used:.1f} | {min(row['load_before']):.0f} | "
            f"{made['device']}, {made['threads']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
