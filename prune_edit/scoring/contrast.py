"""Neuron scores: importance, and its change between two models or two inputs (CNA).

arXiv 2409.14144, section 4.1, table of scores (a) and (b). The change is

- against the model without each example's own top head(s), `options.top_heads` (the default), with
  the norm frozen at the whole model's states, as in the authors' code;
- of a tuned model against this one, `options.adapted`: what tuning gave a neuron to do;
- of the prompts against other prompts, `options.contrast`, in the same model.

In the latter two, each side's norm is frozen at its own final states, and the heads' score is the
change of theirs; elsewhere it is the intervention's. With `options.norm` "true", no norm is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, PlanError
from prune_edit.running import stream
from prune_edit.scoring.importance import mean_importance, trace_both
from prune_edit.scoring.intervention import head_drops, without_top_heads
from prune_edit.scoring.options import Options
from prune_edit.scoring.topk import score_top
from prune_edit.scoring.true_norm import true_importances
from prune_edit.tasks.prompts import Batch, Encoded
from prune_edit.units import Units


@torch.no_grad()
def score_importance(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention (L, H); neurons by mean importance (L, N).

    Raises PlanError for settings that do not go together.
    """
    if options.top_neurons:
        return score_top(decoder, prompts, options, contrast=False)
    heads, neurons = _means(decoder, prompts, options, without_top=False)
    return heads.float(), neurons.float()


@torch.no_grad()
def score_cna(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention or its change (L, H); neurons by the change of importance (L, N).

    Raises PlanError where prompts and contrast prompts are not pairs, ModelError where the adapted
    model is not this one tuned.
    """
    if options.top_neurons:
        return score_top(decoder, prompts, options, contrast=True)
    if options.adapted is None and not options.contrast:
        heads, neurons = _means(decoder, prompts, options, without_top=True)
        return heads.float(), neurons.float()
    (heads, neurons), (other_heads, other_neurons) = (
        _means(*side, without_top=False) for side in contrast_sides(decoder, prompts, options)
    )
    return (heads - other_heads).float(), (neurons - other_neurons).float()


def contrast_sides(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> list[tuple[Decoder, Sequence[Encoded], Options]]:
    """The two models or inputs that CNA compares, where it does not ablate. Raises as it."""
    plain = replace(options, adapted=None, contrast=())
    if options.adapted is not None:
        if options.adapted.layout != decoder.layout:
            raise ModelError(
                f"the adapted model {options.adapted.source!r} does not have the units of "
                f"{decoder.source!r}; tune the model that is scored"
            )
        return [(options.adapted, prompts, plain), (decoder, prompts, plain)]
    if len(options.contrast) != len(prompts):
        raise PlanError(
            f"{len(prompts)} prompts have {len(options.contrast)} contrast prompts; "
            "give one for each"
        )
    return [(decoder, prompts, plain), (decoder, options.contrast, plain)]


def _means(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, without_top: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean head drop over examples and mean importance, or its change, over answer tokens."""
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)

    def runs() -> Iterator[tuple[Batch, Units | None]]:
        for batch in stream(decoder, prompts, options, "heads and neurons"):
            drops = head_drops(decoder, batch, options)
            heads.add_(drops.double().sum(0))
            yield batch, without_top_heads(decoder, drops, options) if without_top else None

    if options.neurons:
        neurons = _mean(decoder, runs(), options)
    else:
        for _ in runs():
            pass
        neurons = torch.full(decoder.neuron_shape, torch.nan, dtype=torch.float64)
    return heads / len(prompts), neurons


@torch.no_grad()
def mean_importances(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, what: str = "neurons"
) -> torch.Tensor:
    """Mean importance over the answer tokens, (L, N) in nats, float64."""
    runs = ((batch, None) for batch in stream(decoder, prompts, options, what))
    return _mean(decoder, runs, options)


def _mean(
    decoder: Decoder, runs: Iterable[tuple[Batch, Units | None]], options: Options
) -> torch.Tensor:
    """Mean importance, less that with the units where there are some, (L, N) float64."""
    if options.norm != "true":
        return mean_importance(decoder, (trace_both(decoder, *run) for run in runs), options)
    total = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    tokens = 0
    for batch, units in runs:
        found = true_importances(decoder, batch)
        if units is not None:
            found -= true_importances(decoder, batch, units)
        total += found.double().sum(0)
        tokens += len(batch.targets)
    return total / max(1, tokens)
