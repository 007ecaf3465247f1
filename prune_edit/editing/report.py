"""An edit and what it did: bias, what should not change, and chance beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import Bias, measure_bias
from prune_edit.editing.concept import Concept
from prune_edit.editing.suppress import scale_neurons
from prune_edit.evaluation.accuracy import Accuracy, measure_accuracy
from prune_edit.evaluation.perplexity import measure_perplexity
from prune_edit.layout import Kept
from prune_edit.planning import split_layers
from prune_edit.running import Running
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Task

RANDOM_DRAWS = 10
_EXAMPLES = 512


@dataclass(frozen=True)
class Side:
    """One model's figures: the bias, and what should stay."""

    train: Bias
    held_out: Bias
    tasks: dict[str, Accuracy | None]  # None where the model's vocabulary cannot write the task
    perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bias": {"train": self.train.to_dict(), "held_out": self.held_out.to_dict()},
            "tasks": {
                name: found and {"accuracy": found.value, "interval": list(found.interval)}
                for name, found in self.tasks.items()
            },
            "perplexity": self.perplexity,
        }


def measure_side(
    decoder: Decoder, concept: Concept, tasks: Sequence[Task], options: Running
) -> Side:
    """The bias on both sets of pairs, test accuracy of the tasks, perplexity of the stories."""
    from prune_edit.errors import TaskError

    found: dict[str, Accuracy | None] = {}
    for task in tasks:
        try:
            rows = encode_all(
                decoder.tokenizer,
                task.sample("test", _EXAMPLES),
                f"task {task.name!r}",
                decoder.max_positions,
            )
            found[task.name] = measure_accuracy(decoder, rows, options, task.name)
        except TaskError:
            found[task.name] = None
    return Side(
        measure_bias(decoder, concept.train, options),
        measure_bias(decoder, concept.held_out, options),
        found,
        measure_perplexity(decoder, None, options),
    )


def random_biases(
    decoder: Decoder, concept: Concept, count: int, factor: float, seed: int, options: Running
) -> list[tuple[float, float]]:
    """Train and held-out bias after the same edit of `count` random neurons, per draw."""
    generator = torch.Generator().manual_seed(seed)
    layers, width = decoder.neuron_shape
    present = torch.cat([slots + layer * width for layer, slots in enumerate(decoder.neuron_slots)])
    biases = []
    for draw in range(RANDOM_DRAWS):
        chosen = present[torch.randperm(len(present), generator=generator)[:count]]
        edited = scale_neurons(decoder, split_layers(chosen.tolist(), layers, width), factor)
        biases.append(
            (
                measure_bias(edited, concept.train, options).value,
                measure_bias(edited, concept.held_out, options).value,
            )
        )
        options.progress("random neurons", draw + 1, RANDOM_DRAWS)
    return biases


def top_neurons(scores: torch.Tensor, kept: Kept) -> list[dict[str, Any]]:
    """The edited neurons with their scores, highest first."""
    rows = [
        {"layer": layer, "neuron": unit, "score": float(scores[layer, unit])}
        for layer, units in enumerate(kept)
        for unit in units
    ]
    return sorted(rows, key=lambda row: -float(row["score"]))


def save(report: dict[str, Any], folder: Path) -> None:
    """Write `edit.json`."""
    (folder / "edit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def edit_card(report: dict[str, Any]) -> str:
    """The README.md of an edited checkpoint."""
    before, after = report["before"], report["after"]
    rows = [
        f"| bias, {label} pairs (nats) | {before['bias'][key]['nats']:.3f} "
        f"| {after['bias'][key]['nats']:.3f} | {min(chance):.3f} to {max(chance):.3f} |"
        for label, key in (("training", "train"), ("held-out", "held_out"))
        for chance in [report["random"][key]]
    ]
    for name, found in before["tasks"].items():
        if found is not None:
            now = after["tasks"][name]["accuracy"]
            rows.append(f"| {name} (accuracy) | {found['accuracy']:.1%} | {now:.1%} | |")
    if before["perplexity"] is not None:
        rows.append(
            f"| perplexity, plain text | {before['perplexity']:.3f} | {after['perplexity']:.3f} | |"
        )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"base_model: {json.dumps(report['model'])}",  # JSON's strings are YAML's
            "tags: [prune-edit, bias]",
            "---",
            "",
            f"# {report['model']}, edited: {report['concept']}",
            "",
            f"{len(report['neurons'])} of {report['of_neurons']} FFN neurons were scaled by "
            f"{report['scale']:g} with prune-edit {report['version']}. They were chosen by "
            "comparative neuron analysis on the training pairs only; `edit.json` lists them.",
            "",
            "| | before | after | 10 random choices |",
            "|---|---|---|---|",
            *rows,
            "",
            "The bias is the mean of log p(answer | stereotyped prompt) - log p(answer | contrast) "
            "over the pairs. The edit lowers this measure on these pairs; it says nothing of "
            "other biases or other text.",
            "",
            "Load it like the base model: the architecture is the same.",
            "",
        ]
    )
