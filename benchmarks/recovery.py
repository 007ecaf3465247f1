"""Accuracy against heads kept, by selection and recovery: `python benchmarks/recovery.py`.

For 5, 10, 25 and 50 % of the heads (all neurons stay), chosen by intervention (what `cna` ranks
heads by), by weight magnitude and at random (three seeds), replaced by zero or by their mean in one
step, or gradually by their mean with least squares, or with tuning, with LoRA or in full. Every
method gets the same budget, the same recovery, the same test examples. Rows are kept in the JSON as
they come, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.evaluation.speed import measure_speed_pair
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, keep_top
from prune_edit.recover.gradual import Rounds, Schedule, gradual
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.scoring import METHODS, Options
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import Encoded, encode_all
from prune_edit.workspace import Workspace

RESULTS = Path(__file__).parent / "results"
SHARES = ("5%", "10%", "25%", "50%")
CHOICES = (("cna", 0), ("magnitude", 0), ("random", 0), ("random", 1), ("random", 2))
RECOVERIES = ("none", "mean", "least-squares", "lora", "full")
TEST_EXAMPLES = 1024
STEPS = 20, 100
"""Of a round and at the end, fewer than the command's, so that all rows together stay near an
hour."""


def schedule(kind: str) -> Schedule:
    usual = Schedule.of(kind)
    rounds, final = STEPS
    return replace(
        usual,
        round_tuning=replace(usual.round_tuning, steps=rounds),
        final_tuning=replace(usual.final_tuning, steps=final),
    )


def encoded(decoder: Decoder, task: str, split: str, limit: int | None) -> list[Encoded]:
    chosen = load_task(task)
    rows = chosen.split(split) if limit is None else chosen.sample(split, limit)
    return encode_all(decoder.tokenizer, rows, task, decoder.max_positions)


def pruned(
    decoder: Decoder,
    method: str,
    seed: int,
    heads: int,
    recovery: str,
    train: list[Encoded],
    teacher: Teacher,
) -> Decoder:
    """The model with so many heads, as `prune-edit prune` makes it."""
    options = Options(seed=seed)
    if recovery not in ("none", "mean"):
        rounds = Rounds(
            decoder, train, method, options, schedule(recovery), Workspace(), teacher=teacher
        )
        return gradual(rounds, heads)
    scores, _ = METHODS[method](decoder, train[:128], options)
    means = train[:128] if recovery == "mean" else None
    return shrink(decoder, keep_top(scores, heads), decoder.layout.neurons, means, options)


def measure(
    model: str | None,
    task: str,
    path: Path,
    recoveries: tuple[str, ...],
    shares: tuple[str, ...],
) -> dict[str, Any]:
    decoder = load_decoder(model)
    train, test = (
        encoded(decoder, task, "train", None),
        encoded(decoder, task, "test", TEST_EXAMPLES),
    )
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    teacher = Teacher(decoder)  # what it found serves every row
    dense = measure_accuracy(decoder, test, Options())
    found |= {
        "model": (model and Path(model).name) or "reference model",
        "model_digest": decoder.digest,
        "task": task,
        "heads": sum(map(len, decoder.layout.heads)),
        "tuning_steps": STEPS,
        "environment": {**environment(decoder, 0), "commit": commit()},
        "dense": {
            "accuracy": dense.value,
            "interval": dense.interval,
            "examples": dense.total,
            "parameters": count_parameters(decoder),
        },
    }
    done = {(row["keep"], row["method"], row["seed"], row["recovery"]) for row in found["rows"]}
    for share in shares:
        heads = Budget.parse(share, "--keep-heads").of(found["heads"], "--keep-heads")
        for recovery in recoveries:
            for method, seed in CHOICES:
                if (share, method, seed, recovery) in done:
                    continue
                # On a model of few heads two shares can be one count: the same run.
                same = (heads, method, seed, recovery)
                twin = next((r for r in found["rows"] if key(r) == same), None)
                if twin is not None:
                    found["rows"].append({**twin, "keep": share})
                    continue
                started = time.perf_counter()
                small = pruned(decoder, method, seed, heads, recovery, train, teacher)
                seconds = time.perf_counter() - started
                accuracy = measure_accuracy(small, test, Options())
                row = {
                    "keep": share,
                    "heads": heads,
                    "method": method,
                    "seed": seed,
                    "recovery": recovery,
                    "accuracy": accuracy.value,
                    "interval": accuracy.interval,
                    "parameters": count_parameters(small),
                    "seconds": round(seconds, 1),
                }
                if method == "cna" and recovery == "full":
                    before, after = measure_speed_pair(decoder, small)
                    row["speed_up"] = {
                        f"{phase} {batch}": after[batch][phase]["tokens_per_second"]
                        / before[batch][phase]["tokens_per_second"]
                        for batch in ("batch_1", "batch_32")
                        for phase in ("prefill", "decode")
                    }
                found["rows"].append(row)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(row, flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def key(row: dict[str, Any]) -> tuple[int, str, int, str]:
    return row["heads"], row["method"], row["seed"], row["recovery"]


def table(found: dict[str, Any]) -> str:
    """The Markdown table of one model."""
    lines = [
        "| heads kept | recovery | CNA/intervention | magnitude | random, 3 seeds | parameters "
        "| speed-up (prefill, decode at batch 32) |",
        "|---|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        for recovery in RECOVERIES:
            rows = [r for r in found["rows"] if r["keep"] == share and r["recovery"] == recovery]
            if not rows:
                continue
            by = {
                m: [r["accuracy"] for r in rows if r["method"] == m]
                for m in ("cna", "magnitude", "random")
            }
            own = next(r for r in rows if r["method"] == "cna")
            best = max(sum(values) / len(values) for values in by.values() if values)
            cells = []
            for values in by.values():
                if not values:
                    cells.append("")
                    continue
                mean = sum(values) / len(values)
                text = f"{100 * mean:.1f} %"
                text = f"**{text}**" if mean == best else text
                if len(values) > 1:
                    text += f" ({100 * min(values):.1f}-{100 * max(values):.1f})"
                cells.append(text)
            speed = own.get("speed_up")
            cells.append(f"{own['parameters'] / 1e6:.2f} M")
            cells.append(
                f"{speed['prefill batch_32']:.2f}x, {speed['decode batch_32']:.2f}x"
                if speed
                else ""
            )
            lines.append(f"| {share} ({own['heads']}) | {recovery} | " + " | ".join(cells) + " |")
    dense = found["dense"]
    lines.append(
        f"| 100% ({found['heads']}) | - | {100 * dense['accuracy']:.1f} % | | "
        f"| {dense['parameters'] / 1e6:.2f} M | 1x, 1x |"
    )
    return "\n".join(lines)


def commit() -> str:
    """The commit of the code that ran, marked where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "prune_edit"], capture_output=True, text=True, check=False
    )
    return (run.stdout.strip() or "unknown") + ("-changed" if dirty.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder; the bundled reference model without it")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery-reference.json")
    parser.add_argument("--recovery", choices=RECOVERIES, action="append", help="only these")
    parser.add_argument("--keep", choices=SHARES, action="append", help="only these shares")
    options = parser.parse_args()
    recoveries = tuple(options.recovery or RECOVERIES)
    shares = tuple(options.keep or SHARES)
    found = measure(options.model, options.task, options.out, recoveries, shares)
    text = table(found)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
