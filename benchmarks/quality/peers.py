"""Real peers beside us: `python benchmarks/quality/peers.py` after `pip install prune-edit[bench]`.

Three models lose half, three quarters and nine tenths of their neurons, or of their heads, by
`torch-pruning` and `optipfair` as they come from PyPI, and by our scores, at the same number of
units, in one step. Whatever scores by data gets the same 128 train prompts; least squares fits to
1,024. No tuning anywhere: ours leave removed units at zero, at their mean, or refit what stays by
least squares, which the peers do not offer. FLAP, Wanda, Taylor and the like are also here as our
own implementations (`prune_edit/scoring/`). All are measured by one function on the same test
examples. A model that a peer cannot prune has the peer's own error below the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recovery import RESULTS, commit

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters
from prune_edit.loading import load_decoder
from prune_edit.planning import keep_neurons, keep_top
from prune_edit.recover.least_squares import refit
from prune_edit.recover.shrink import shrink
from prune_edit.running import answer_log_probs
from prune_edit.scoring import METHODS, Options
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import Encoded, collate, encode_all, text_ids
from prune_edit.tasks.stories import stories
from prune_edit.tasks.task import Example

SHARED = Path(os.environ.get("PRUNE_EDIT_SHARED", Path(__file__).parents[3] / "shared"))
SHARES = (0.5, 0.25, 0.1)
SCORING, FIT, TEST = 128, 1024, 1024
PATIENCE = 60  # seconds for one model of a peer, of which it needs one or two
CONTINUED = 3
STORIES = ("train", FIT), ("test", TEST)
PEERS = ("torch-pruning", "optipfair")
OURS = (
    ("cna", 0, ("none", "mean", "least-squares")),
    ("cna-cases", 0, ("none", "mean", "least-squares")),
    ("importance", 0, ("none",)),
    ("taylor", 0, ("none", "mean", "least-squares")),
    ("wanda", 0, ("none",)),
    ("flap", 0, ("mean",)),
    ("activation", 0, ("none",)),
    ("magnitude", 0, ("none",)),
    *(("random", seed, ("none", "least-squares")) for seed in range(3)),
)
NAMES = {
    "cna": "ours: CNA, heads by intervention",
    "cna-cases": "ours: CNA, union over cases",
    "importance": "ours: importance",
    "taylor": "ours: Taylor",
    "wanda": "Wanda, our implementation",
    "flap": "FLAP, our implementation",
    "activation": "Minitron activation, our implementation",
    "magnitude": "magnitude, our implementation",
    "random": "random, 3 seeds",
}


def continuations(decoder: Decoder, split: str, count: int) -> list[Encoded]:
    """Beginnings of little stories, and the next tokens that the dense model says itself.

    A model of 260K parameters knows no facts to ask for; what it says is what pruning can change.
    """
    found = []
    for number, story in enumerate(stories(split, count)):
        ids = text_ids(decoder.tokenizer, story)[: 12 + number % 24]
        front = len(ids)
        for _ in range(CONTINUED):
            with torch.no_grad():
                states = decoder.final_states(input_ids=torch.tensor([ids]))[0, -1:]
            ids = [*ids, int(decoder.unembed(states).argmax())]
        found.append(Encoded(tuple(ids), front, Example(story, str(ids[front:]))))
    return found


@dataclass(frozen=True)
class Subject:
    """One model with its task, scored and tested."""

    name: str
    decoder: Decoder
    task: str
    train: list[Encoded]
    test: list[Encoded]

    @classmethod
    def of(cls, name: str) -> Subject:
        decoder = load_decoder(None if name == "reference model" else SHARED / "models" / name)
        if name == "stories260K":
            train, test = (continuations(decoder, *each) for each in STORIES)
            return cls(name, decoder, f"{CONTINUED} tokens on, as the dense model", train, test)
        task = load_task({"mathgpt-4l4h": "arithmetic/padded"}.get(name, "arithmetic"))
        train, test = (
            encode_all(decoder.tokenizer, rows, task.name, decoder.max_positions)
            for rows in (task.split("train")[:FIT], task.sample("test", TEST))
        )
        return cls(name, decoder, task.name, train, test)

    @property
    def scoring(self) -> list[Encoded]:
        return self.train[:SCORING]

    def units(self, kind: str) -> tuple[tuple[int, ...], ...]:
        layout = self.decoder.layout
        return layout.heads if kind == "heads" else layout.neurons

    def count(self, kind: str, share: float) -> int:
        """The same whole number in every layer, which is all that some of the peers can do."""
        return sum(max(1, int(share * len(layer))) for layer in self.units(kind))


# The peers: a dense model in, a smaller one out


def loss_gradients(decoder: Decoder, rows: list[Encoded]) -> None:
    """Gradients of the answers' cross-entropy in every parameter."""
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for start in range(0, len(rows), 32):
            batch = collate(rows[start : start + 32])
            states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
            (-answer_log_probs(decoder, states, batch.targets).sum() / len(rows)).backward()


def torch_pruning(kind: str, importance: str, everywhere: bool) -> Callable[..., Decoder]:
    """`torch-pruning`'s grouped importance, each layer alone or `everywhere` at once."""

    def prune(subject: Subject, share: float) -> Decoder:
        import torch_pruning as tp

        decoder = subject.decoder.with_model(copy.deepcopy(subject.decoder.model))
        model, family = decoder.model, decoder.family
        layers = list(decoder.layers)
        inside = {
            "neurons": (*family.ffn_inputs, family.ffn_output),
            "heads": (family.queries, family.keys, family.values, family.attention_output),
        }[kind]
        touched = {layer.get_submodule(path) for layer in layers for path in inside}
        leaves = [module for module in model.modules() if not list(module.children())]
        batch = collate(subject.scoring)
        score = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "Taylor": tp.importance.GroupTaylorImportance,
            "activation": tp.importance.ActivationImportance,
        }[importance]()
        if importance == "Taylor":
            loss_gradients(decoder, subject.scoring)
        if importance == "activation":
            with torch.no_grad(), score.compute_importance(model):
                model(**batch.inputs)
        num_heads = {}
        if kind == "heads":
            for layer in layers:
                num_heads[layer.get_submodule(family.queries)] = decoder.layout.n_heads
                for path in (family.keys, family.values):
                    num_heads[layer.get_submodule(path)] = decoder.layout.n_kv_heads
        width = len(subject.units(kind)[0])
        gone = 1 - max(1, int(share * width)) / width
        model.config.use_cache = False  # as in its own example for language models
        # Heads go only where the ratio of their dimensions, which stay, is above zero, too.
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=batch.input_ids[:1],
            importance=score,
            global_pruning=everywhere,
            pruning_ratio=gone,
            ignored_layers=[module for module in leaves if module not in touched],
            num_heads=num_heads,
            prune_num_heads=kind == "heads",
            prune_head_dims=False,
            head_pruning_ratio=gone,
            output_transform=lambda out: out.logits,
        )
        pruner.step()
        return decoder

    return prune


def optipfair(selection: str, data: bool) -> Callable[..., Decoder]:
    """`optipfair`'s neuron selections, by weights or with its own look at data."""

    def prune(subject: Subject, share: float) -> Decoder:
        logging.disable(logging.INFO)
        import optipfair

        decoder = subject.decoder.with_model(copy.deepcopy(subject.decoder.model))
        loader = None
        if data:
            batches = (collate([row]) for row in subject.scoring)
            loader = [
                {"input_ids": each.input_ids, "attention_mask": each.attention_mask}
                for each in batches
            ]
        width = len(subject.units("neurons")[0])
        kept = max(1, int(share * width))
        optipfair.prune_model(
            decoder.model,
            neuron_selection_method=selection,
            pruning_percentage=100 * (width - kept) / width,
            dataloader=loader,
            show_progress=False,
        )
        return decoder

    return prune


def peer_ways(kind: str) -> Iterator[tuple[str, str, Callable[..., Decoder]]]:
    """Every way of every peer: package, name, function."""
    for importance in ("Taylor", "activation", "magnitude"):
        for everywhere in (False, True):
            name = f"{importance}, {'all layers together' if everywhere else 'layer by layer'}"
            yield "torch-pruning", name, torch_pruning(kind, importance, everywhere)
    if kind == "neurons":
        yield "optipfair", "MAW with data", optipfair("MAW", True)
        for selection in ("MAW", "VOW", "PON", "L2"):
            yield "optipfair", selection, optipfair(selection, False)


def kept_of(decoder: Decoder, kind: str) -> int:
    """Units a model physically has, from its output projections; ours without the dead pads."""
    if not decoder.layout.full:
        return sum(map(len, decoder.layout.heads if kind == "heads" else decoder.layout.neurons))
    total = 0
    for layer in range(decoder.n_layers):
        heads = kind == "heads"
        module = decoder.attention_output(layer) if heads else decoder.ffn_output(layer)
        size = decoder.head_dim if heads else 1
        total += 0 if module is None else decoder.output_weight(module).shape[0] // size
    return total


def said(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# Ours


def our_rows(subject: Subject, kind: str) -> Iterator[tuple[str, int, str, Callable[..., Decoder]]]:
    """Method, seed, recovery, and what makes the model with so many units."""
    for method, seed, recoveries in OURS:
        if kind == "heads" and method in ("cna-cases", "importance"):
            continue  # heads by intervention, as for cna
        options = Options(seed=seed)
        found: list[Any] = []

        def make(share: float, recovery: str, method=method, options=options, found=found):
            if not found:
                found.extend(METHODS[method](subject.decoder, subject.scoring, options))
            heads, neurons = subject.decoder.layout.heads, subject.decoder.layout.neurons
            count = subject.count(kind, share)
            if kind == "heads":
                heads = keep_top(found[0], count)
            else:
                neurons = keep_neurons(found[1], count)
            means = None if recovery == "none" else subject.scoring
            small = shrink(subject.decoder, heads, neurons, means, options)
            if recovery == "least-squares":
                small = refit(small, subject.decoder, subject.train, options)
            return small

        for recovery in recoveries:
            yield method, seed, recovery, lambda share, r=recovery, m=make: m(share, r)


def too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"not done after {PATIENCE} s, and was stopped")


def measured(
    subject: Subject, kind: str, make: Callable[[], Decoder], patience: int = 0
) -> dict[str, Any]:
    """What one way comes to; its own error where it fails, or goes on without an end."""
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(patience)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = make()
            signal.alarm(0)
            kept = kept_of(small, kind)
            if kept == sum(map(len, subject.units(kind))):
                return {"error": f"no error, but all {kept} {kind} are still there"}
            found = measure_accuracy(small, subject.test, Options())
    except Exception as error:  # whatever a peer raises is its answer
        return {"error": said(error)}
    finally:
        signal.alarm(0)
    return {
        "kept": kept,
        "accuracy": found.value,
        "interval": found.interval,
        "parameters": count_parameters(small),
        "seconds": round(time.perf_counter() - started, 1),
    }


def measure(path: Path, models: list[str], again: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"models": {}, "rows": []}
    if path.exists() and not again:
        found = json.loads(path.read_text())
    found["versions"] = {name: version(name) for name in PEERS}

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            row[k] for k in ("model", "kind", "tool", "method", "seed", "recovery", "keep")
        )

    done = {key(row) for row in found["rows"]}
    for name in models:
        subject = Subject.of(name)
        dense = measure_accuracy(subject.decoder, subject.test, Options())
        found["models"][name] = {
            "task": subject.task,
            "accuracy": dense.value,
            "interval": dense.interval,
            "examples": dense.total,
            "parameters": count_parameters(subject.decoder),
            "counts": {
                kind: {f"{share:.0%}": subject.count(kind, share) for share in SHARES}
                for kind in ("neurons", "heads")
            },
            "environment": {**environment(subject.decoder, 0), "commit": commit()},
        }
        for kind in ("neurons", "heads"):
            ways: list[tuple[dict[str, Any], Callable[[float], Decoder]]] = [
                (
                    {"tool": tool, "method": method, "seed": 0, "recovery": "none"},
                    lambda share, way=way: way(subject, share),  # noqa: B023
                )
                for tool, method, way in peer_ways(kind)
            ]
            ways += [
                ({"tool": "ours", "method": m, "seed": s, "recovery": r}, make)
                for m, s, r, make in our_rows(subject, kind)
            ]
            for about, make in ways:
                for share in SHARES:
                    row = {"model": name, "kind": kind, **about, "keep": f"{share:.0%}"}
                    if key(row) in done:
                        continue
                    stopped = [r for r in found["rows"] if hopeless(r, row)]
                    if stopped:
                        row |= {"error": stopped[0]["error"]}
                    else:
                        patience = 0 if row["tool"] == "ours" else PATIENCE
                        row |= measured(subject, kind, lambda: make(share), patience)  # noqa: B023
                    found["rows"].append(row)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    print(row, flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def hopeless(before: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the same package went on without an end for the same units of the same model."""
    same = all(before[name] == row[name] for name in ("model", "kind", "tool"))
    return same and before.get("error", "").startswith(TimeoutError.__name__)


# The table


def cell(rows: list[dict[str, Any]], wanted: int, best: float) -> str:
    """Accuracy, over seeds where there are some; how many units stay, where not those wanted."""
    if not rows:
        return ""
    if "error" in rows[0]:
        return "-"
    values = [row["accuracy"] for row in rows]
    mean = sum(values) / len(values)
    text = f"{mean:.1%}"
    text = f"**{text}**" if mean >= best - 1e-9 else text
    if len(values) > 1:
        text += f" ({100 * min(values):.1f}-{100 * max(values):.1f})"
    return text + (f" with {rows[0]['kept']:,}" if rows[0]["kept"] != wanted else "")


def table(found: dict[str, Any], names: Sequence[str]) -> str:
    """The Markdown: one table for each of these models and kind of unit."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [f"{versions}; `-`: it cannot, and says why below the table.", ""]
    for name in names:
        model = found["models"][name]
        for kind in ("neurons", "heads"):
            rows = [r for r in found["rows"] if (r["model"], r["kind"]) == (name, kind)]
            counts = model["counts"][kind]
            heads = [f"{share} ({count:,})" for share, count in counts.items()]
            lines += [
                f"{name[0].upper() + name[1:]}, {model['task']}, {kind} kept; dense "
                f"{model['accuracy']:.1%}, {model['examples']:,} examples:",
                "",
                "| way | removed units | " + " | ".join(heads) + " |",
                "|---|---|" + "---|" * len(heads),
            ]
            ways = list(dict.fromkeys((r["tool"], r["method"], r["recovery"]) for r in rows))
            cells = {
                (way, share): [
                    r
                    for r in rows
                    if (r["tool"], r["method"], r["recovery"]) == way and r["keep"] == share
                ]
                for way in ways
                for share in counts
            }
            means = {
                place: sum(r["accuracy"] for r in some) / len(some)
                for place, some in cells.items()
                if some and "error" not in some[0]
            }
            for way in ways:
                tool, method, recovery = way
                shown = [
                    cell(
                        cells[way, share],
                        count,
                        max((m for (_, s), m in means.items() if s == share), default=1.0),
                    )
                    for share, count in counts.items()
                ]
                label = NAMES[method] if tool == "ours" else f"{tool}: {method}"
                shown = ["-"] if set(shown) == {"-"} else shown
                if shown == ["-"] and tool != "ours":
                    continue
                done = {"none": "zero", "mean": "mean"}.get(recovery, recovery)
                lines.append(f"| {label} | {done} | " + " | ".join(shown) + " |")
            lines.append("")
            lines += refusals(rows)
    return "\n".join(lines).rstrip()


def refusals(rows: list[dict[str, Any]]) -> list[str]:
    """Which peers cannot do it and in which words, one line each."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            told.setdefault((row["tool"], row["error"]), []).append(
                f"{row['method']} {row['keep']}"
            )
    lines = [
        f"- {tool} ({len(ways)} of its ways and budgets): `{error}`"
        for (tool, error), ways in told.items()
    ]
    return [*lines, ""] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("reference model", "stories260K", "mathgpt-4l4h")
    parser.add_argument("--model", choices=names, action="append", help="only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="keep no earlier row")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-peers.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.out, given.model or list(names), given.again)
    known = [name for name in names if name in found["models"]]
    for some, beside in ((known[:1], ""), (known[1:], "-others")):
        path = given.out.with_name(f"{given.out.stem}{beside}.md")
        path.write_text(table(found, some) + "\n")
        print(table(found, some))


if __name__ == "__main__":
    main()
