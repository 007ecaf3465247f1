"""The paper's pruning recipe (arXiv 2409.14144, 6.1): `python benchmarks/quality/paper_recipe.py`.

On the bundled reference model, 8 layers for the paper's 32: LoRA on one shallow layer's attention
is trained on the whole model; the neurons that it gives most to do in each example are joined
(`--score cna-cases --adapter`); of the neurons of the deep layers 5 % stay, all heads and all
shallow neurons too; then LoRA on the same layer is trained again on what is left. Beside it: the
same with other choices of as many deep neurons, five of them random. The layer, and whether removed
neurons leave zero or their mean, are chosen on the validation split, accuracy is that of the test
split. Rows are kept in the JSON as they come; a killed run goes on with the next.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from recovery import RESULTS, commit, encoded

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.layout import Kept
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, keep_neurons, neurons_that_stay, within_layers
from prune_edit.recover.shrink import shrink
from prune_edit.scoring import METHODS, Options, load_adapter
from prune_edit.scoring.cases import find_cases
from prune_edit.tasks.prompts import Encoded, collate

KEEP = Budget.parse("5%", "--keep-neurons")
SCORING, VALIDATION, TEST = 128, 512, 1024
STEPS, TRIAL_STEPS, BATCH, RATE, RANK, WARMUP = 600, 60, 64, 1e-2, 32, 10
CHOICES = (
    ("cna-cases", 0),
    *(("random", seed) for seed in range(5)),
    ("cna-cases, top head ablated", 0),
    ("importance", 0),
    ("taylor", 0),
    ("wanda", 0),
    ("magnitude", 0),
)
NAMES = {
    "cna-cases": "union over cases by CNA, LoRA against original (the paper's)",
    "cna-cases, top head ablated": "union over cases by CNA, original against no top head",
    "random": "random",
}


def tuned(
    decoder: Decoder,
    layer: int,
    train: list[Encoded],
    steps: int,
    seed: int,
    folder: Path | None = None,
) -> Decoder:
    """The model after LoRA on one layer's attention, merged; the adapter is saved to `folder`."""
    family = decoder.family
    paths = sorted({family.queries, family.keys, family.values, family.attention_output})
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[f"{family.layers}.{layer}.{path}" for path in paths],
        fan_in_fan_out=family.transposed,
    )
    adapted: Any = get_peft_model(copy.deepcopy(decoder.model), config)
    adapted.eval()  # no dropout
    running = decoder.with_model(adapted.get_base_model())
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        warm, done = (step + 1) / WARMUP, step / steps
        rate = RATE * min(warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = torch.randint(len(train), (BATCH,), generator=draw).tolist()
        rows = sorted((train[i] for i in picked), key=lambda row: len(row.ids))
        tokens = sum(len(row.answer) for row in rows)
        for half in (rows[: BATCH // 2], rows[BATCH // 2 :]):  # of like lengths: less padding
            batch = collate(half).to(decoder.device)
            with torch.enable_grad():
                states = running.final_states(**batch.inputs)[batch.rows, batch.columns]
                logits = running.unembed(states).float()
                loss = functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens
                loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if folder is not None:
        adapted.save_pretrained(folder)
    merged = decoder.with_model(adapted.merge_and_unload())
    for parameter in merged.model.parameters():
        parameter.requires_grad_(False)
    return merged


class Run:
    """The model, its data, and the rows found so far."""

    def __init__(self, path: Path, steps: int, dense: Decoder | None = None) -> None:
        self.path, self.steps = path, steps
        self.dense = dense or load_decoder()
        depth = self.dense.n_layers
        self.shallow, self.deep_layers = range(depth // 2), tuple(range(depth // 2, depth))
        self.train = encoded(self.dense, "arithmetic", "train", None)
        self.validation = encoded(self.dense, "arithmetic", "validation", VALIDATION)
        self.test = encoded(self.dense, "arithmetic", "test", TEST)
        self.scoring = self.train[:SCORING]
        widths = [len(units) for units in self.dense.layout.neurons]
        self.deep = sum(widths[layer] for layer in self.deep_layers)
        self.count = neurons_that_stay(KEEP, widths, self.deep_layers, "--keep-neurons")
        self.kept_deep = self.count - (sum(widths) - self.deep)
        self.found: dict[str, Any] = {"rows": [], "chosen": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before["tuning"]["steps"] != steps:
                sys.exit(f"{path} is of {before['tuning']['steps']} steps; give another --out")
            self.found = before
        self.found |= {
            "deep_layers": self.deep_layers,
            "deep_neurons": self.deep,
            "kept": self.kept_deep,
            "tuning": {
                "steps": steps,
                "trial_steps": TRIAL_STEPS,
                "batch": BATCH,
                "learning_rate": RATE,
                "rank": RANK,
                "loss": "cross-entropy of the answer tokens",
            },
            "cases": SCORING,
        }

    def accuracy(self, decoder: Decoder, rows: list[Encoded]) -> float:
        return measure_accuracy(decoder, rows, Options()).value

    def pruned(self, kept: Kept, mean: bool) -> Decoder:
        means = self.scoring if mean else None
        return shrink(self.dense, self.dense.layout.heads, kept, means, Options())

    def add(self, name: str, seed: int, recovery: str, decoder: Decoder, seconds: float) -> None:
        accuracy = measure_accuracy(decoder, self.test, Options())
        row = {
            "choice": name,
            "seed": seed,
            "recovery": recovery,
            "accuracy": accuracy.value,
            "interval": accuracy.interval,
            "neurons": [len(units) for units in decoder.layout.neurons],
            "parameters": count_parameters(decoder),
            "seconds": round(seconds, 1),
            "environment": {**environment(self.dense, seed), "commit": commit()},
        }
        self.found["rows"].append(row)
        self.save()
        print({key: row[key] for key in ("choice", "seed", "recovery", "accuracy", "seconds")})

    def has(self, name: str, seed: int, recovery: str) -> bool:
        rows = self.found["rows"]
        return any((r["choice"], r["seed"], r["recovery"]) == (name, seed, recovery) for r in rows)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    # What is chosen on validation

    def layer(self) -> int:
        """The shallow layer whose LoRA brings most back, after a short try in each.

        On the model without any choice of neurons of its own: random deep neurons, seed 99.
        """
        chosen = self.found["chosen"]
        if "layer" not in chosen:
            scores = METHODS["random"](self.dense, self.scoring, Options(seed=99))[1]
            small = self.pruned(
                keep_neurons(within_layers(scores, self.deep_layers), self.count), mean=False
            )
            tries = {
                layer: self.accuracy(
                    tuned(small, layer, self.train, TRIAL_STEPS, 0), self.validation
                )
                for layer in self.shallow
            }
            chosen["tries"] = {f"layer {layer}": value for layer, value in tries.items()}
            chosen["layer"] = max(tries, key=lambda layer: tries[layer])
            self.save()
        return int(chosen["layer"])

    def mean(self, kept: Kept) -> bool:
        """Whether LoRA starts from removed neurons at their mean, or at zero."""
        chosen = self.found["chosen"]
        if "start" not in chosen:
            tries = {
                name: self.accuracy(self.pruned(kept, name == "mean"), self.validation)
                for name in ("zero", "mean")
            }
            chosen["starts"] = tries
            chosen["start"] = max(tries, key=lambda name: tries[name])
            self.save()
        return bool(chosen["start"] == "mean")

    def neurons(self, name: str, seed: int, adapter: Path) -> Kept:
        """The deep neurons that stay, and all shallow ones."""
        options = Options(seed=seed)
        if name.startswith("cna-cases"):
            if name == "cna-cases":
                options = Options(adapted=load_adapter(self.dense, adapter))
            cases = find_cases(self.dense, self.scoring, options)[1]
            self.found["chosen"][f"n of {name}"] = cases.largest(self.kept_deep, self.deep_layers)
            scores = cases.scores()
        else:
            scores = METHODS[name](self.dense, self.scoring, options)[1]
        return keep_neurons(within_layers(scores, self.deep_layers), self.count)


def measure(path: Path, steps: int, rows: int, dense: Decoder | None = None) -> dict[str, Any]:
    run = Run(path, steps, dense)
    if not run.has("all neurons", 0, "none"):
        run.add("all neurons", 0, "none", run.dense, 0.0)
    layer = run.layer()
    adapter = path.with_suffix(".adapter")
    started = time.perf_counter()
    known = run.has("all neurons", 0, "lora")
    if not known or not (adapter.is_dir() or run.has("cna-cases", 0, "lora")):
        whole = tuned(run.dense, layer, run.train, steps, 0, adapter)
    if not known:
        run.add("all neurons", 0, "lora", whole, time.perf_counter() - started)
    for name, seed in CHOICES[:rows]:
        wanted = ("zero", "mean", "lora")
        if all(run.has(name, seed, each) for each in wanted):
            continue
        kept = run.neurons(name, seed, adapter)
        mean = run.mean(kept)
        for recovery in wanted:
            if run.has(name, seed, recovery):
                continue
            started = time.perf_counter()
            small = run.pruned(kept, mean if recovery == "lora" else recovery == "mean")
            if recovery == "lora":
                small = tuned(small, layer, run.train, steps, seed)
            run.add(name, seed, recovery, small, time.perf_counter() - started)
    run.save()
    shutil.rmtree(adapter, ignore_errors=True)
    return run.found


def table(found: dict[str, Any]) -> str:
    """The Markdown table."""
    rows, chosen = found["rows"], found["chosen"]

    def values(name: str, recovery: str) -> list[float]:
        return [r["accuracy"] for r in rows if (r["choice"], r["recovery"]) == (name, recovery)]

    def shown(name: str, recovery: str) -> str:
        every = values(name, recovery)
        if not every:
            return ""
        spread = f" ({100 * min(every):.1f}-{100 * max(every):.1f})" if len(every) > 1 else ""
        return f"{sum(every) / len(every):.1%}{spread}"

    def relative(name: str) -> str:
        own, (whole,) = values(name, "lora"), values("all neurons", "lora")
        return f"{sum(own) / len(own) / whole:.1%}" if own else ""

    lines = [
        f"| {found['kept']} of {found['deep_neurons']:,} deep neurons | zero | mean | "
        f"{chosen['start']}, LoRA on layer {chosen['layer']}, {found['tuning']['steps']} steps | "
        "of LoRA unpruned |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(name for name, _ in CHOICES):
        if not shown(name, "zero"):
            continue
        label = NAMES.get(name, name)
        seeds = len(values(name, "lora"))
        label += f", {seeds} seeds" if seeds > 1 else ""
        cells = [shown(name, each) for each in ("zero", "mean", "lora")]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {relative(name)} |")
    lines.append(
        f"| all neurons | {shown('all neurons', 'none')} | | {shown('all neurons', 'lora')} | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=len(CHOICES), help="only the first so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-paper-recipe.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.out, given.steps, given.rows)
    text = table(found)
    given.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
