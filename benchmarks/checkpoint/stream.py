"""Surgery without loading the model: memory, and time beside `cp`, on a large synthetic model.

Writes a Llama of random bfloat16 weights in shards, keeps half of its heads and neurons with
`apply --recover none` in a process of its own, and copies the same files with `cp` on the same
disk. Caches are dropped before each where the system lets us (root). The copy's time is scaled to
as many bytes as were read and written: `cp` of x bytes reads x and writes x.

    python benchmarks/checkpoint/stream.py --gigabytes 10 --folder DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 4096, 14_336, 32, 8, 32_000
LAYER = 2 * (2 * HIDDEN**2 + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * FFN)
SHARD = 2_000_000_000


def peak() -> int:
    """Bytes that this process has had in memory at most, files mapped into it included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make(folder: Path, layers: int, seed: int) -> None:
    """The synthetic model, a tensor at a time."""
    import torch

    from prune_edit.checkpoint.store import write_tensors

    fields = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }  # fmt: skip
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN), "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    torch.manual_seed(seed)
    noise = (torch.randn(1 << 26) * 0.02).to(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, Any]]:
        for number, (name, shape) in enumerate(sorted(shapes.items())):
            count = int(torch.Size(shape).numel())
            there = noise.roll(number * 7919)  # other numbers in every tensor
            yield name, there.repeat(-(-count // len(there)))[:count].view(shape)

    folder.mkdir(parents=True)
    write_tensors(folder, tensors(), SHARD)
    (folder / "config.json").write_text(json.dumps(fields))


def child(source: Path, out: Path, layers: int) -> dict[str, Any]:
    """Apply a plan here, and say what that took."""
    bare, began = peak(), time.perf_counter()
    import prune_edit
    from prune_edit.checkpoint.source import open_source
    from prune_edit.checkpoint.store import sync
    from prune_edit.verbs import cut

    open_source(source)  # which imports the architecture's code, too
    imported, ready = peak(), time.perf_counter()
    found: dict[str, Any] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(folder: Path, *args: Any, **kwargs: Any) -> Any:
            start, used = time.perf_counter(), time.process_time()
            result = work(folder, *args, **kwargs)
            if name == "surgery":
                sync(folder)
            found[name] = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - used,
                "peak_bytes": peak(),
            }
            return result

        return run

    cut.LIMIT = 0  # a smaller model's logits would be compared in memory
    cut.write_pieces = timed("surgery", cut.write_pieces)
    cut.read_back = timed("read_back", cut.read_back)
    cut.verify_pieces = timed("sample", cut.verify_pieces)
    heads = tuple(tuple(range(layer % 2, HEADS, 2)) for layer in range(layers))
    # Scattered neurons, another half in every layer.
    neurons = tuple(
        tuple(n for n in range(FFN) if (n * 2_654_435_761 + layer * 40_503) >> 7 & 1)
        for layer in range(layers)
    )
    plan = prune_edit.Plan(heads, neurons, HEADS, FFN, model_digest=os.environ["DIGEST"])
    start, used = time.perf_counter(), time.process_time()
    prune_edit.apply(source, plan, out, recover="none", overwrite=True)
    end = time.perf_counter()
    return {
        **found,
        "bare_python_bytes": bare,
        "with_libraries_bytes": imported,
        "peak_bytes": peak(),
        "import_seconds": ready - began,
        "apply_seconds": end - start,
        "apply_cpu_seconds": time.process_time() - used,
        "whole_seconds": end - began,
    }


def drop_caches() -> bool:
    """Whether files are read from the disk again."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def session() -> str:
    """The priority of this session among others, where the system shares cores by session."""
    path = Path("/proc/self/autogroup")
    return path.read_text().strip().partition(" ")[2] if path.exists() else ""


def copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--folder", type=Path, required=True, help="an empty place on the disk")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, out = args.folder / "source", args.folder / "out"
    if args.child:
        print(json.dumps(child(source, out, args.child)))
        return
    layers = max(1, round((args.gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / LAYER))
    if not source.exists():
        make(source, layers, args.seed)
    from prune_edit.checkpoint.store import model_digest

    digest = model_digest(source)
    rounds = []
    for _ in range(args.rounds):
        cold = drop_caches()
        copied = copy(source, args.folder / "copy")
        drop_caches()
        ran = subprocess.run(
            [sys.executable, __file__, "--folder", str(args.folder), "--child", str(layers)],
            check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "DIGEST": digest},
        )  # fmt: skip
        rounds.append({"cp_seconds": copied, **json.loads(ran.stdout)})
    read, written = size(source), size(out)
    for found in rounds:
        rate = 2 * read / found["cp_seconds"]
        # `apply` reads what it wrote once more.
        moved = {"surgery": read + written, "apply": read + 2 * written}
        found["ratio_surgery"] = found["surgery"]["seconds"] / (moved["surgery"] / rate)
        found["ratio_apply"] = found["apply_seconds"] / (moved["apply"] / rate)
        found["ratio_apply_without_reading_back"] = found["apply_seconds"] / (
            moved["surgery"] / rate
        )
    report(args, layers, cold, read, written, rounds)


def report(
    args: argparse.Namespace, layers: int, cold: bool, read: int, written: int,
    rounds: list[dict[str, Any]],
) -> None:  # fmt: skip
    import safetensors
    import torch
    import transformers

    import prune_edit

    largest = 2 * VOCABULARY * HIDDEN
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    result = {
        "command": f"python benchmarks/checkpoint/stream.py --gigabytes {args.gigabytes:g}",
        "seed": args.seed,
        "layers": layers,
        "bytes_read": read,
        "bytes_written": written,
        "largest_tensor_bytes": largest,
        "caches_dropped": cold,
        "rounds": rounds,
        "environment": {
            "prune_edit": prune_edit.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__,
            "python": platform.python_version(), "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)), "niceness": os.nice(0), "session": session(),
            "load": os.getloadavg(), "commit": commit,
        },
    }  # fmt: skip
    (RESULTS / "checkpoint-stream.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"A Llama of {layers} layers, {read / 1e9:.1f} GB of bfloat16 in shards; half of its heads "
        f"and neurons stay, {written / 1e9:.1f} GB. {result['environment']['cores']} core(s), "
        f"load {os.getloadavg()[0]:.0f} with this, caches {'dropped' if cold else 'as they were'} "
        "before each. Beside `cp` of as many bytes as are read and written: surgery, the source "
        "once and the output once; apply, the output twice, for it is read back; and last, all of "
        "apply beside the bytes of surgery alone.",
        "",
        "| round | cp of the source | surgery | beside cp | apply, read back and verified | "
        "beside cp | beside cp of surgery's bytes | processor time | peak above bare Python | "
        "above Python and libraries |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for number, found in enumerate(rounds, 1):
        above = found["peak_bytes"] - found["bare_python_bytes"]
        over = found["peak_bytes"] - found["with_libraries_bytes"]
        cpu = found["apply_cpu_seconds"]
        lines.append(
            f"| {number} | {found['cp_seconds']:.1f} s | {found['surgery']['seconds']:.1f} s | "
            f"{found['ratio_surgery']:.2f} | {found['apply_seconds']:.1f} s | "
            f"{found['ratio_apply']:.2f} | {found['ratio_apply_without_reading_back']:.2f} | "
            f"{cpu:.1f} s | {above / 1e6:.0f} MB | {over / 1e6:.0f} MB |"
        )
    lines += ["", f"The largest tensor takes {largest / 1e6:.0f} MB."]
    (RESULTS / "checkpoint-stream.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
