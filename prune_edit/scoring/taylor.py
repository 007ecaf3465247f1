"""First-order size of an ablation: attribution patching towards zero, for all units at once.

With a gate g on every unit, g = 1 in the model as it is and 0 where ablated, the change of the
answer's worth when one unit is zeroed is about its derivative by that gate,
`d / d g = sum_t v_t . d / d v_t`, v_t the unit's output at token t (arXiv 2310.10348, eq. 1, as
attribution patching; arXiv 1906.10771, eq. 8, for pruning). One backward pass gives it for every
head and neuron. The score is the mean of its *size* over the examples, as arXiv 1905.10650, eq. 2,
ranks heads: where the model is sure, single derivatives are small and of either sign, and their
plain mean is noise. Saturated units stay underrated: a unit that must be turned down by half before
the answer suffers has no derivative. By log-odds, `log p / (1 - p)`, they are less so.

With `integrated_steps` n > 1 the derivative is averaged over the path on which all gates of a kind,
heads or neurons, rise together from 0 to 1 (integrated gradients, arXiv 1703.01365, with the
other kind whole), by Gauss-Legendre quadrature of n points, and then over the examples, signed. The
scores of a kind then sum to what the answer loses when all of it is ablated, exactly in the limit
of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import scale
from prune_edit.running import answer_log_probs, stream
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Batch, Encoded
from prune_edit.units import Units


def score_taylor(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean estimated effect on the answer's log probability or log-odds: (L, H) and (L, N)."""
    shapes = {"heads": decoder.head_shape, "neurons": decoder.neuron_shape}
    totals = {part: torch.zeros(shape, dtype=torch.float64) for part, shape in shapes.items()}
    wanted = ("heads", "neurons") if options.neurons else ("heads",)
    for batch in stream(decoder, prompts, options, "gradients"):
        if options.integrated_steps == 1:  # at the model as it is, both kinds in one pass
            found = _derivatives(decoder, batch, wanted, 1.0, options)
            for part in wanted:
                totals[part] += found[part].abs().sum(0)
            continue
        for part in wanted:
            for at, weight in _quadrature(options.integrated_steps):
                found = _derivatives(decoder, batch, (part,), at, options)
                totals[part] += weight * found[part].sum(0)
    heads, neurons = ((total / len(prompts)).float() for total in totals.values())
    if not options.neurons:
        neurons.fill_(torch.nan)
    return mark_absent(decoder, heads, neurons)


def _derivatives(
    decoder: Decoder, batch: Batch, parts: Sequence[str], at: float, options: Options
) -> dict[str, torch.Tensor]:
    """Derivative of each example's answer by each of its gates, all at `at`: (B, L, U), float64."""
    shapes = {"heads": decoder.head_shape, "neurons": decoder.neuron_shape}
    examples = len(batch.input_ids)
    with torch.enable_grad():
        gates = {
            part: torch.full((examples, *shapes[part]), at, requires_grad=True) for part in parts
        }
        with scale(decoder, Units(**gates)):
            states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        worth = _log_odds if options.measure == "logodds" else answer_log_probs
        # Examples do not touch each other, so the sum's derivatives are each example's own.
        total = worth(decoder, states, batch.targets).sum()
        # The parameters' own gradients are neither asked for nor computed.
        slopes = torch.autograd.grad(total, list(gates.values()))
    return {part: slope.double().cpu() for part, slope in zip(parts, slopes, strict=True)}


def _log_odds(decoder: Decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`log p / (1 - p)` of each target (A,) at its normed state (A, D), float32."""
    logits = decoder.unembed(states).float()
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, targets[:, None], True)
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(-1)


def _quadrature(steps: int) -> list[tuple[float, float]]:
    """Points and weights of Gauss-Legendre quadrature on [0, 1]."""
    # Golub and Welsch: points are eigenvalues of the polynomials' recurrence matrix.
    k = torch.arange(1, steps, dtype=torch.float64)
    off = k / (4 * k.pow(2) - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].pow(2)
    assert math.isclose(float(weights.sum()), 1.0, rel_tol=1e-9)
    return list(zip(((points + 1) / 2).tolist(), weights.tolist(), strict=True))
