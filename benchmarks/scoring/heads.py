"""Head interventions against other ways to the same figures: `python benchmarks/scoring/heads.py`.

Every way zeroes each head's part of the attention output projection's input and reads the drop in
the answer's log probability. All must agree to 1e-3 before any is timed.

- authors' way: a deep copy of the model per head, columns zeroed, one prompt at a time; timed on
  a few prompts and scaled to all of them
- batched hooks: one pre-hook a head, all prompts in one batch, logits of the last position only
- TransformerLens and nnsight, where installed (`pip install prune-edit[bench]`): all prompts in
  one batch, one run a head, with the logits of all positions as they make them by default; for
  nnsight, which passes arguments on, also with those of the last position only

Prints a Markdown table and writes `benchmarks/results/scoring-heads.json`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune_edit.decoder import Decoder
from prune_edit.evaluation.comparison import environment
from prune_edit.loading import load_decoder
from prune_edit.scoring import Options
from prune_edit.scoring.intervention import all_head_drops, fast, packing_of
from prune_edit.scoring.prefixes import Question
from prune_edit.tasks import load_task
from prune_edit.tasks.prompts import Encoded, collate, encode_all
from prune_edit.tasks.task import Example

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PROMPTS, TOKENS, SEED = 64, 7, 0
Drops = Callable[[Decoder, list[Encoded]], torch.Tensor]


def random_llama() -> Decoder:
    """15M parameters, tied embeddings: 6 layers x 6 heads, hidden 288, FFN 768, V 32,000."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Decoder(LlamaForCausalLM(config).eval(), load_decoder().tokenizer)


def random_prompts(decoder: Decoder) -> list[Encoded]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, len(decoder.unembedding), (PROMPTS, TOKENS + 1), generator=generator)
    return [Encoded(tuple(row), TOKENS, Example("", "")) for row in ids.tolist()]


def arithmetic_prompts() -> list[Encoded]:
    """The paper's prompts in the reference model's tokens, up to the answer's first."""
    rows = load_task("arithmetic").sample("train", PROMPTS)
    encoded = encode_all(load_decoder().tokenizer, rows, "arithmetic")
    return [Encoded(row.ids[: row.start + 1], row.start, row.example) for row in encoded]


# The ways


def ours(decoder: Decoder, prompts: list[Encoded]) -> torch.Tensor:
    return all_head_drops(decoder, prompts, Options())


def units(decoder: Decoder) -> Iterator[tuple[int, int, slice]]:
    size = decoder.head_dim
    for layer in range(decoder.head_shape[0]):
        for head in range(decoder.head_shape[1]):
            yield layer, head, slice(head * size, (head + 1) * size)


def authors(decoder: Decoder, prompts: list[Encoded]) -> torch.Tensor:
    drops = torch.zeros(len(prompts), *decoder.head_shape)

    def log_prob(model: Any, row: Encoded) -> torch.Tensor:
        logits = model(torch.tensor([row.ids[:-1]])).logits[0, -1]
        return logits.softmax(-1)[row.ids[-1]].log()

    for i, row in enumerate(prompts):
        dense = log_prob(decoder.model, row)
        for layer, head, columns in units(decoder):
            changed = decoder.with_model(copy.deepcopy(decoder.model))
            projection: Any = changed.attention_output(layer)
            projection.weight[:, columns] = 0
            drops[i, layer, head] = dense - log_prob(changed.model, row)
    return drops


def last_log_probs(logits: torch.Tensor, prompts: list[Encoded]) -> torch.Tensor:
    targets = torch.tensor([row.ids[-1] for row in prompts])
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def batched_hooks(decoder: Decoder, prompts: list[Encoded]) -> torch.Tensor:
    inputs = collate(prompts, side="left").inputs
    drops = torch.zeros(len(prompts), *decoder.head_shape)

    def log_probs() -> torch.Tensor:
        logits = decoder.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return last_log_probs(logits, prompts)

    dense = log_probs()
    for layer, head, columns in units(decoder):

        def zero(module: Any, args: Any, columns: slice = columns) -> Any:
            changed = args[0].clone()
            changed[..., columns] = 0
            return (changed,)

        projection: Any = decoder.attention_output(layer)
        handle = projection.register_forward_pre_hook(zero)
        drops[:, layer, head] = dense - log_probs()
        handle.remove()
    return drops


def nnsight_way(decoder: Decoder, keep: int = 0) -> Drops:
    """With `keep` 1 the model is told to make logits of the last position only, with 0 of all."""
    from nnsight import NNsight

    wrapped = NNsight(copy.deepcopy(decoder.model))

    def drops_of(decoder: Decoder, prompts: list[Encoded]) -> torch.Tensor:
        inputs = collate(prompts, side="left").inputs | {"logits_to_keep": keep, "use_cache": False}
        drops = torch.zeros(len(prompts), *decoder.head_shape)
        with wrapped.trace(**inputs):
            logits = wrapped.lm_head.output[:, -1].save()
        dense = last_log_probs(logits, prompts)
        for layer, head, columns in units(decoder):
            with wrapped.trace(**inputs):
                wrapped.model.layers[layer].self_attn.o_proj.input[..., columns] = 0
                logits = wrapped.lm_head.output[:, -1].save()
            drops[:, layer, head] = dense - last_log_probs(logits, prompts)
        return drops

    return drops_of


def transformer_lens_way(decoder: Decoder) -> Drops:
    from transformer_lens.model_bridge import TransformerBridge

    model = copy.deepcopy(decoder.model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        decoder.tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=decoder.tokenizer, device="cpu"
        )

    def drops_of(decoder: Decoder, prompts: list[Encoded]) -> torch.Tensor:
        # It takes whole batches of tokens: prompts are padded on the right, and read at their end.
        batch = collate(prompts)
        drops = torch.zeros(len(prompts), *decoder.head_shape)

        def log_probs(hooks: list[Any]) -> torch.Tensor:
            logits = bridge.run_with_hooks(
                batch.input_ids, fwd_hooks=hooks, return_type="logits", prepend_bos=False
            )
            return last_log_probs(logits[batch.rows, batch.columns], prompts)

        dense = log_probs([])
        for layer, head, columns in units(decoder):

            def zero(
                value: torch.Tensor, hook: Any, head: int = head, columns: Any = columns
            ) -> Any:
                if value.dim() == 4:
                    value[:, :, head] = 0
                else:
                    value[..., columns] = 0
                return value

            found = log_probs([(f"blocks.{layer}.attn.hook_z", zero)])
            drops[:, layer, head] = dense - found
        return drops

    return drops_of


# The floor


def floor(decoder: Decoder, questions: list[Question]) -> float:
    """Operations of the least that branches from the layer, without any sharing, in GFLOP.

    Branches of layer l: its FFN, the layers between, keys and values of the last layer at every
    position; there queries, output and FFN, and the unembedding, where an answer is predicted.
    """
    n, heads = decoder.head_shape
    inner, width = heads * decoder.head_dim, decoder.neuron_shape[1]
    vocabulary, hidden = decoder.unembedding.shape
    keys = decoder.layout.n_kv_heads * decoder.head_dim
    queries, kv, ffn = 2 * hidden * inner, 4 * hidden * keys, 6 * hidden * width
    total = 0.0
    for question in questions:
        rows, asked = len(question.read), len(question.places)
        for layer in range(n):
            each = asked * (ffn + 2 * hidden * vocabulary)
            if layer < n - 1:
                middle = n - 2 - layer
                each += rows * (ffn + middle * (2 * queries + kv + ffn) + kv)
                each += asked * 2 * queries
            total += heads * each
    return total / 1e9


def product_rate(decoder: Decoder, rows: int) -> float:
    """GFLOP/s of the layers' matrix products at the size they have here, the best of several."""
    hidden, width = decoder.unembedding.shape[1], decoder.neuron_shape[1]
    inner = decoder.head_shape[1] * decoder.head_dim
    best = 0.0
    shapes = ((hidden, 3 * inner), (inner, hidden), (hidden, 2 * width), (width, hidden))
    operands = [(torch.randn(rows, a), torch.randn(b, a), torch.empty(rows, b)) for a, b in shapes]
    work = sum(2 * rows * a * b for a, b in shapes) / 1e9
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            for x, weight, out in operands:
                torch.mm(x, weight.T, out=out)
        best = max(best, 10 * work / (time.perf_counter() - started))
    return best


# Running


def seconds(way: Drops, decoder: Decoder, prompts: list[Encoded]) -> float:
    gc.collect()
    started = time.perf_counter()
    way(decoder, prompts)
    return time.perf_counter() - started


def measure(
    name: str, decoder: Decoder, prompts: list[Encoded], few: int, peers: bool, repeats: int
) -> Any:
    """All ways on one case, interleaved; seconds a prompt, the median of the repeats.

    Peers are timed in two of the rounds at most: they take most of the time.
    """
    assert fast(decoder), "the lean pass should take this model"
    ways: dict[str, Drops] = {"prune-edit": ours, "batched hooks": batched_hooks}
    own_ways = set(ways)
    makers: list[tuple[str, str, Callable[[Decoder], Drops]]] = [
        ("transformer-lens", "", transformer_lens_way),
        ("nnsight", "", nnsight_way),
        ("nnsight", ", last logits", partial(nnsight_way, keep=1)),
    ]
    for package, how, make in makers if peers else []:
        try:
            ways[f"{package} {version(package)}{how}"] = make(decoder)
        except ImportError:
            print(f"{package} is not installed: left out", file=sys.stderr)
    some = {"authors' way": authors}
    want = ours(decoder, prompts)
    errors = {}
    for way, call in (ways | some).items():
        part = prompts[:few] if way in some else prompts
        errors[way] = float((call(decoder, part) - want[: len(part)]).abs().max())
        if errors[way] > 1e-3:
            raise SystemExit(f"{name}: {way} differs by {errors[way]}")
    times: dict[str, list[float]] = {way: [] for way in ways | some}
    for i in range(repeats):
        for way, call in ways.items():
            if i > 1 and way not in own_ways:
                continue
            times[way].append(seconds(call, decoder, prompts) / len(prompts))
            if way == "prune-edit":  # the shortest: as often again
                times[way].append(seconds(call, decoder, prompts) / len(prompts))
    for way, call in some.items():
        times[way].append(seconds(call, decoder, prompts[:few]) / few)
    questions = [Question.of(row) for row in prompts]
    packing = packing_of(decoder, questions, Options())
    own = statistics.median(times["prune-edit"])
    rate, work = product_rate(decoder, 448), floor(decoder, questions) / len(prompts)
    return {
        "case": name,
        "prompts": len(prompts),
        "tokens": sum(len(q.read) for q in questions),
        "padded_tokens": len(questions) * max(len(q.read) for q in questions),
        "rows": packing.rows,
        "window": packing.width,
        "floor_gflop_per_prompt": round(work, 4),
        "product_gflops": round(rate, 1),
        "share_of_rate": round(work / own / rate, 3),
        "authors_timed_on": few,
        "ms_per_prompt": {way: round(statistics.median(t) * 1e3, 3) for way, t in times.items()},
        "samples_ms_per_prompt": {way: [round(x * 1e3, 3) for x in t] for way, t in times.items()},
        "times_faster": {w: round(statistics.median(t) / own, 2) for w, t in times.items()},
        "largest_difference": errors,
    }


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout.strip()


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def table(cases: list[Any]) -> str:
    names = list(dict.fromkeys(way for case in cases for way in case["ms_per_prompt"]))
    lines = [
        "| case | " + " | ".join(names) + " | share of matrix rate |",
        "|---" * (len(names) + 2) + "|",
    ]
    for case in cases:
        cells = []
        for way in names:
            if way in case["ms_per_prompt"]:
                ratio = "" if way == "prune-edit" else f" ({case['times_faster'][way]:.1f}x)"
                cells.append(f"{case['ms_per_prompt'][way]:.2f} ms{ratio}")
            else:
                cells.append("-")
        share = f"{case['share_of_rate']:.0%} of {case['product_gflops']:.0f} GFLOP/s"
        lines.append(f"| {case['case']} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared/models/stories260K")
    parser.add_argument("--out", type=Path, default=RESULTS / "scoring-heads.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    llama, reference = random_llama(), load_decoder()
    plan: list[tuple[str, Decoder, list[Encoded], int, bool]] = [
        ("random 15M, 7 random tokens", llama, random_prompts(llama), 3, True),
        ("random 15M, arithmetic prompts", llama, arithmetic_prompts(), 3, True),
        ("reference model, arithmetic prompts", reference, arithmetic_prompts(), 2, False),
    ]
    if given.stories.is_dir():
        stories = load_decoder(given.stories)
        plan.insert(1, ("stories260K, 7 random tokens", stories, random_prompts(stories), 4, True))
    with torch.no_grad():
        cases = []
        for case in plan:
            started = time.perf_counter()
            cases.append(measure(*case, repeats=given.repeats))
            took = time.perf_counter() - started
            print(f"{case[0]}: {cases[-1]['ms_per_prompt']} ({took:.0f} s)", file=sys.stderr)
            result = {
                "environment": environment(llama, SEED)
                | {"machine": machine(), "commit": commit()},
                "cases": cases,
            }
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(cases)
    given.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
