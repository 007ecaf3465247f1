"""Head score by intervention: what the answer loses when one head is zeroed.

arXiv 2409.14144, section 3.2. Exact: the model runs for every head, but only from that head's
layer on, since the layers below do not change. Llama-like models run as branches of one lean pass
with shared prefixes (`branches.py`); all others, and those that are hooked or altered, replay their
own modules with many heads in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import scale
from prune_edit.replay import Replay, record
from prune_edit.scoring import branches, lean
from prune_edit.scoring.kernels import Workspace, workspace
from prune_edit.scoring.prefixes import Packing, Question, forest, pack, questions_of
from prune_edit.scoring.streaming import Options, answer_log_probs, silent
from prune_edit.tasks.prompts import Batch, Encoded, batches, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units

_ROOM = 4  # branch rows in flight, in units of `batch_tokens`
_ATTENTION_COST = 3  # of an operation in attention, where that of a large matrix product is 1


@torch.no_grad()
def head_drops(decoder: Decoder, batch: Batch, options: Options) -> torch.Tensor:
    """Drop in every answer's summed log probability per head zeroed: (B, L, H), NaN if absent."""
    questions = questions_of(batch) if fast(decoder) else None
    if questions is None:
        return replayed_drops(decoder, batch, options)
    # The caller counts the prompts of its batches.
    return branched_drops(decoder, questions, replace(options, progress=silent))


@torch.no_grad()
def all_head_drops(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> torch.Tensor:
    """`head_drops` of all prompts (P, L, H), those with a common prefix together."""
    if fast(decoder):
        return branched_drops(decoder, [Question.of(row) for row in prompts], options)
    drops = torch.full((len(prompts), *decoder.head_shape), float("nan"))
    done = 0
    options.progress("heads", 0, len(prompts))
    for rows, batch in batches(prompts, options.batch_tokens):
        drops[rows] = replayed_drops(decoder, batch.to(decoder.device), options)
        done += len(rows)
        options.progress("heads", done, len(prompts))
    return drops


@torch.no_grad()
def score_heads(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> torch.Tensor:
    """Mean drop over the examples, (L, H) in nats."""
    return all_head_drops(decoder, prompts, options).double().mean(0).float()


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
    got = _sums(decoder, [Question.of(row) for row in prompts], [[0, 1]], 8, some)
    batch = collate(prompts).to(decoder.device)
    final, replay = record(decoder, batch.inputs)
    want = [_answer_sums(decoder, final, batch)]
    want += [_without_each(decoder, replay, batch, layer, [head])[:, 0] for layer, head in some]
    tolerance = 1e-4 if decoder.model.dtype in (torch.float32, torch.float64) else 0.3
    return bool((got - torch.stack(want, 1).cpu()).abs().max() <= tolerance)


def branched_drops(
    decoder: Decoder, questions: Sequence[Question], options: Options
) -> torch.Tensor:
    """`head_drops` (P, L, H) by lean passes over windows of shared prefixes.

    Never more than 4 `batch_tokens` rows are in flight, or one prompt's rows twice.
    """
    heads = [(layer, head) for layer, kept in enumerate(decoder.layout.heads) for head in kept]
    room = _ROOM * options.batch_tokens
    packing = packing_of(decoder, questions, options)
    most = max(packing.width, min(branches.block_rows(decoder), room // (len(heads) + 1)))
    space = workspace(decoder)
    sums = torch.zeros(len(questions), len(heads) + 1, dtype=torch.float64)
    done = 0
    options.progress("heads", 0, len(questions))
    for windows in packing.groups(most):
        step = max(1, room // (len(windows) * packing.width) - 1)
        members = [member for window in windows for member in window]
        for start in range(0, len(heads), step):
            some = heads[start : start + step]
            found = _sums(decoder, questions, windows, packing.width, some, space)[members]
            sums[members, 0] = found[:, 0]
            sums[members, 1 + start : 1 + start + len(some)] = found[:, 1:]
        done += len(members)
        options.progress("heads", done, len(questions))
    drops = torch.full((len(questions), *decoder.head_shape), float("nan"))
    if heads:
        layers, units = zip(*heads, strict=True)
        drops[:, list(layers), list(units)] = (sums[:, :1] - sums[:, 1:]).float()
    return drops


def packing_of(decoder: Decoder, questions: Sequence[Question], options: Options) -> Packing:
    """How the prompts are packed: a row's cost is that of a layer's matrix products."""
    attention = decoder.head_shape[1] * decoder.head_dim
    hidden = decoder.unembedding.shape[1]
    row = hidden * (4 * attention + 3 * decoder.neuron_shape[1])
    return pack(questions, row, _ATTENTION_COST * 2 * attention, options.batch_tokens)


def _sums(
    decoder: Decoder,
    questions: Sequence[Question],
    windows: Sequence[Sequence[int]],
    width: int,
    heads: Sequence[branches.Head],
    space: Workspace | None = None,
) -> torch.Tensor:
    """Every example's summed log probability, (P, C + 1), zero outside the windows."""
    trees = forest(questions, windows, width).to(decoder.device)
    found = branches.answer_sums(decoder, trees, heads, space or workspace(decoder))
    sums = torch.zeros(len(questions), len(heads) + 1, dtype=torch.float64)
    return sums.index_add_(0, trees.owners.cpu(), found.cpu().T)


# The model's own modules


def replayed_drops(decoder: Decoder, batch: Batch, options: Options) -> torch.Tensor:
    """`head_drops` of any model, hooks and all, by replaying its layers."""
    final, replay = record(decoder, batch.inputs)
    examples = batch.input_ids.shape[0]
    dense = _answer_sums(decoder, final, batch)
    drops = torch.full((examples, *decoder.head_shape), float("nan"))
    room = max(1, options.batch_tokens * _ROOM // batch.input_ids.numel())
    for layer, heads in enumerate(decoder.layout.heads):
        for start in range(0, len(heads), room):
            some = heads[start : start + room]
            without = _without_each(decoder, replay, batch, layer, some)
            drops[:, layer, list(some)] = (dense[:, None] - without).cpu()
    return drops


def _without_each(
    decoder: Decoder, replay: Replay, batch: Batch, layer: int, heads: Sequence[int]
) -> torch.Tensor:
    """The answers' log probability with each of a layer's heads zeroed, (B, len(heads))."""
    examples, copies = batch.input_ids.shape[0], len(heads)
    factors = torch.ones(copies, *decoder.head_shape)
    factors[torch.arange(copies), layer, list(heads)] = 0.0
    with scale(decoder, Units(heads=factors.repeat(examples, 1, 1))):
        states = replay.run(layer, copies)
    copy = torch.arange(copies, device=batch.rows.device)
    rows = (batch.rows[:, None] * copies + copy).flatten()
    columns, targets = (part.repeat_interleave(copies) for part in (batch.columns, batch.targets))
    found = answer_log_probs(decoder, states[rows, columns], targets)
    sums = torch.zeros(examples * copies, device=found.device).index_add_(0, rows, found)
    return sums.view(examples, copies)


def _answer_sums(decoder: Decoder, final: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Summed log probability of every example's answer, (B,)."""
    found = answer_log_probs(decoder, final[batch.rows, batch.columns], batch.targets)
    sums = torch.zeros(batch.input_ids.shape[0], device=found.device)
    return sums.index_add_(0, batch.rows, found)
