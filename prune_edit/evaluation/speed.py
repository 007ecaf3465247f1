"""Speed: prefill and decode, timed after warming up, dense and pruned in turns.

Models that are compared run A B A B, so that a machine that slows down slows both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from prune_edit.caching import decode, prefill
from prune_edit.decoder import Decoder
from prune_edit.evaluation.cost import tensor_bytes
from prune_edit.running import Progress, silent

BATCH_SIZES = (1, 32)
_PROMPT, _STEPS = 32, 16
_WARM_UP, _LEAST, _MOST = 2, 5, 200  # repeats


@dataclass
class Run:
    """One model at one batch size: the times of its repeats, in seconds."""

    decoder: Decoder
    prompt: torch.Tensor  # (B, P)
    following: torch.Tensor  # (B, S), the tokens that the decode steps read
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @torch.no_grad()
    def repeat(self) -> None:
        """One prefill and S decode steps on its cache."""
        model: Any = self.decoder.model
        clock = self._clock()
        start = clock()
        _, cache = prefill(model, self.prompt, logits_to_keep=1)
        middle = clock()
        for step in range(self.following.shape[1]):
            decode(model, self.following[:, step : step + 1], cache)
        end = clock()
        self.prefill.append(middle - start)
        self.decode.append((end - middle) / self.following.shape[1])

    def _clock(self) -> Callable[[], float]:
        if self.decoder.device.type != "cuda":
            return time.perf_counter

        def after_the_device() -> float:
            torch.cuda.synchronize(self.decoder.device)
            return time.perf_counter()

        return after_the_device

    def result(self, peak: int) -> dict[str, Any]:
        """The medians, as tokens a second and seconds a call."""
        batch, tokens = self.prompt.shape
        prefill, decode = median(self.prefill), median(self.decode)
        return {
            "prefill": {"tokens_per_second": batch * tokens / prefill, "seconds": prefill},
            "decode": {"tokens_per_second": batch / decode, "seconds": decode},
            "repeats": len(self.prefill),
            "peak_memory_bytes": peak,
        }


def measure_speed(
    decoder: Decoder,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Speed of one model, about `seconds` a batch size; as `measure_speed_pair` gives it."""
    return _measure([decoder], batch_sizes, seconds, progress)[0]


def measure_speed_pair(
    dense: Decoder,
    pruned: Decoder,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speed of two models measured in turns, about `seconds` a model and batch size.

    Each result has `prompt_tokens`, `decode_steps` and, per batch size, `batch_1` and so on:
    `prefill` and `decode` with `tokens_per_second` and `seconds` (medians; a decode call is one
    step with KV cache), `repeats`, and `peak_memory_bytes`: the weights and the most that tensors
    beside them took, not the process as a whole.
    """
    first, second = _measure([dense, pruned], batch_sizes, seconds, progress)
    return first, second


def _measure(
    decoders: Sequence[Decoder], batch_sizes: Sequence[int], seconds: float, progress: Progress
) -> list[dict[str, Any]]:
    prompt, steps = lengths(decoders)
    results: list[dict[str, Any]] = [
        {"prompt_tokens": prompt, "decode_steps": steps} for _ in decoders
    ]
    for done, batch in enumerate(batch_sizes):
        progress("speed", done, len(batch_sizes))
        runs, peaks = run_in_turns(decoders, batch, seconds)
        for result, run, peak in zip(results, runs, peaks, strict=True):
            result[f"batch_{batch}"] = run.result(peak)
    progress("speed", len(batch_sizes), len(batch_sizes))
    return results


def run_in_turns(
    decoders: Sequence[Decoder], batch: int, seconds: float = 1.0
) -> tuple[list[Run], list[int]]:
    """The times of every model at one batch size, A B A B, and the peak bytes of each."""
    prompt, steps = lengths(decoders)
    runs = [Run(decoder, *tokens(decoder, batch, prompt, steps)) for decoder in decoders]
    for _ in range(_WARM_UP):
        for run in runs:
            run.repeat()
    peaks = [_peak_memory(run) for run in runs]
    for run in runs:
        run.prefill.clear()
        run.decode.clear()
    stop = time.perf_counter() + seconds * len(runs)
    for count in range(_MOST):
        if count >= _LEAST and time.perf_counter() > stop:
            break
        for run in runs:
            run.repeat()
    return runs, peaks


def lengths(decoders: Sequence[Decoder]) -> tuple[int, int]:
    """Prompt tokens and decode steps that fit every model's positions."""
    positions = min(decoder.max_positions or _PROMPT + _STEPS for decoder in decoders)
    steps = max(1, min(_STEPS, positions // 3))
    return max(1, min(_PROMPT, positions - steps)), steps


def tokens(
    decoder: Decoder, batch: int, prompt: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random tokens for every model of a vocabulary size: (B, P) and (B, S)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = decoder.unembedding.shape[0]
    ids = torch.randint(vocabulary, (batch, prompt + steps), generator=generator)
    ids = ids.to(decoder.device)
    return ids[:, :prompt], ids[:, prompt:]


def _peak_memory(run: Run) -> int:
    """Bytes of the weights and of the most that other tensors took during one repeat."""
    weights = tensor_bytes(run.decoder.model)
    if run.decoder.device.type == "cuda":
        torch.cuda.synchronize(run.decoder.device)
        before = torch.cuda.memory_allocated(run.decoder.device)
        torch.cuda.reset_peak_memory_stats(run.decoder.device)
        run.repeat()
        return weights + torch.cuda.max_memory_allocated(run.decoder.device) - before
    # A process never gives its peak back, so the allocator's own events are summed instead.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to the terminal
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.repeat()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return weights + most
