"""Shards: the fixed units of work a score is made of, whatever number of processes does them.

Prompts are put in the order of their tokens (which also keeps shared prefixes together) and cut
into shards. A shard gives sums, which are added in float64 in the order of the shards; the scores
are what `finish` makes of the sums of all. Nothing of this depends on how many processes there are,
which one does what, or where a killed run left off, so that the scores are the same to the last
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded

Part = tuple[torch.Tensor, torch.Tensor]
"""Heads (L, H) and neurons (L, N)."""
Tensors = dict[str, torch.Tensor]
Score = Callable[[Decoder, Sequence[Encoded], Options], Part]
Weigh = Callable[[Sequence[Encoded]], int]

SHARD_EXAMPLES = 32  # at least, so that what a method does once a call stays small beside the rest
SHARD_SHARE = 16  # hidden size over examples: the neurons' image in the vocabulary is made once a
# shard, and costs as much as some hundreds of answer tokens of a large model
MOST_SHARDS = 64


@dataclass(frozen=True)
class Additive:
    """A score made of sums over prompts: `collect` gives a part's, `finish` the scores of all."""

    collect: Callable[[Decoder, Sequence[Encoded], Options], Tensors]
    finish: Callable[[Decoder, Tensors], Part]


def examples(prompts: Sequence[Encoded]) -> int:
    """How many prompts there are."""
    return len(prompts)


def answer_tokens(prompts: Sequence[Encoded]) -> int:
    """How many tokens their answers have."""
    return sum(len(row.answer) for row in prompts)


def weighed(score: Score, by_head: Weigh, by_neuron: Weigh) -> Additive:
    """A score that is a mean over prompts, heads and neurons by weights of their own."""

    def collect(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> Tensors:
        heads, neurons = score(decoder, prompts, options)
        weights = [torch.tensor(weigh(prompts)) for weigh in (by_head, by_neuron)]
        return {
            "heads": heads.double().cpu() * weights[0],
            "neurons": neurons.double().cpu() * weights[1],
            "head weight": weights[0],
            "neuron weight": weights[1],
        }

    def finish(decoder: Decoder, sums: Tensors) -> Part:
        heads, neurons = (
            (sums[f"{kind}s"] / sums[f"{kind} weight"].clamp(min=1)).float()
            for kind in ("head", "neuron")
        )
        return heads, neurons

    return Additive(collect, finish)


@dataclass(frozen=True)
class Shard:
    """Some prompts, and their contrasts where there are any."""

    prompts: list[Encoded]
    contrast: tuple[Encoded, ...] = ()

    def options(self, options: Options) -> Options:
        """The options for these prompts alone."""
        return replace(options, contrast=self.contrast) if options.contrast else options


def shards_of(
    prompts: Sequence[Encoded],
    options: Options,
    size: int | None = None,
    hidden: int = 0,
) -> list[Shard]:
    """The prompts in shards of `size`, each with its own of the options' contrasts.

    By default of 32, or more for a model of large `hidden` size or where that were over 64 shards.
    """
    whole, contrast = in_order(prompts, options)
    step = size or max(SHARD_EXAMPLES, hidden // SHARD_SHARE, -(-len(whole) // MOST_SHARDS))
    return [
        Shard(whole[start : start + step], contrast.contrast[start : start + step])
        for start in range(0, len(whole), step)
    ]


def in_order(prompts: Sequence[Encoded], options: Options) -> tuple[list[Encoded], Options]:
    """The prompts in the shards' order, and each one's contrast at the same place."""
    order = sorted(range(len(prompts)), key=lambda i: _place(prompts[i]))
    contrast = options.contrast
    if len(contrast) == len(prompts):
        contrast = tuple(contrast[i] for i in order)
    return [prompts[i] for i in order], replace(options, contrast=contrast)


def _place(row: Encoded) -> tuple[tuple[int, ...], int, float]:
    return row.ids, row.start, row.example.rank


@dataclass
class Sums:
    """What the first `done` shards, of `size` examples (0: the usual), add up to."""

    tensors: Tensors = field(default_factory=dict)
    done: int = 0
    size: int = 0

    def add(self, more: Tensors) -> None:
        """The next shard's sums."""
        for name, tensor in more.items():
            tensor = tensor.cpu() if tensor.dtype == torch.int64 else tensor.double().cpu()
            self.tensors[name] = self.tensors[name] + tensor if name in self.tensors else tensor
        self.done += 1

    def counts(self) -> dict[str, int]:
        """All but the tensors, for a file's metadata."""
        return {"done": self.done, "size": self.size}
