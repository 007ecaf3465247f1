"""Neuron importance and CNA scores, all and the best 500: `python benchmarks/scoring/neurons.py`.

The authors' way stands beside it, written anew from arXiv 2409.14144 and timed in the same run on a
few of the prompts: one prompt at a time, for every layer all sums x + A + m_k fc2_k through norm
and unembedding, and the log softmax of the (N, V) logits. Both ways must agree to 1e-4 first.

Models: a random Llama of 15M parameters, and the bundled reference model on random prompts. The
heads that CNA ablates are drawn; finding them is the heads' benchmark.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from prune_edit.decoder import Decoder
from prune_edit.loading import load_decoder
from prune_edit.scoring.contrast import trace_both
from prune_edit.scoring.importance import Traces, mean_importance, trace
from prune_edit.scoring.topk import Top, top_of
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

RESULTS = Path(__file__).parents[1] / "results"
TOKENS = 7


def random_llama(seed: int) -> Decoder:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
    )
    model: Any = LlamaForCausalLM(config).eval()
    return Decoder(model, None)  # type: ignore[arg-type]


def prompts(decoder: Decoder, count: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, len(decoder.unembedding), (count, TOKENS + 1), generator=generator)
    return [Encoded(tuple(row), TOKENS, Example(str(i), "")) for i, row in enumerate(ids.tolist())]


@torch.no_grad()
def authors(decoder: Decoder, row: Encoded, head: torch.Tensor | None) -> torch.Tensor:
    """Importance of one prompt, or its change without a head: (L, N)."""
    whole = trace(decoder, collate([row]))
    found = _authors(decoder, whole)
    if head is None:
        return found
    units = Units.without_heads(decoder.head_shape, head)
    return found - _authors(decoder, trace(decoder, collate([row]), units, frozen=whole.final))


def _authors(decoder: Decoder, seen: Traces) -> torch.Tensor:
    linear, divisor = decoder.frozen_norm(seen.final)
    token, unembedding, rows = seen.targets[0], decoder.unembedding, []
    for layer, coefficients in seen.coefficients.items():
        base = seen.residual[layer]  # (1, D)
        sums = base + coefficients[0, :, None] * decoder.residual_values(layer)  # (N, D)
        after = (linear(sums) / divisor @ unembedding.T).log_softmax(-1)[:, token]
        before = (linear(base) / divisor @ unembedding.T).log_softmax(-1)[:, token]
        rows.append(after - before)
    return torch.stack(rows)


def runs(decoder: Decoder, rows: list[Encoded], heads: torch.Tensor | None) -> list[Traces]:
    units = None if heads is None else Units.without_heads(decoder.head_shape, heads)
    return trace_both(decoder, collate(rows), units)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def matrix_rate() -> float:
    """Operations a second of this machine's float32 matrix product, at the kernel's shape."""
    a, b = torch.randn(768, 288), torch.randn(682, 288)
    best = min(timed(lambda: [a @ b.T for _ in range(10)])[0] for _ in range(10))
    return 10 * 2 * 768 * 288 * 682 / best


def counter() -> FlopCounterMode:
    """Counts matrix products, those added in place as well."""

    def added(into: Any, a: Any, b: Any, out_shape: Any = None, **rest: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


def floor(decoder: Decoder, count: int, models: int) -> tuple[float, float]:
    """Operations and bytes a prompt of all neurons, at the lowest degree, two: what must be done.

    The model on the prompt's tokens; each layer's logits and the mean row under them; the values'
    logits once for all prompts, and one moment. Weights are read once, logits written and read.
    """
    layers, width = decoder.neuron_shape
    tokens, size = decoder.unembedding.shape
    inner = sum(p.numel() for p in decoder.model.base_model.parameters()) - tokens * size
    each = 2.0 * inner * TOKENS + 4.0 * layers * tokens * size + 2.0 * layers * width * tokens
    shared = 2.0 * layers * width * tokens * size
    moved = 4.0 * (models * 2 * layers * tokens + (inner + 2 * layers * tokens * size) / count)
    return models * each + shared / count, moved


@torch.no_grad()
def measure(name: str, decoder: Decoder, options: argparse.Namespace) -> dict[str, Any]:
    rows = prompts(decoder, options.prompts, options.seed)
    layers, heads = decoder.head_shape
    drawn = torch.Generator().manual_seed(options.seed)
    ablated = torch.randint(layers * heads, (len(rows), 1), generator=drawn)
    k = min(options.k, decoder.neuron_shape[0] * decoder.neuron_shape[1] // 4)
    found: dict[str, Any] = {"model": name, "units": list(decoder.neuron_shape), "k": k}
    found["vocabulary"] = len(decoder.unembedding)
    for score, each in (("importance", None), ("cna", ablated)):
        some = rows[: options.baseline]
        part = None if each is None else each[: len(some)]
        want = torch.stack(
            [authors(decoder, row, None if part is None else part[i]) for i, row in enumerate(some)]
        ).mean(0)
        got = mean_importance(decoder, [runs(decoder, some, part)])
        difference = float((want - got).abs().max())
        if difference > 1e-4:
            raise SystemExit(f"{name}, {score}: the two ways differ by {difference:.1e}")

        def everything(each: torch.Tensor | None = each) -> torch.Tensor:
            return mean_importance(decoder, [runs(decoder, rows, each)])

        def best(each: torch.Tensor | None = each) -> Top:
            return top_of(runs(decoder, rows, each), decoder, k)

        times: dict[str, list[float]] = {"authors": [], "all": [], "top": []}
        rates = []
        full, top = everything(), best()  # warm-up
        order = full.flatten().argsort(descending=True, stable=True)[:k]
        chosen = top.indices[:, 0] * full.shape[1] + top.indices[:, 1]
        for turn in range(options.rounds):
            i = turn % len(some)
            head = None if each is None else each[i]
            seconds, _ = timed(lambda i=i, head=head: authors(decoder, rows[i], head))  # type: ignore[misc]
            times["authors"].append(seconds)
            rates.append(matrix_rate() / 1e9)
            times["all"].append(timed(everything)[0] / len(rows))
            times["top"].append(timed(best)[0] / len(rows))
        low, moved = floor(decoder, len(rows), 1 if each is None else 2)
        with counter() as done:
            everything()
        with counter() as done_top:
            best()
        median = {way: sorted(each)[len(each) // 2] for way, each in times.items()}
        found[score] = {
            "milliseconds_a_prompt": {way: 1e3 * each for way, each in median.items()},
            "faster": {way: median["authors"] / median[way] for way in ("all", "top")},
            "gflop_a_prompt": {
                "floor": low / 1e9,
                "all": done.get_total_flops() / len(rows) / 1e9,
                "top": done_top.get_total_flops() / len(rows) / 1e9,
            },
            "matrix_gflops": sorted(rates)[len(rates) // 2],
            "megabytes_a_prompt_floor": moved / 1e6,
            "largest_difference_from_authors": difference,
            "top_set_identical": set(chosen.tolist()) == set(order.tolist()),
            "top_evaluated": top.evaluated,
        }
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        f"Per prompt at {found['prompts']} prompts of {TOKENS} tokens, {found['threads']} threads; "
        f"the authors' way timed on {found['baseline_prompts']} of them. The matrix rate is "
        "measured between the rounds. The CNA floor counts both models in full; what the ablation "
        "did not change is skipped.",
        "",
        "| Model | Score | Way | ms | Faster | GFLOP (floor) | Of the matrix rate | Evaluated |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for model in found["models"]:
        for score in ("importance", "cna"):
            part = model[score]
            for way in ("authors", "all", "top"):
                took = part["milliseconds_a_prompt"][way]
                work = part["gflop_a_prompt"].get(way)
                low = part["gflop_a_prompt"]["floor"]
                cells = (
                    model["model"],
                    score,
                    {"authors": "authors'", "all": "all", "top": f"best {model['k']}"}[way],
                    f"{took:.2f}",
                    f"{part['faster'][way]:.0f}x" if way in part["faster"] else "",
                    f"{work:.2f}" + (f" ({low:.2f})" if way == "all" else "") if work else "",
                    f"{1e5 * work / part['matrix_gflops'] / took:.0f} %" if work else "",
                    f"{part['top_evaluated']:.1%}" if way == "top" else "",
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    run = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--k", type=int, default=500)
    parser.add_argument("--baseline", type=int, default=3, help="prompts of the authors' way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "scoring-neurons.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = (("random 15M", random_llama(options.seed)), ("bundled", load_decoder()))
    found = {
        "command": "python benchmarks/scoring/neurons.py",
        "prompts": options.prompts,
        "baseline_prompts": options.baseline,
        "seed": options.seed,
        "threads": options.threads,
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "models": [measure(name, decoder, options) for name, decoder in models],
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
