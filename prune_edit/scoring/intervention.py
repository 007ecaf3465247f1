"""Score by intervention: what the answer loses when one unit is ablated.

arXiv 2409.14144, section 3.2. Exact: the model runs for every unit, but only from that unit's
layer on, since the layers below do not change. The heads of Llama-like models run as branches of
one lean pass with shared prefixes (`branches.py`); all other models, those that are hooked or
altered, and neurons, replay the model's own modules (`ablation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from prune_edit.decoder import Decoder
from prune_edit.replay import record
from prune_edit.running import silent, stream
from prune_edit.scoring import branches, lean
from prune_edit.scoring.ablation import ROOM, log_prob, unit_drops, without_each
from prune_edit.scoring.kernels import Workspace, workspace
from prune_edit.scoring.options import Options
from prune_edit.scoring.prefixes import Packing, Question, forest, pack, questions_of
from prune_edit.scoring.statistics import Moments, moments
from prune_edit.tasks.prompts import Batch, Encoded, batches, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

_ATTENTION_COST = 3  # of an operation in attention, where that of a large matrix product is 1


@torch.no_grad()
def score_intervention(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean drop per unit ablated, (L, H) and (L, N): nats, or share of right answers.

    The mean of mean ablation is over all tokens of the prompts, padding left out. Without
    `options.neurons`, which are by far the most work, theirs are NaN.
    """
    means = None
    if options.ablation == "mean":
        means = options.means or moments(decoder, prompts, options, "means")
    heads = all_head_drops(decoder, prompts, options, means).double().mean(0).float()
    neurons = torch.full(decoder.neuron_shape, torch.nan)
    if options.neurons:
        total = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
        for batch in stream(decoder, prompts, options, "neurons"):
            total += unit_drops(decoder, batch, options, "neurons", means).double().sum(0)
        neurons = (total / len(prompts)).float()
    return heads, neurons


@torch.no_grad()
def head_drops(decoder: Decoder, batch: Batch, options: Options) -> torch.Tensor:
    """Drop in every answer's summed log probability per head zeroed: (B, L, H), NaN if absent."""
    questions = questions_of(batch) if fast(decoder) else None
    plain = replace(options, measure="logprob")
    if questions is None:
        return unit_drops(decoder, batch, plain, "heads")
    # The caller counts the prompts of its batches.
    return branched_drops(decoder, questions, replace(plain, progress=silent))


def without_top_heads(decoder: Decoder, drops: torch.Tensor, options: Options) -> Units:
    """Each example's heads less those whose ablation costs its answer most; `drops` (B, L, H)."""
    flat = drops.flatten(1).nan_to_num(nan=-torch.inf)
    count = min(options.top_heads, int(flat.isfinite()[0].sum()))
    return Units.without_heads(decoder.head_shape, flat.topk(count, dim=1).indices)  # (B, K)


@torch.no_grad()
def all_head_drops(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, means: Moments | None = None
) -> torch.Tensor:
    """What each prompt's answer loses per head ablated, (P, L, H), by `options.measure`.

    Zero ablation without `means`. Prompts with a common prefix run together.
    """
    if fast(decoder):
        questions = [Question.of(row) for row in prompts]
        return branched_drops(decoder, questions, options, means)
    drops = torch.full((len(prompts), *decoder.head_shape), float("nan"))
    done = 0
    options.progress("heads", 0, len(prompts))
    for rows, batch in batches(prompts, options.batch_tokens):
        drops[rows] = unit_drops(decoder, batch.to(decoder.device), options, "heads", means)
        done += len(rows)
        options.progress("heads", done, len(prompts))
    return drops


# One lean pass

_EXACT: WeakKeyDictionary[object, bool] = WeakKeyDictionary()


def fast(decoder: Decoder) -> bool:
    """Whether the model can branch: by its make-up, and by figures the first time it is met."""
    if not lean.supported(decoder):
        return False
    if decoder.model not in _EXACT:
        _EXACT[decoder.model] = _agrees(decoder)
    return _EXACT[decoder.model]


def _agrees(decoder: Decoder) -> bool:
    """Whether both ways find the same for two short prompts and a head of three layers."""
    size = len(decoder.unembedding)
    ids = [(7 * i * i + 11 * i + 5) % size for i in range(8)]
    texts = (tuple(ids[:6]), (*ids[:3], *ids[6:]))
    prompts = [Encoded(text[: decoder.max_positions], 2, Example("", "")) for text in texts]
    have = [(layer, heads[0]) for layer, heads in enumerate(decoder.layout.heads) if heads]
    some = [have[i] for i in sorted({0, len(have) // 2, len(have) - 1})] if have else []
    got = _values(decoder, [Question.of(row) for row in prompts], [[0, 1]], 8, some)
    batch = collate(prompts).to(decoder.device)
    final, replay = record(decoder, batch.inputs)
    want = [log_prob(decoder, final[batch.rows, batch.columns], batch, 1)]
    for layer, head in some:
        slot = decoder.layout.slots[layer].index(head)
        place = torch.tensor([slot])
        want.append(without_each(replay, batch, "heads", layer, place, None, log_prob))
    expected = torch.cat(want, 1)
    error = (got - expected).abs()
    if decoder.model.dtype in (torch.float32, torch.float64):
        return bool(error.max() <= 1e-4)
    # Logits of 8 or 11 bits: unlikely tokens are off by much, but never by much of themselves.
    return bool((error <= 0.1 + 0.02 * expected.abs()).all())


def branched_drops(
    decoder: Decoder,
    questions: Sequence[Question],
    options: Options,
    means: Moments | None = None,
) -> torch.Tensor:
    """`all_head_drops` (P, L, H) by lean passes over windows of shared prefixes.

    Never more than 4 `batch_tokens` rows are in flight, or one prompt's rows twice.
    """
    every = [(layer, head) for layer, kept in enumerate(decoder.layout.heads) for head in kept]
    rank, count = options.share
    heads = every[rank::count]
    room = ROOM * options.batch_tokens
    packing = packing_of(decoder, questions, options)
    most = max(packing.width, min(branches.block_rows(decoder), room // (len(heads) + 1)))
    space = workspace(decoder)
    values = torch.zeros(len(questions), len(heads) + 1, dtype=torch.float64)
    done = 0
    options.progress("heads", 0, len(questions))
    for windows in packing.groups(most):
        step = max(1, room // (len(windows) * packing.width) - 1)
        members = [member for window in windows for member in window]
        for start in range(0, len(heads), step):
            some = heads[start : start + step]
            found = _values(
                decoder, questions, windows, packing.width, some, space, means, options.measure
            )[members]
            values[members, 0] = found[:, 0]
            values[members, 1 + start : 1 + start + len(some)] = found[:, 1:]
        done += len(members)
        options.progress("heads", done, len(questions))
    found = torch.zeros(len(questions), len(every))
    found[:, rank::count] = (values[:, :1] - values[:, 1:]).float()
    found = options.gather(found)
    drops = torch.full((len(questions), *decoder.head_shape), float("nan"))
    if every:
        layers, units = zip(*every, strict=True)
        drops[:, list(layers), list(units)] = found
    return drops


def packing_of(decoder: Decoder, questions: Sequence[Question], options: Options) -> Packing:
    """How the prompts are packed: a row's cost is that of a layer's matrix products."""
    attention = decoder.head_shape[1] * decoder.head_dim
    hidden = decoder.unembedding.shape[1]
    row = hidden * (4 * attention + 3 * decoder.neuron_shape[1])
    return pack(questions, row, _ATTENTION_COST * 2 * attention, options.batch_tokens)


def _values(
    decoder: Decoder,
    questions: Sequence[Question],
    windows: Sequence[Sequence[int]],
    width: int,
    heads: Sequence[branches.Head],
    space: Workspace | None = None,
    means: Moments | None = None,
    measure: str = "logprob",
) -> torch.Tensor:
    """What every example's answer is worth, (P, C + 1) float64, zero outside the windows."""
    trees = forest(questions, windows, width).to(decoder.device)
    by_layer = {} if means is None else {k: means.mean("heads", k) for k in means.heads.first}
    space = space or workspace(decoder)
    found = branches.answer_values(decoder, trees, heads, space, by_layer, measure)
    sums = torch.zeros(len(questions), len(heads) + 1, dtype=torch.float64)
    sums.index_add_(0, trees.owners.cpu(), found.cpu().T)
    return (sums == 0).double() if measure == "accuracy" else sums
