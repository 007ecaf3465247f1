"""Speed of the three forms beside the dense model: `python benchmarks/speed.py`.

A Llama of 134M random weights, 8 layers that keep 4 to 12 of 16 heads and 1,024 to 3,072 of 4,096
neurons, a half of each in all. Models run in turns, on one thread; a ratio is the median over the
turns of dense seconds to the form's in the same turn. It stands beside what counting says: the
ratio of FLOPs for prefill, of bytes read (weights, and keys and values) for decode. `odd` is the
ragged plan with widths that are no multiple of 16, as without `--align 16`.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/speed.py

`--add` measures what the other options name and leaves the other rows of the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from recovery import RESULTS, commit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache

from prune_edit import verbs
from prune_edit.caching import decode, prefill
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.evaluation.comparison import environment
from prune_edit.loading import REFERENCE_MODEL
from prune_edit.recover.shrink import shrink
from prune_edit.running import Running

D, LAYERS, HEADS, WIDTH, VOCABULARY = 1024, 8, 16, 4096, 4096
PROMPT, STEPS, POSITIONS = 32, 8, 128
KEPT_HEADS = (12, 4, 8, 10, 6, 8, 4, 12)
KEPT_WIDTHS = (1024, 3072, 2048, 1536, 2560, 2048, 3072, 1024)
ODD = (3, -3, 5, -5, 7, -7, 1, -1)  # added to the widths
ENGINES = ("llama.cpp f32", "llama.cpp f16", "eager", "compiled")
FORMS = ("dense", "masked", "uniform", "ragged", "odd")
_FOLLOWING = 16  # tokens that llama.cpp decodes after the first
Step = Callable[[], float]


def base() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL)
    return Decoder(LlamaForCausalLM(config).eval(), tokenizer)


def kept(odd: bool) -> tuple[Any, Any]:
    """Evenly spread units of every layer."""
    widths = [width + more * odd for width, more in zip(KEPT_WIDTHS, ODD, strict=True)]
    return (
        tuple(tuple(range(0, HEADS))[:count] for count in KEPT_HEADS),
        tuple(tuple(range(width)) for width in widths),
    )


def write_all(folder: Path) -> dict[str, Path]:
    """Every form as a checkpoint folder."""
    dense = base()
    found = {}
    for form in FORMS:
        model = dense
        if form != "dense":
            model = shrink(dense, *kept(form == "odd"), None, Running())
        found[form] = folder / form
        found[form].mkdir()
        write_checkpoint(
            found[form],
            {"dense": "masked", "odd": "ragged"}.get(form, form),
            model.family,
            model.model.config.to_dict(),
            model.model.state_dict(),
            model.layout,
            source_folder=REFERENCE_MODEL,
        )
    return found


def counted(model: Any, batch: int) -> dict[str, float]:
    """FLOPs of a prefill, and bytes that a decode step reads, for weights and cache in float32."""
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    slots = [layer.self_attn.q_proj.out_features for layer in model.model.layers]
    tied = VOCABULARY * D
    # Scores and values, of the causal half that sdpa computes in full; logits of the last place.
    flops = 2 * batch * (PROMPT * (weights + 2 * sum(slots) * PROMPT) + tied)
    cache = 2 * batch * sum(slots) * (PROMPT + STEPS // 2)
    return {"prefill": flops, "decode": 4 * (weights + tied + cache)}


def ids(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 600, (batch, PROMPT + STEPS), generator=generator)


def clocked(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


@torch.no_grad()
def steps(model: Any, batch: int, compiled: bool) -> dict[str, Step]:
    """Seconds of one prefill, and of one decode step (mean of STEPS), as functions."""
    tokens = ids(batch)

    def run_prefill() -> float:
        return clocked(lambda: prefill(model, tokens[:, :PROMPT], logits_to_keep=1))

    def run_decode() -> float:
        if compiled:
            cache: Any = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
            decode(model, tokens[:, :PROMPT], cache)
        else:
            _, cache = prefill(model, tokens[:, :PROMPT], logits_to_keep=1)
        forward = model.compiled_step if compiled else (lambda t, c: decode(model, t, c))
        start = time.perf_counter()
        for at in range(PROMPT, PROMPT + STEPS):
            forward(tokens[:, at : at + 1], cache)
        return (time.perf_counter() - start) / STEPS

    def run_compiled_prefill() -> float:
        return clocked(lambda: model.compiled_prefill(tokens[:, :PROMPT]))

    return {"prefill": run_compiled_prefill if compiled else run_prefill, "decode": run_decode}


@torch.no_grad()
def in_turns(runs: Mapping[str, Mapping[str, Step]], repeats: int) -> dict[str, Any]:
    """Median seconds of every form and act, and of the dense model's to its own in a turn."""
    times: dict[str, dict[str, list[float]]] = {
        form: {act: [] for act in acts} for form, acts in runs.items()
    }
    for turn in range(repeats + 1):
        for form, acts in runs.items():
            for act, step in acts.items():
                seconds = step()
                if turn:  # the first warms up
                    times[form][act].append(seconds)
    return {
        act: {
            form: {
                "seconds": median(times[form][act]),
                "speed_up": median(
                    a / b for a, b in zip(times["dense"][act], times[form][act], strict=True)
                ),
            }
            for form in times
        }
        for act in times["dense"]
    }


def llama_cpp(folders: Mapping[str, Path], kind: str, batch: int, repeats: int) -> dict[str, Any]:
    """The same by llama.cpp, so many prompts side by side: with one token, and with more."""
    import xllamacpp

    servers = {}
    for form, folder in folders.items():
        path = folder / f"{kind}.gguf"
        if not path.exists():
            verbs.export(folder, "gguf", path, type=kind)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = POSITIONS * batch, batch
        parameters.n_batch = parameters.n_ubatch = PROMPT * batch
        parameters.verbosity = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        servers[form] = xllamacpp.Server(parameters)

    def ask(form: str, tokens: int) -> float:
        prompts = ids(batch)[:, :PROMPT].tolist()
        return clocked(
            lambda: servers[form].handle_completions(
                {"prompt": prompts if batch > 1 else prompts[0], "n_predict": tokens,
                 "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
            )
        )  # fmt: skip

    last: dict[str, float] = {}

    def act_of(form: str, act: str) -> Step:
        def step() -> float:
            if act == "prefill":
                last[form] = ask(form, 1)
                return last[form]
            return (ask(form, 1 + _FOLLOWING) - last[form]) / _FOLLOWING

        return step

    runs = {form: {act: act_of(form, act) for act in ("prefill", "decode")} for form in servers}
    return in_turns(runs, repeats)


def table(result: dict[str, Any]) -> str:
    head = ["", "batch", *(form for form in FORMS if form != "dense")]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|" + "--:|" * (len(head) - 2)]
    for row in result["rows"]:
        for act, forms in row["measured"].items():
            cells = []
            for form in head[2:]:
                if form not in forms:
                    cells.append("-")
                    continue
                want = row["counted"]["dense"][act] / row["counted"][form][act]
                got = forms[form]["speed_up"]
                cells.append(f"{got:.2f} of {want:.2f} ({got / want:.0%})")
            lines.append(f"| {row['engine']}, {act} | {row['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--compiled", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--llama-cpp", nargs="*", default=["f32:1", "f16:1", "f32:8", "f32:32"])
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.add:
        rows = json.loads((RESULTS / "speed.json").read_text())["rows"]
    with tempfile.TemporaryDirectory() as name:
        folders = write_all(Path(name))
        from transformers import AutoModelForCausalLM

        models: dict[str, Any] = {
            form: AutoModelForCausalLM.from_pretrained(folder).eval()
            for form, folder in folders.items()
        }
        result = {
            "environment": {**environment(base(), 0), "commit": commit(), "threads": 1},
            "model": {
                form: {"parameters": sum(p.numel() for p in model.parameters())}
                for form, model in models.items()
            },
            "prompt_tokens": PROMPT,
            "decode_steps": STEPS,
            "rows": rows,
        }

        def keep(engine: str, batch: int, measured: dict[str, Any], size: float = 4) -> None:
            counts = {form: counted(model, batch) for form, model in models.items()}
            row = {"engine": engine, "batch": batch, "measured": measured, "counted": counts,
                   "commit": commit(), "load": os.getloadavg()}  # fmt: skip
            print(table({"rows": [row]}), flush=True)
            rows[:] = [old for old in rows if (old["engine"], old["batch"]) != (engine, batch)]
            rows.append(row)
            rows.sort(key=lambda one: (ENGINES.index(one["engine"]), one["batch"]))
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
            (RESULTS / "speed.md").write_text(table(result))

        for asked in options.llama_cpp:
            kind, _, batch = asked.partition(":")
            keep(f"llama.cpp {kind}", int(batch),
                 llama_cpp(folders, kind, int(batch), options.repeats))  # fmt: skip
            gc.collect()
        for batch in options.batches:
            runs = {form: steps(model, batch, compiled=False) for form, model in models.items()}
            keep("eager", batch, in_turns(runs, options.repeats))
        for batch in options.compiled:
            torch._dynamo.reset()
            runs = {}
            for form in ("dense", "uniform", "ragged", "odd"):
                model = models[form]
                model.compiled_step = torch.compile(
                    lambda tokens, cache, model=model: decode(model, tokens, cache).logits,
                    fullgraph=True,
                    dynamic=False,
                )
                model.compiled_prefill = torch.compile(
                    lambda tokens, model=model: model(tokens, use_cache=False, logits_to_keep=1),
                    fullgraph=True,
                    dynamic=False,
                )
                runs[form] = steps(model, batch, compiled=True)
            keep("compiled", batch, in_turns(runs, options.repeats))


if __name__ == "__main__":
    main()
