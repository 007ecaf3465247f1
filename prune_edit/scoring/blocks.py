"""What the answer loses without many units at once: whole blocks, or all that a choice removes.

As for one unit (arXiv 2409.14144, section 3.2), with the units replaced together, by their means
over the prompts or by zero. Single scores do not say it: units make up for each other, or fail only
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import blend, head_factors, neuron_factors
from prune_edit.layout import Kept
from prune_edit.running import answer_log_probs, stream
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import Moments
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units


@torch.no_grad()
def worth_of(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    heads: Kept,
    neurons: Kept,
    means: Moments | None = None,
) -> float:
    """Mean log probability of the answer with these units alone, in nats.

    The others give their mean, or zero without `means`.
    """
    units = Units(_factors(heads, decoder.head_shape), _factors(neurons, decoder.neuron_shape))
    total = 0.0
    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            for part, projection, factors in (
                ("heads", decoder.attention_output(layer), head_factors(decoder, units, layer)),
                ("neurons", decoder.ffn_output(layer), neuron_factors(decoder, units, layer)),
            ):
                if projection is None or factors is None or bool(factors.all()):
                    continue
                constant: torch.Tensor | float = 0.0
                if means is not None:
                    constant = means.mean(part, layer).float().to(decoder.device)
                stack.enter_context(blend(projection, factors.to(decoder.device), constant))
        for batch in stream(decoder, prompts, options, "blocks"):
            states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
            total += float(answer_log_probs(decoder, states, batch.targets).double().sum())
    return total / len(prompts)


def block_worths(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Options,
    means: Moments | None = None,
) -> dict[tuple[int, int], float]:
    """`worth_of` the model without each block that is there: (layer, 0 attention or 1 FFN)."""
    have = decoder.layout.heads, decoder.layout.neurons
    found = {}
    for layer in range(decoder.n_layers):
        for part in (0, 1):
            if not have[part][layer]:
                continue
            left = [list(kept) for kept in have]
            left[part][layer] = ()
            kept = tuple(left[0]), tuple(left[1])
            found[layer, part] = worth_of(decoder, prompts, options, *kept, means)
    return found


def _factors(kept: Kept, shape: tuple[int, int]) -> torch.Tensor:
    """1 for kept units, 0 for others, (L, U)."""
    factors = torch.zeros(shape)
    for layer, units in enumerate(kept):
        factors[layer, list(units)] = 1.0
    return factors
