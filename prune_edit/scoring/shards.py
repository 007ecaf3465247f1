"""Shards: the fixed units of work a score is made of, whatever number of processes does them.

Prompts are put in the order of their tokens (which also keeps shared prefixes together) and cut
into shards; a shard is scored to its means, and the means are added in float64 in the order of the
shards. Nothing of this depends on how many processes there are, which one scores what, or where a
killed run left off, so that the sum is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded

Part = tuple[torch.Tensor, torch.Tensor]
"""A shard's heads (L, H) and neurons (L, N)."""
Weigh = Callable[[Sequence[Encoded]], int]

SHARD_EXAMPLES = 32  # at least, so that what a method does once a call stays small beside the rest
SHARD_SHARE = 16  # hidden size over examples: the neurons' image in the vocabulary is made once a
# shard, and costs as much as some hundreds of answer tokens of a large model
MOST_SHARDS = 64


def _examples(prompts: Sequence[Encoded]) -> int:
    return len(prompts)


def _answer_tokens(prompts: Sequence[Encoded]) -> int:
    return sum(len(row.answer) for row in prompts)


ADDITIVE: dict[str, tuple[Weigh, Weigh]] = {
    "cna": (_examples, _answer_tokens),
    "importance": (_examples, _answer_tokens),
    "intervention": (_examples, _examples),
    "taylor": (_examples, _examples),
}
"""Methods whose scores are plain means over prompts, and what heads and neurons are means over.

Any other is scored on all prompts at once: correct for whatever it computes. `query` traces the
neurons that are best over all prompts; `wanda` and `activation` are roots of means, `flap` has a
variance.
"""


def additive(method: str, options: Options) -> bool:
    """Whether the scores of all prompts are the weighted mean of the scores of parts of them."""
    # A mean ablation replaces a unit by its mean over all prompts; contrasts are pairs.
    whole = (method == "intervention" and options.ablation == "mean") or bool(options.contrast)
    return method in ADDITIVE and not whole


def shards_of(
    prompts: Sequence[Encoded], size: int | None = None, hidden: int = 0
) -> list[list[Encoded]]:
    """The prompts in shards of `size`.

    By default of 32, or more for a model of large `hidden` size or where that were over 64 shards.
    """
    ordered = sorted(prompts, key=_place)
    step = size or max(SHARD_EXAMPLES, hidden // SHARD_SHARE, -(-len(ordered) // MOST_SHARDS))
    return [ordered[start : start + step] for start in range(0, len(ordered), step)]


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
    """What the first `done` shards, of `size` examples (0: the usual), add up to.

    Float64 sums and how much they weigh.
    """

    heads: torch.Tensor
    neurons: torch.Tensor
    head_weight: int = 0
    neuron_weight: int = 0
    done: int = 0
    size: int = 0

    @classmethod
    def zeros(cls, heads: tuple[int, int], neurons: tuple[int, int], size: int = 0) -> Sums:
        """Before the first shard; (L, H) and (L, N)."""
        return cls(
            torch.zeros(heads, dtype=torch.float64),
            torch.zeros(neurons, dtype=torch.float64),
            size=size,
        )

    def add(self, method: str, shard: Sequence[Encoded], part: Part) -> None:
        """The next shard's means."""
        by_head, by_neuron = (weigh(shard) for weigh in ADDITIVE[method])
        self.heads += part[0].double().cpu() * by_head
        self.neurons += part[1].double().cpu() * by_neuron
        self.head_weight += by_head
        self.neuron_weight += by_neuron
        self.done += 1

    def means(self) -> Part:
        """Float32 scores over everything added."""
        heads, neurons = max(1, self.head_weight), max(1, self.neuron_weight)
        return (self.heads / heads).float(), (self.neurons / neurons).float()

    def counts(self) -> dict[str, int]:
        """All but the tensors, for a file's metadata."""
        fields: dict[str, Any] = vars(self)
        return {name: fields[name] for name in ("head_weight", "neuron_weight", "done", "size")}
