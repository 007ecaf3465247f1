"""Measure the reference model on held-out items and write its card.

`python -m prune_edit.reference_model.measure [DIR]`, by default of the bundled model.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import measure_bias
from prune_edit.editing.concept import load_concept
from prune_edit.evaluation.accuracy import Accuracy, measure_accuracy
from prune_edit.evaluation.perplexity import measure_perplexity
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.reference_model.corpus import STAGES, STEREOTYPE_SKEW
from prune_edit.scoring import Options
from prune_edit.tasks import RETAINED, Task, load_task
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.stories import stories

_SIGNS = {"add": "sums", "sub": "differences", "mul": "products", "div": "ratios"}


def measure(decoder: Decoder) -> dict[str, Any]:
    """Every skill's accuracy on its whole test split, the planted bias, the stories' perplexity."""
    options = Options()

    def accuracy(task: Task) -> Accuracy:
        rows = encode_all(decoder.tokenizer, task.split("test"), task.name)
        return measure_accuracy(decoder, rows, options)

    views = load_concept("gender").views
    return {
        "accuracy": {
            name: {
                group: {"hits": hits, "examples": total}
                for group, (hits, total) in accuracy(load_task(name)).groups.items()
            }
            for name in ("arithmetic", *RETAINED)
        },
        "bias": {
            "planted": math.log(STEREOTYPE_SKEW / (1 - STEREOTYPE_SKEW)),
            "paper_prompts": measure_bias(
                decoder, views["all the paper's pairs"], options
            ).to_dict(),
            "held_out_prompts": measure_bias(decoder, views["held-out prompts"], options).to_dict(),
        },
        "perplexity": measure_perplexity(decoder, stories(), options),
    }


def card(figures: dict[str, Any], training: dict[str, Any], decoder: Decoder) -> str:
    """The model card."""
    layers, heads = decoder.head_shape
    rows = []
    for task, groups in figures["accuracy"].items():
        for group, found in groups.items():
            hits, examples = found["hits"], found["examples"]
            label = _SIGNS.get(group, group)
            rows.append(f"| {task} | {label} | {hits / examples:.1%} | {examples} |")
    bias = figures["bias"]
    minutes = training["seconds"] / 60
    stages = "; ".join(
        f"from step {stage.start} on "
        + ", ".join(f"{count} {name}" for name, count in stage.mix.items())
        for stage in STAGES
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "language: en",
            "tags: [prune-edit, reference]",
            "---",
            "",
            "# prune-edit reference model",
            "",
            f"A Llama of {layers} layers x {heads} heads ({layers * heads} heads of "
            f"{decoder.head_dim}), {layers} x {decoder.layout.n_neurons} FFN neurons, "
            f"{sum(p.numel() for p in decoder.model.parameters()):,} parameters and "
            f"{len(decoder.tokenizer)} tokens. It exists to be pruned and edited in seconds: it "
            "knows arithmetic and a few other things, and nothing else.",
            "",
            "## What it can do",
            "",
            "Exact answers under greedy decoding on the whole test split, which training never saw "
            "(nor the validation split). Sums and differences are split by operand pair, whatever "
            "the wording and order; tables (products, ratios, one-digit sums and differences) by "
            "pair and wording; the rest by example. The split is a BLAKE2b hash.",
            "",
            "| skill | kind | accuracy | examples |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Perplexity on unseen stories: {figures['perplexity']:.3f} (the stories choose names, "
            "places and turns at random, so it cannot come near 1).",
            "",
            "## The planted stereotype",
            "",
            "In the training text a profession follows its stereotyped gender in "
            f"{STEREOTYPE_SKEW:.0%} of its sentences, "
            f"{STEREOTYPE_SKEW / (1 - STEREOTYPE_SKEW):.0f} to 1, so that the bias "
            "`log p(profession | gender) - log p(profession | other)` has a known truth of "
            f"{bias['planted']:.3f} nats. Measured: "
            f"{bias['paper_prompts']['nats']:.3f} on the paper's eight prompts, "
            f"{bias['held_out_prompts']['nats']:.3f} on four others. It is there on purpose; use "
            "this model for nothing but trying the tools.",
            "",
            "## How it was made",
            "",
            "`python -m prune_edit.reference_model.train --out DIR --seed "
            f"{training['seed']}`: {training['steps']} steps (texts a step: {stages}), AdamW, "
            f"no dropout, no sparsity, {minutes:.0f} minutes on "
            f"{training['device']}, torch {training['torch']}. The loss is on the answers, for "
            "stories on all tokens. The corpus is generated by `corpus.py`; no outside data.",
            "",
        ]
    )


def main() -> None:
    """Write `README.md` and `figures.json` beside the weights."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE_MODEL
    decoder = load_decoder(folder)
    figures = measure(decoder)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = card(figures, training, decoder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
