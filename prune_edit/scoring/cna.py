"""Neuron scores: importance, and its change without the top head (CNA).

arXiv 2409.14144, section 4.1. Importance of neuron k at a position is
`log p(w | x + A + m_k fc2_k) - log p(w | x + A)`, both through the final norm with its scale
frozen at the value of the real final state, as in the authors' code. The logits are then linear in
the coefficient: with b the value vector through norm and unembedding, importance is
`m b_w - log E_p[exp(m b)]`, p the distribution of x + A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import capture, scale
from prune_edit.scoring.intervention import head_drops
from prune_edit.scoring.streaming import Options, stream
from prune_edit.tasks.prompts import Batch, Encoded
from prune_edit.units import Units

_BLOCK = 1 << 21  # numbers in one (positions, neurons, vocabulary) block


def importances(
    decoder: Decoder,
    batch: Batch,
    units: Units | None = None,
    frozen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of every neuron for every answer token, (A, L, N) in nats, NaN if absent.

    With `units`, of the model whose heads or neurons are scaled so. Also returns the final states
    (A, D) at which the norm was frozen; `frozen` gives those of another run, since the authors
    keep the original model's scale in the model without a head as well.
    """
    with scale(decoder, units or Units()), capture(decoder) as seen:
        decoder.final_states(**batch.inputs)
    places = (batch.rows, batch.columns)
    assert seen.final is not None
    final = seen.final[places] if frozen is None else frozen
    linear, divisor = decoder.frozen_norm(final)
    unembedding = decoder.unembedding.float()
    shift = decoder.norm_bias()
    constant = 0.0 if shift is None else unembedding @ shift
    found = torch.full((len(batch.targets), *decoder.neuron_shape), float("nan"))
    for layer, coefficients in seen.coefficients.items():
        base = (linear(seen.residual[layer][places]) / divisor) @ unembedding.T + constant  # (A, V)
        log_p = base.log_softmax(-1)
        block = linear(decoder.values(layer)) @ unembedding.T  # (n, V), the same for all prompts
        moved = coefficients[places].float() / divisor  # (A, n)
        found[:, layer, decoder.neuron_slots[layer]] = _gain(
            log_p, moved, block, batch.targets
        ).cpu()
    return found, final


def _gain(
    log_p: torch.Tensor, moved: torch.Tensor, block: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """`m b_w - log E_p[exp(m b)]`: (A, n) from (A, V), (A, n), (n, V), (A,)."""
    gains = torch.empty_like(moved)
    room = max(1, _BLOCK // block.numel())
    for start in range(0, len(targets), room):
        part = slice(start, start + room)
        shifted = torch.einsum("an,nv->anv", moved[part], block)
        direct = shifted.gather(-1, targets[part, None, None].expand(-1, len(block), 1))[..., 0]
        gains[part] = direct - shifted.add_(log_p[part, None]).logsumexp(-1)
    return gains


@torch.no_grad()
def score_importance(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention (L, H); neurons by mean importance (L, N)."""
    return _scores(decoder, prompts, options, contrast=False)


@torch.no_grad()
def score_cna(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads by intervention (L, H); neurons by what their importance loses without the top head(s).

    The top heads are each example's own: those whose ablation costs its answer most.
    """
    return _scores(decoder, prompts, options, contrast=True)


def _scores(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options, contrast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    tokens = 0
    for batch in stream(decoder, prompts, options, "heads and neurons"):
        drops = head_drops(decoder, batch, options)
        heads += drops.double().sum(0)
        if not options.neurons:
            neurons += torch.nan
            continue
        found, final = importances(decoder, batch)
        if contrast:
            flat = drops.flatten(1).nan_to_num(nan=-torch.inf)
            count = min(options.top_heads, int(flat.isfinite()[0].sum()))
            top = flat.topk(count, dim=1).indices  # (B, K)
            units = Units.without_heads(decoder.head_shape, top)
            found -= importances(decoder, batch, units, frozen=final)[0]
        neurons += found.double().sum(0)
        tokens += len(batch.targets)
    return (heads / len(prompts)).float(), (neurons / max(1, tokens)).float()
