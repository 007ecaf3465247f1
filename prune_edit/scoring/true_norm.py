"""Importance of neurons with the final norm as it is, not frozen.

`log p(w | norm(x + A + m_k fc2_k)) - log p(w | norm(x + A))`: arXiv 2409.14144, section 4.1, read
by the letter, where the norm's divisor follows each sum. A norm is a linear map and a divisor, so
the logits of all sums of a position are still one matrix product with the values' logits; only the
divisor differs from neuron to neuron. Where a norm stands between the FFN and the stream, a
neuron's share of what the block adds is taken with that norm's divisor as it is in the whole model
(`Captured.effective`): a share is no state of its own.
"""

from __future__ import annotations

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture, scale
from prune_edit.tasks.prompts import Batch
from prune_edit.units import Units

_BLOCK = 1 << 21  # numbers in one (positions, neurons, vocabulary) block


def true_importances(decoder: Decoder, batch: Batch, units: Units | None = None) -> torch.Tensor:
    """Importance of every neuron for every answer token, (A, L, N) in nats, NaN if absent.

    With `units`, of the model whose heads or neurons are scaled so.
    """
    with scale(decoder, units or Units()), capture(decoder) as seen:
        decoder.final_states(**batch.inputs)
    places = (batch.rows, batch.columns)
    unembedding = decoder.unembedding.float()
    found = torch.full((len(batch.targets), *decoder.neuron_shape), torch.nan)
    for layer in seen.coefficients:
        residual = seen.residual[layer][places].float()  # (A, D), x + A
        moved = seen.effective(layer)[places].float()  # (A, n)
        gains = _gains(decoder, layer, residual, moved, batch.targets, unembedding)
        found[:, layer, decoder.neuron_slots[layer]] = gains.cpu()
    return found


def _gains(
    decoder: Decoder,
    layer: int,
    residual: torch.Tensor,
    moved: torch.Tensor,
    targets: torch.Tensor,
    unembedding: torch.Tensor,
) -> torch.Tensor:
    """Importance of a layer's neurons (A, n) at x + A (A, D), for coefficients m (A, n)."""
    linear, divisor = decoder.frozen_norm(residual)
    bias = decoder.logit_constant()
    constant: torch.Tensor | float = 0.0 if bias is None else bias
    base = linear(residual) @ unembedding.T  # (A, V), before the division
    before = decoder.cap(base / divisor + constant).log_softmax(-1).gather(-1, targets[:, None])
    values = decoder.residual_values(layer).float()  # (n, D)
    gains = torch.empty_like(moved)
    widest = max(unembedding.shape)
    width = max(1, min(len(values), _BLOCK // widest))
    rows = max(1, _BLOCK // (width * widest))  # positions at a time
    for first in range(0, len(values), width):
        part = slice(first, first + width)
        block = linear(values[part]) @ unembedding.T  # (n, V), the same for all prompts
        for start in range(0, len(moved), rows):
            some = slice(start, start + rows)
            m = moved[some, part, None]  # (a, n, 1)
            sums = residual[some, None] + m * values[part]  # (a, n, D)
            logits = m * block + base[some, None]
            logits = decoder.cap(logits.div_(decoder.frozen_norm(sums)[1]).add_(constant))
            wanted = targets[some, None, None].expand(-1, m.shape[1], 1)
            new = logits.gather(-1, wanted)[..., 0] - logits.logsumexp(-1)
            gains[some, part] = new - before[some]
    return gains
