"""Neurons: what each adds to the answer, in two models, and what its value vector says.

arXiv 2409.14144, section 4: importance, its change between two models or inputs (CNA), the
coefficient in both, and the vocabulary projection of the value. The other model is, for each
prompt, this one without the head(s) that it needs most; or the model before it was tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.values import Shown, Tokens, best_of
from prune_edit.running import numbered
from prune_edit.scoring.contrast import contrast_sides
from prune_edit.scoring.importance import Traces, layer_importances, trace, trace_both
from prune_edit.scoring.intervention import head_drops, without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.scoring.projection import project
from prune_edit.tasks.prompts import Encoded, collate

_ABLATED = "without the top head"
_CONTRASTS = {"adapted": "before tuning", "contrast": "on the contrast prompts"}


@dataclass(frozen=True)
class NeuronRow(Shown):
    """A neuron (28_3696): importance and coefficient here and in the `other` model or input.

    Nats, means over answer tokens; `change` is the CNA score. `position` is the token at which all
    this is, where there is one prompt. `top` and `bottom` are the likeliest tokens of its value and
    of the value's opposite; a positive coefficient promotes the top ones, a negative one the bottom
    ones, `promotes` says which. `answer_rank` is the answer's place among the promoted, from 1.
    """

    kind: ClassVar[str] = "neuron"

    name: str
    layer: int
    neuron: int
    change: float
    importance: float
    importance_other: float
    coefficient: float
    coefficient_other: float
    position: str | None
    promotes: str
    top: Tokens
    bottom: Tokens
    answer_rank: int | None

    @property
    def promoted(self) -> Tokens:
        """The tokens that this neuron makes likelier as it is used here."""
        return self.top if self.promotes == "top" else self.bottom


@dataclass(frozen=True)
class Neurons(Shown):
    """The neurons of the highest change, best first, and in what they were compared.

    `changes` (L,) are the sums of all neurons' changes per layer, in nats; `means` has every
    neuron's numbers.
    """

    kind: ClassVar[str] = "neurons"

    other: str
    rows: tuple[NeuronRow, ...]
    changes: tuple[float, ...]
    means: Means = field(repr=False, compare=False, metadata={"json": False})


@dataclass(frozen=True)
class Means:
    """Means over answer tokens, (L, N) float64 each, NaN where absent; here and in the other."""

    importance: torch.Tensor
    importance_other: torch.Tensor
    coefficient: torch.Tensor
    coefficient_other: torch.Tensor

    @property
    def change(self) -> torch.Tensor:
        """The CNA score, (L, N)."""
        return self.importance - self.importance_other


@torch.no_grad()
def neuron_means(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    drops: torch.Tensor | None = None,
) -> Means:
    """Importance and coefficient of every neuron in both models. Raises as `score_cna`.

    `drops` (P, L, H) are what the answers lose without each head, where they are known.
    """
    sums = torch.zeros(4, *decoder.neuron_shape, dtype=torch.float64)
    absent = torch.ones(decoder.neuron_shape, dtype=torch.bool)
    tokens = 0
    for sides in _sides(decoder, prompts, options, drops):
        tokens += len(sides[0][1])
        for number, (side, traces) in enumerate(sides):
            for layer in traces.coefficients:
                slots = decoder.neuron_slots[layer]
                absent[layer, slots] = False
                gains = layer_importances(side, traces, layer).double().sum(0).cpu()
                sums[number, layer, slots] += gains
                used = traces.coefficients[layer].double().sum(0).cpu()
                sums[2 + number, layer, slots] += used
    return Means(*(sums / max(1, tokens)).masked_fill_(absent, torch.nan))


def explain_neurons(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    count: int = 10,
    drops: torch.Tensor | None = None,
) -> Neurons:
    """The `count` neurons whose importance falls most in the other model. Raises as `score_cna`.

    The other is the one without each prompt's `options.top_heads`; with `options.adapted`, the
    model before tuning, whose importance is then the `other`; with `options.contrast`, the input.
    `drops` are `neuron_means`'.
    """
    means = neuron_means(decoder, prompts, options, drops)
    said = options.adapted if options.adapted is not None else decoder
    one = prompts[0] if len(prompts) == 1 and len(prompts[0].answer) == 1 else None
    rows = tuple(
        describe(said, means, layer, neuron, one) for layer, neuron in best_of(means.change, count)
    )
    other = next((text for key, text in _CONTRASTS.items() if getattr(options, key)), _ABLATED)
    changes = tuple(means.change.nansum(1).tolist())
    return Neurons(other, rows, changes, means)


def describe(
    decoder: Decoder, means: Means, layer: int, neuron: int, row: Encoded | None = None
) -> NeuronRow:
    """All that is known of one neuron; `row` is the only prompt, of one answer token."""
    importance, other, coefficient, coefficient_other = (
        float(numbers[layer, neuron])
        for numbers in (
            means.importance,
            means.importance_other,
            means.coefficient,
            means.coefficient_other,
        )
    )
    slot = decoder.neuron_slots[layer].tolist().index(neuron)
    value = decoder.residual_values(layer)[slot]
    rank = None
    if row is not None:
        logits = decoder.unembedding.float() @ value.float()
        logits = -logits if coefficient < 0 else logits
        rank = 1 + int((logits > logits[row.answer[0]]).sum())
    return NeuronRow(
        name=f"{layer}_{neuron}",
        layer=layer,
        neuron=neuron,
        change=importance - other,
        importance=importance,
        importance_other=other,
        coefficient=coefficient,
        coefficient_other=coefficient_other,
        position=None if row is None else str(decoder.tokenizer.decode([row.ids[row.start - 1]])),
        promotes="bottom" if coefficient < 0 else "top",
        top=project(decoder, value),
        bottom=project(decoder, -value),
        answer_rank=rank,
    )


def _sides(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, known: torch.Tensor | None
) -> Iterator[tuple[tuple[Decoder, Traces], tuple[Decoder, Traces]]]:
    """Every batch's traces in both models."""
    if options.adapted is None and not options.contrast:
        for numbers, batch in numbered(decoder, prompts, options, "neurons"):
            drops = head_drops(decoder, batch, options) if known is None else known[numbers]
            whole, other = trace_both(decoder, batch, without_top_heads(decoder, drops, options))
            yield (decoder, whole), (decoder, other)
        return
    (one, rows, _), (two, others, _) = contrast_sides(decoder, prompts, options)
    for numbers, batch in numbered(one, rows, options, "neurons"):
        beside = collate([others[i] for i in numbers]).to(two.device)
        yield (one, trace(one, batch)), (two, trace(two, beside))
