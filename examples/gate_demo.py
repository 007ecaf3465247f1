"""Make a model that the gate passes and one that it blocks, and let it judge both.

Run it with `python examples/gate_demo.py [FOLDER]`; the reports are in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import prune_edit
from prune_edit.loading import REFERENCE_MODEL

RULES = Path(__file__).with_name("gate.toml")


def main(folder: Path) -> None:
    scores = prune_edit.score(task="arithmetic", limit=32)
    # A few neurons fewer: harmless. A quarter of the heads, untuned: not.
    for name, heads, neurons in (("passes", "all", "99%"), ("blocked", "25%", "all")):
        plan = prune_edit.plan(scores, keep_heads=heads, keep_neurons=neurons)
        model = folder / name
        prune_edit.apply(None, plan, model, recover="mean", overwrite=True)
        verdict = prune_edit.gate(
            model, RULES, against=REFERENCE_MODEL, out=folder / f"{name}-gate", overwrite=True
        )
        print(f"{name}: {verdict.verdict}, exit code {verdict.exit_code}")
        for judged in verdict.rules:
            print(f"  {judged.rule.name}: {judged.status}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "gate-demo"))
