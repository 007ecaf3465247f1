"""The planted stereotype, cut by 18 and by more neurons: `python benchmarks/editing.py`.

Bias in nats before and after on the paper's prompts and on four held-out ones, beside the range of
ten random choices of as many neurons, factual gender and perplexity.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from recovery import RESULTS, commit

from prune_edit import load_decoder, verbs
from prune_edit.evaluation.comparison import environment

NEURONS = (18, 50)


def row(report: dict[str, Any]) -> str:
    before, after, chance = report["before"], report["after"], report["random"]

    def bias(side: dict[str, Any], pairs: str) -> float:
        return float(side["bias"][pairs]["nats"])

    cells = [str(len(report["neurons"]))]
    for pairs in ("train", "held_out"):
        change = 1 - bias(after, pairs) / bias(before, pairs)
        cells.append(
            f"{bias(before, pairs):.3f} -> {bias(after, pairs):.3f} ({-100 * change:+.0f} %)"
        )
        cells.append(f"{min(chance[pairs]):.3f} to {max(chance[pairs]):.3f}")
    factual = [side["tasks"]["factual-gender"]["accuracy"] for side in (before, after)]
    cells.append(f"{factual[0]:.1%} -> {factual[1]:.1%}")
    cells.append(f"{before['perplexity']:.3f} -> {after['perplexity']:.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for count in NEURONS:
            reports.append(verbs.edit(neurons=count, out=Path(folder) / str(count)))
            print(row(reports[-1]), flush=True)
    result = {
        "environment": {**environment(load_decoder(), 0), "commit": commit()},
        "reports": reports,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "editing.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "| neurons zeroed | bias, paper's prompts | by chance | bias, held-out prompts "
        "| by chance | factual gender | perplexity |",
        "|---|---|---|---|---|---|---|",
        *map(row, reports),
    ]
    (RESULTS / "editing.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
