"""LoRA on one attention layer at a time: where an adapter helps, and which neurons it wakes.

Section 5 of arXiv 2409.14144 (table 10), on the bundled model: it does not know the wording
`17 25 sum is`, though it can add, and each adapter is to teach it that from one layer. Run it with
`python examples/lora_by_layer.py [FOLDER] [STEPS] [LAYER ...]`; FOLDER gets the adapters, which
`prune-edit explain lora --adapter FOLDER/layer-0` explains, and `lora_by_layer.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import prune_edit
from prune_edit import Example, Task
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.explain import explain_lora
from prune_edit.recover.adapters import Adapter
from prune_edit.recover.tuning import ADAPTER, Tuning, tune
from prune_edit.samples import Samples
from prune_edit.scoring import Options, load_adapter

BELOW = 30  # operands
CASES = 32  # prompts that the explanation looks at


class Kept:
    """What a tuning keeps, in memory: of all of it we want the adapter."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Mapping[str, torch.Tensor], Mapping[str, str]]] = {}

    def save_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, str] | None = None,
    ) -> None:
        self.found[name] = (tensors, about or {})

    def load_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        return None


def task() -> Task:
    """Sums in a wording of their own; both orders of a pair fall into one split."""
    return Task(
        "a b sum",
        tuple(
            Example(f"{a} {b} sum is", f"{a + b}", key=f"{min(a, b)} {max(a, b)}")
            for a in range(BELOW)
            for b in range(BELOW)
        ),
    )


def main(folder: Path, steps: int, layers: list[int]) -> None:
    decoder = prune_edit.load_decoder()
    options = Options()
    data = Samples(task(), decoder, None)
    train, test = data.train(), data.encoded("test", None)
    before = measure_accuracy(decoder, test, options).value
    print(f"untuned: {before:.1%} of {len(test)} test sums")
    print("layer  accuracy  coefficients of the top 10, 20, 30, 50 neurons grow by (base's choice)")
    rows = []
    for layer in layers or range(decoder.n_layers):
        kept = Kept()
        tuning = Tuning(
            steps=steps,
            kind="lora",
            layers=(layer,),
            modules="attention",
            rank=8,
            batch=64,
            learning_rate=5e-3,
            loss="cross-entropy",
        )
        tune(decoder, train, tuning, options, keeper=kept)
        tensors, about = kept.found[f"tuning{ADAPTER}"]
        place = folder / f"layer-{layer}"
        folder.mkdir(parents=True, exist_ok=True)
        Adapter(tensors, about["config"], about["base"], about["merged"]).write(place)
        adapted = load_adapter(decoder, place)
        accuracy = measure_accuracy(adapted, test, options).value
        found = explain_lora(decoder, adapted, test[:CASES], options)
        growth = "  ".join(
            f"{each.by_change:+.0%} ({each.by_importance:+.0%})" for each in found.amplification
        )
        print(f"{layer:>5}  {accuracy:>8.1%}  {growth}", flush=True)
        rows.append({"layer": layer, "accuracy": accuracy, "explained": found.to_dict()})
    result = {"untuned": before, "test": len(test), "steps": steps, "layers": rows}
    (folder / "lora_by_layer.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "lora-by-layer"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 60,
        [int(layer) for layer in sys.argv[3:]],
    )
