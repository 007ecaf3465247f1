"""The query side: who brings the important deep neurons what their keys look for.

arXiv 2409.14144, stages 1 to 3 (and arXiv 2312.12141, query neurons): the inner product of a deep
neuron's FFN key, the FFN norm's weight folded in, with what heads and shallow neurons bring it.
The papers read such products neuron by neuron; here they become one score a unit:

1. The deep neurons are the `query_neurons` with the highest mean importance I_b > 0.
2. At answer position T, the key of deep neuron b of layer l is

       K_b = I_b / |x + A|_l * (norm weight of l) * sum over parts p of  s_p key_p,

   a part being gate or up (or the only one), s_p the sign of its own product with x + A: a positive
   product with K_b makes the part larger in size, as in the authors' code. |.|_l is the FFN norm's
   divisor, frozen at T.
3. A head of layer a <= l scores  sum over b of K_b . (its output at T through the output
   projection).
4. A neuron k of layer s < a <= l at position i <= T brings m_k,i fc2_k. Layer a carries a vector v
   by its value-output map, all heads together and each fully attending,
   VO_a(v) = W_O W_V (norm weight of a) v / |x_i|_a, that norm's divisor frozen at i. The neuron
   scores  mean over i of  sum over b and a of  K_b . VO_a(m_k,i fc2_k).

Scores are means over all answer tokens, signed: negative ones work against the keys. What lies
above every deep neuron, or in their layer for neurons, can bring them nothing and scores 0.

Value-output maps are found by showing a layer one token: alone, it attends to itself, and what
reaches the output projection is its value, whatever the family's projections look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.errors import UnsupportedFamilyError
from prune_edit.hooks import Captured, capture
from prune_edit.replay import record
from prune_edit.running import stream
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.contrast import mean_importances
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import head_sums, scatter_heads
from prune_edit.tasks.prompts import Batch, Encoded

_FAR = 1e-2  # of a block's output: more than rounding


@dataclass(frozen=True)
class _Deep:
    """A layer's important neurons: their importance (d,), and keys by part (parts, d, D)."""

    weights: torch.Tensor
    keys: torch.Tensor


@torch.no_grad()
def score_query(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """What heads (L, H) and neurons (L, N) bring the deep neurons' keys.

    Raises UnsupportedFamilyError where attention and FFN do not read the stream through norms of
    their own and add to it directly.
    """
    importance = mean_importances(decoder, prompts, options, "deep neurons")
    deep = _deep_neurons(decoder, importance, options.query_neurons)
    maps = {
        layer: _value_map(decoder, layer, options) for layer in range(max(deep, default=-1) + 1)
    }
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    tokens = 0
    for batch in stream(decoder, prompts, options, "heads and neurons"):
        with capture(decoder) as seen:
            _, replay = record(decoder, batch.inputs)
        _check_family(decoder, seen, replay.states)
        carried = _score_heads(decoder, batch, seen, deep, maps, heads)
        if options.neurons:
            _score_neurons(decoder, batch, seen, replay.states, carried, neurons)
        tokens += len(batch.targets)
    if not options.neurons:
        neurons.fill_(torch.nan)
    return mark_absent(decoder, (heads / tokens).float(), (neurons / tokens).float())


def _deep_neurons(decoder: Decoder, importance: torch.Tensor, count: int) -> dict[int, _Deep]:
    """The `count` most important neurons, by layer."""
    flat = importance.flatten().nan_to_num(nan=-torch.inf)
    best = flat.argsort(descending=True, stable=True)[:count]  # of equal scores, the first
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[best] = flat[best] > 0
    found = {}
    for layer, there in enumerate(chosen.view_as(importance)):
        numbers = decoder.neuron_slots[layer]
        slots = there[numbers].nonzero()[:, 0]
        if len(slots):
            weights = importance[layer, numbers[slots]].float().to(decoder.device)
            found[layer] = _Deep(weights, _keys(decoder, layer)[:, slots.to(decoder.device)])
    return found


def _keys(decoder: Decoder, layer: int) -> torch.Tensor:
    """The layer's FFN keys with the norm's weight folded in, (parts, n, D), float32."""
    norm = decoder.ffn_norm(layer)
    if norm is None or not hasattr(norm, "weight"):  # the FFN waits for no attention, or norm
        raise _unsupported(decoder)
    parts = []
    for path in decoder.family.ffn_inputs:
        projection: nn.Module = decoder.layers[layer].get_submodule(path)
        parts.append(decoder.output_weight(projection).T)  # (n or parts * n, D)
    keys = torch.cat(parts).detach().float()
    keys = keys.unflatten(0, (-1, len(decoder.neuron_slots[layer])))
    folded: torch.Tensor = keys * decoder.norm_weight(norm)
    return folded


def _value_map(decoder: Decoder, layer: int, options: Options) -> torch.Tensor | None:
    """What reaches the output projection of the stream's coordinates, (D, slots * E).

    Through the linear part of the layer's norm, without its divisor; biases are left out. None for
    a layer without heads.
    """
    projection = decoder.attention_output(layer)
    if projection is None:
        return None
    width = decoder.unembedding.shape[1]
    _, replay = record(decoder, _one_token(decoder))
    args, kwargs = replay.calls[layer]
    probes = torch.zeros(width + 1, 1, width, device=decoder.device)  # the last is all zero
    probes[torch.arange(width), 0, torch.arange(width)] = float(width) ** 0.5
    # What the norm divides a probe by, the same for each coordinate.
    divisor = decoder.frozen_norm(probes[0, 0])[1]
    found = []
    for some in probes.to(replay.states[layer]).split(options.batch_tokens):
        with capture(decoder) as seen:
            decoder.layers[layer](some, *args, **kwargs)
        found.append(seen.heads[layer][:, 0].float())
    values = torch.cat(found)
    linear: torch.Tensor = (values[:-1] - values[-1]) * divisor / float(width) ** 0.5
    return linear


def _one_token(decoder: Decoder) -> dict[str, torch.Tensor]:
    zero = torch.zeros(1, 1, dtype=torch.long, device=decoder.device)
    return {"input_ids": zero, "attention_mask": zero + 1, "position_ids": zero}


def _score_heads(
    decoder: Decoder,
    batch: Batch,
    seen: Captured,
    deep: dict[int, _Deep],
    maps: dict[int, torch.Tensor | None],
    total: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """Add the heads' scores; what the keys look for before each layer's map, (A, D)."""
    places = (batch.rows, batch.columns)
    wanted = torch.zeros(1, 1, device=decoder.device)  # the highest layer has deep neurons
    carried = {}
    for layer in reversed(range(max(deep, default=-1) + 1)):
        if layer in deep:
            wanted = wanted + _query(decoder, layer, seen.residual[layer][places], deep[layer])
        projection, values = decoder.attention_output(layer), maps[layer]
        if projection is None or values is None:
            continue
        back = wanted @ decoder.output_weight(projection).detach().float().T  # (A, slots * E)
        products = seen.heads[layer][places].float() * back
        found = torch.zeros(len(products), decoder.head_shape[1], dtype=torch.float64)
        scatter_heads(decoder, layer, head_sums(decoder, products), found)
        total[layer] += found.sum(0)
        carried[layer] = back @ values.T
    return carried


def _query(decoder: Decoder, layer: int, residual: torch.Tensor, deep: _Deep) -> torch.Tensor:
    """Sum of the layer's K_b at states x + A (A, D): (A, D)."""
    residual = residual.float()
    divisor = decoder.norm_divisor(decoder.ffn_norm(layer), residual)
    centred = _centred(decoder, residual)
    signs = torch.einsum("ad,pnd->apn", centred, deep.keys).sign()
    keys = torch.einsum("apn,pnd->ad", signs * deep.weights, deep.keys)
    return _centred(decoder, keys) / divisor


def _centred(decoder: Decoder, vectors: torch.Tensor) -> torch.Tensor:
    """Less their mean, where the norms take it out (a map that is its own transpose)."""
    if decoder.family.rms_norm:
        return vectors
    return vectors - vectors.mean(-1, keepdim=True)


def _score_neurons(
    decoder: Decoder,
    batch: Batch,
    seen: Captured,
    states: list[torch.Tensor],
    carried: dict[int, torch.Tensor],
    total: torch.Tensor,
) -> None:
    """Add the neurons' scores."""
    mask = batch.attention_mask[batch.rows].float()  # (A, T)
    places = torch.arange(mask.shape[1], device=mask.device)
    mask = mask * (places <= batch.columns[:, None])
    share = mask / mask.sum(1, keepdim=True)
    wanted: torch.Tensor | None = None  # (A, T, D)
    for layer in reversed(range(max(carried, default=0))):
        if layer + 1 in carried:
            divisor = decoder.frozen_norm(states[layer + 1])[1][batch.rows]  # (A, T, 1)
            more = carried[layer + 1][:, None] / divisor
            wanted = more if wanted is None else wanted + more
        if wanted is None or layer not in seen.coefficients:
            continue
        products = wanted @ decoder.values(layer).float().T  # (A, T, n)
        products *= seen.coefficients[layer][batch.rows].float()
        found = torch.einsum("at,atn->an", share, products).double().sum(0)
        total[layer, decoder.neuron_slots[layer]] += found.cpu()


def _check_family(decoder: Decoder, seen: Captured, states: list[torch.Tensor]) -> None:
    """Raise UnsupportedFamilyError where attention's output passes a norm before the stream."""
    for layer, heads in seen.heads.items():
        projection = decoder.attention_output(layer)
        assert projection is not None
        added = (seen.residual[layer] - states[layer]).float()
        far = (projection(heads).float() - added).abs().max()
        if far > _FAR * (1 + states[layer].float().abs().max()):
            raise _unsupported(decoder)


def _unsupported(decoder: Decoder) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        f"score 'query' does not know how attention and FFN of {decoder.family.model_type} follow "
        "each other: they must read the stream through a norm and add to it directly; "
        "use another --score"
    )
