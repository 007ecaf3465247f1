"""What a 70B model costs on 8 GPUs, on paper: every head and neuron, from measured pieces.

Nobody ran this: it multiplies counted work by rates. A rate is measured on `--device` unless a flag
gives it, and each line says which. What is neither counted nor measured is listed as assumed.

    python benchmarks/scoring/seventy_b.py --device cuda
    python benchmarks/scoring/seventy_b.py --tflops 600 --gexps 2000 --bandwidth 3500 --disk 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rate:
    """Units of work a second, and where the number is from."""

    value: float
    origin: str


def seconds_of(work: Callable[[], object], device: str) -> float:
    """The shortest of five runs after one that does not count."""
    best = float("inf")
    for attempt in range(6):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(device: str) -> float:
    """Operations a second of a square matrix product, in the format scores are made in there."""
    fast = device.startswith("cuda")
    size, kind = (8192, torch.bfloat16) if fast else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    return float(2 * size**3 / seconds_of(lambda: a @ b, device))


def exponential_rate(device: str) -> float:
    """Numbers a second through m*b + log p and logsumexp, as importance takes them."""
    rows, vocabulary = (256, 128_256) if device.startswith("cuda") else (16, 32_000)
    block = torch.randn(rows, vocabulary, device=device)
    log_p = torch.randn(vocabulary, device=device).log_softmax(-1)
    moved = torch.rand(rows, 1, device=device)
    taken = seconds_of(lambda: torch.addcmul(log_p, moved, block).logsumexp(-1), device)
    return rows * vocabulary / taken


def copy_rate(device: str) -> float:
    """Bytes a second that memory gives, reading and writing counted."""
    numbers = torch.empty((1 << 30 if device.startswith("cuda") else 1 << 26) // 4, device=device)
    target = torch.empty_like(numbers)
    return 2 * numbers.numel() * 4 / seconds_of(lambda: target.copy_(numbers), device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (
        ("layers", 80), ("heads", 64), ("kv-heads", 8), ("hidden", 8192), ("ffn", 28_672),
        ("vocabulary", 128_256), ("prompts", 1600), ("tokens", 6), ("processes", 8),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="where the rates are measured")
    parser.add_argument("--tflops", type=float, help="10^12 matrix operations/s of one GPU")
    parser.add_argument("--gexps", type=float, help="10^9 exponentials/s of one GPU")
    parser.add_argument("--bandwidth", type=float, help="GB/s of one GPU's memory")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s of weights to one GPU")
    parser.add_argument("--exchange", type=float, default=1.0, help="GB/s between processes")
    parser.add_argument("--gpu-memory", type=float, default=141, help="GB of one GPU")
    parser.add_argument("--share", type=float, default=0.75, help="of the matrix rate, reached")
    return parser.parse_args()


def main() -> None:
    args = parse()
    L, H, D, N, V = args.layers, args.heads, args.hidden, args.ffn, args.vocabulary  # noqa: N806
    P, T, G = args.prompts, args.tokens, args.processes  # noqa: N806
    where = f"measured on {args.device}, torch {torch.__version__}"
    if args.device == "cpu":
        where += f", {torch.get_num_threads()} threads"

    def rate(given: float | None, unit: float, measure: Callable[[str], float]) -> Rate:
        return Rate(measure(args.device), where) if given is None else Rate(given * unit, "given")

    matmul = rate(args.tflops, 1e12, matmul_rate)
    exps = rate(args.gexps, 1e9, exponential_rate)
    memory = rate(args.bandwidth, 1e9, copy_rate)

    ffn = 3 * D * N
    attention = 2 * D * D + 2 * D * (D * args.kv_heads // H)
    layer = ffn + attention
    weights = 2 * (L * layer + 2 * V * D)
    # A copy starts behind its own layer's attention: that layer's FFN, then every layer above.
    copies = 2 * H * T * sum(ffn + (L - 1 - i) * layer for i in range(L))
    read_out = 2 * L * H * D * V  # every copy's logits, at the last position only
    heads = P * (copies + read_out)
    state = 2 * T * D * (L * H + 2)
    held = weights <= 0.8 * args.gpu_memory * 1e9  # as --device-map auto decides
    # A GPU that cannot hold the model reads it layer by layer, twice a shard, for as many prompts
    # as fit beside one layer, embedding and unembedding (once more in float32).
    room = args.gpu_memory * 1e9 - 2 * layer - 8 * V * D
    size = max(32, -(-P // 64)) if held else max(1, min(int(room / state), -(-P // G)))
    shards = -(-P // size)
    rounds = -(-shards // G)
    readings = 1 if held else 2 * rounds
    blocks = 2 * L * N * D * V
    pointwise = 2 * P * L * N * V  # with and without the top head
    exchanged = shards * 4 * (L * H + L * N)

    reached = args.share * matmul.value
    busy = shards / rounds  # processes that have a shard, on average
    times = {
        "heads": heads / (busy * reached),
        "neurons, value blocks": blocks * shards / (busy * reached),
        "neurons, exponentials": pointwise / (busy * exps.value),
        f"weights to the GPU, {readings} x": readings * weights / (args.disk * 1e9),
        "weights through memory, once a pass at least": 2 * rounds * weights / memory.value,
        "exchange of scores": exchanged * G / (args.exchange * 1e9),
    }
    print(f"shape: L {L}, H {H}, D {D}, N {N}, V {V}; {P} prompts of {T} tokens; {G} processes")
    print(f"weights {weights / 1e9:.0f} GB in bfloat16; states of one prompt {state / 1e9:.2f} GB")
    print("\nrates of one GPU")
    for name, found, unit in (
        ("matrix products", matmul, "operations"),
        ("exponentials", exps, "numbers"),
        ("memory", memory, "bytes"),
    ):
        print(f"  {name:<16} {found.value:.3g} {unit}/s ({found.origin})")
    print(f"  {'disk':<16} {args.disk * 1e9:.3g} bytes/s (given or default: assumed)")
    print(f"  {'exchange':<16} {args.exchange * 1e9:.3g} bytes/s (given or default: assumed)")
    print(f"\nheads: P (2 H T sum_l (3DN + (L-1-l)(3DN + attention)) + 2 L H D V) = {heads:.3g}")
    print(f"neurons: value blocks 2 L N D V = {blocks:.3g}, once a shard, {shards} shards")
    print(f"neurons: exponentials 2 P L N V = {pointwise:.3g} (with and without the top head)")
    print(
        f"\nthe model {'fits' if held else 'does not fit'} into {args.gpu_memory:g} GB: it is "
        f"{'held' if held else 'read a layer at a time'}"
    )
    print(
        f"{shards} shards of up to {size} prompts in {rounds} rounds, {busy:.1f} of {G} processes "
        f"busy; matrix products at {args.share:.0%} of their rate"
    )
    for name, seconds in times.items():
        print(f"  {name:<46} {seconds:12.1f} s")
    total = sum(times.values())
    print(f"  {'total, nothing overlapping':<46} {total:12.1f} s = {total / 3600:.2f} h")
    print(
        "\nassumed, not measured: every process reaches the share of the matrix rate;\n"
        "attention scores, norms and launches cost nothing; prompts share no prefix (sharing one\n"
        "makes the heads cheaper); the disk and exchange rates."
    )


if __name__ == "__main__":
    main()
