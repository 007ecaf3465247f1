"""Latency by unit: what a head, a KV group, a neuron and a whole block take, fitted to timings.

A few layers of the model, the others emptied, run a prompt and decode steps at batch 1 with fewer
and fewer heads, KV groups and neurons. All sizes run in turns, so that a machine that slows down
slows them alike; every turn's times are taken against the full size's in the same turn, and the
median over the turns counts. The costs are the least squares of

    difference = attention blocks gone * a + slots gone * s + groups gone * g
               + FFN blocks gone * f + neurons gone * n

without negative ones: a cost that would be negative is noise, left out, and the rest fitted again.
They are of one machine at one time; a plan made by them holds them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from prune_edit.costs import Costs
from prune_edit.decoder import Decoder
from prune_edit.evaluation.speed import Run, lengths, tokens
from prune_edit.layout import Kept
from prune_edit.recover.shrink import shrink
from prune_edit.running import Progress, Running, silent

_LAYERS = 4  # that are timed together
_LEAST, _MOST, _WARM_UP = 7, 100, 2  # turns
_SHARES = (0.0, 0.25, 0.5, 0.75)  # of the units that the smaller models keep

Features = tuple[int, int, int, int, int]
"""Attention blocks, slots, KV groups, FFN blocks and neurons of a model."""


def measure_latency(
    decoder: Decoder, *, seconds: float = 0.5, progress: Progress = silent
) -> Costs:
    """What units cost in seconds a call: a prompt of 32 tokens and 16 decode steps at batch 1.

    About `seconds` a size that is timed. All layers have the same costs. Raises
    UnsupportedFamilyError for a family that cannot be pruned.
    """
    models = [shrink(decoder, *kept, None, Running()) for kept in _sizes(decoder)]
    taken = _differences(models, seconds, progress)
    full = _features(models[0])
    rows = [[a - b for a, b in zip(full, _features(model), strict=True)] for model in models[1:]]
    attention, slot, group, ffn, neuron = _fit(rows, taken)
    layers, layout = decoder.n_layers, decoder.layout
    each = [(value,) * layers for value in (slot, group, neuron, attention, ffn)]
    return Costs("latency", layout.n_heads // layout.n_kv_heads, *each)


@dataclass(frozen=True)
class _Layer:
    """A layer that is timed: its heads by KV group, and its neurons."""

    groups: list[list[int]]
    neurons: tuple[int, ...]

    def heads(self, groups: float, each: float) -> tuple[int, ...]:
        """The first share of its KV groups, the first share of each one's heads."""
        some = self.groups[: _some(len(self.groups), groups)]
        return tuple(head for heads in some for head in heads[: _some(len(heads), each)])


def _some(total: int, share: float) -> int:
    """So many of a total: some where the share is not 0."""
    return 0 if share == 0 else max(1, round(share * total))


def _sizes(decoder: Decoder) -> list[tuple[Kept, Kept]]:
    """The units of the models that are timed, the largest first."""
    layout = decoder.layout
    group = layout.n_heads // layout.n_kv_heads
    # The largest layers of a model that was pruned before.
    order = sorted(
        range(decoder.n_layers),
        key=lambda layer: (-len(layout.heads[layer]), -len(layout.neurons[layer]), layer),
    )
    layers = {
        layer: _Layer(
            [[h for h in layout.heads[layer] if h // group == kv] for kv in layout.kv_heads[layer]],
            layout.neurons[layer],
        )
        for layer in order[:_LAYERS]
    }

    def kept(groups: float = 1.0, each: float = 1.0, neurons: float = 1.0) -> tuple[Kept, Kept]:
        heads, ffn = [], []
        for number in range(decoder.n_layers):
            layer = layers.get(number, _Layer([], ()))
            heads.append(layer.heads(groups, each))
            if number == order[0] and not heads[-1]:
                heads[-1] = tuple(layer.groups[0][:1])  # a model needs one head
            ffn.append(layer.neurons[: _some(len(layer.neurons), neurons)])
        return tuple(heads), tuple(ffn)

    found = [kept(), *(kept(groups=share) for share in _SHARES)]
    if group > 1:
        found += [kept(each=share) for share in _SHARES[1:]]
    found += [kept(neurons=share) for share in _SHARES]
    return list(dict.fromkeys(found))


def _features(decoder: Decoder) -> Features:
    layout = decoder.layout
    return (
        sum(map(bool, layout.heads)),
        sum(map(len, layout.slots)),
        sum(map(len, layout.kv_heads)),
        sum(map(bool, layout.neurons)),
        sum(map(len, layout.neurons)),
    )


def _differences(models: list[Decoder], seconds: float, progress: Progress) -> list[float]:
    """Seconds that every model but the first takes less than the first: medians over turns."""
    prompt, steps = lengths(models)
    runs = [Run(model, *tokens(model, 1, prompt, steps)) for model in models]
    stop = time.perf_counter() + seconds * len(runs)
    for turn in range(_WARM_UP + _MOST):
        if turn == _WARM_UP:
            for run in runs:
                run.prefill.clear()
                run.decode.clear()
        if turn >= _WARM_UP + _LEAST and time.perf_counter() > stop:
            break
        progress("latency", turn, _WARM_UP + _MOST)
        for run in runs:
            run.repeat()
    progress("latency", _WARM_UP + _MOST, _WARM_UP + _MOST)
    times = [
        [first + steps * step for first, step in zip(run.prefill, run.decode, strict=True)]
        for run in runs
    ]
    whole, *others = times
    return [median(a - b for a, b in zip(whole, other, strict=True)) for other in others]


def _fit(rows: list[list[int]], taken: list[float]) -> list[float]:
    """The least squares without negative costs; of two that always go together, the first."""
    features = torch.tensor(rows, dtype=torch.float64)
    target = torch.tensor(taken, dtype=torch.float64)
    columns = [
        column
        for column in range(features.shape[1])
        if features[:, column].any()
        and not any(torch.equal(features[:, column], features[:, other]) for other in range(column))
    ]
    found = [0.0] * features.shape[1]
    while columns:
        scale = features[:, columns].norm(dim=0)
        solved = torch.linalg.lstsq(
            features[:, columns] / scale, target[:, None], driver="gelsd"
        ).solution[:, 0]
        worst = int(solved.argmin())
        if solved[worst] >= 0:
            for column, value in zip(columns, (solved / scale).tolist(), strict=True):
                found[column] = value
            break
        del columns[worst]
    return found
