"""Prune the bundled model for sums, step by step, then load and use the slim checkpoint.

Run it with `python examples/prune_for_arithmetic.py [OUT]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import prune_edit


def main(out: Path) -> None:
    # Task -> scores -> plan -> checkpoint -> evaluation, each a value or a file you can keep.
    scores = prune_edit.score(task="arithmetic/add", limit=32)
    plan = prune_edit.plan(scores, keep_heads="50%", keep_neurons="80%")
    print(f"keeping {plan.kept_heads} heads and {plan.kept_neurons} neurons")
    prune_edit.apply(None, plan, out, recover="mean", overwrite=True)
    evaluation = prune_edit.evaluate(out, "arithmetic/add", limit=100, speed=False)
    print(f"accuracy on sums it was not scored on: {evaluation.accuracy:.1%}")

    # Importing prune_edit is enough for transformers to load it without remote code.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("27+48=", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pruned-sums"))
