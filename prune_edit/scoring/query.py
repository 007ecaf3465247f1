"""The query side: who brings the important deep neurons what their keys look for.

arXiv 2409.14144, stages 1 to 3 (and arXiv 2312.12141, query neurons): the inner product of a deep
neuron's FFN key, the FFN norm's weight folded in, with what heads and shallow neurons bring it.
The papers read such products neuron by neuron; here they become one score a unit:

1. The deep neurons are the `query_neurons` with the highest mean importance I_b > 0.
2. At answer position T, the key of deep neuron b of layer l is

       K_b = I_b / |y|_l * (norm weight of l) * sum over parts p of  s_p key_p,

   y what the FFN reads (x + A, or x where it runs beside attention), a part being gate or up (or
   the only one), s_p the sign of its own product with y: a positive product with K_b makes the part
   larger in size, as in the authors' code. |.|_l is the FFN norm's divisor, frozen at T.
3. A head of layer a that the FFN of l comes after scores  sum over b of K_b . (its output at T
   through the output projection).
4. A neuron k of layer s < a at position i <= T brings m_k,i fc2_k. Layer a carries a vector v by
   its value-output map, all heads together and each fully attending,
   VO_a(v) = W_O W_V (norm weight of a) v / |x_i|_a, that norm's divisor frozen at i. The neuron
   scores  mean over i of  sum over b and a of  K_b . VO_a(m_k,i fc2_k).

A norm between a block's output and the stream (Gemma, OLMo 2) belongs to the output, its divisor
frozen at its own position; where none stands before a block, there is no divisor and no weight.

Scores are means over all answer tokens, signed: negative ones work against the keys. What lies
above every deep neuron, or in their layer for neurons, can bring them nothing and scores 0.

Value-output maps are found by showing a layer one token: alone, it attends to itself, and what
reaches the output projection is its value, whatever the family's projections look like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.hooks import Captured, capture
from prune_edit.replay import record
from prune_edit.running import Running, stream
from prune_edit.scoring.baselines import mark_absent
from prune_edit.scoring.contrast import mean_importances
from prune_edit.scoring.options import Options
from prune_edit.scoring.statistics import head_sums, scatter_heads
from prune_edit.tasks.prompts import Batch, Encoded


@dataclass(frozen=True)
class Deep:
    """A layer's important neurons: their importance (d,), and keys by part (parts, d, D)."""

    weights: torch.Tensor
    keys: torch.Tensor


@torch.no_grad()
def score_query(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """What heads (L, H) and neurons (L, N) bring the deep neurons' keys."""
    importance = mean_importances(decoder, prompts, options, "deep neurons")
    deep = _deep_neurons(decoder, importance, options.query_neurons)
    maps = {layer: value_map(decoder, layer, options) for layer in range(max(deep, default=-1) + 1)}
    heads = torch.zeros(decoder.head_shape, dtype=torch.float64)
    neurons = torch.zeros(decoder.neuron_shape, dtype=torch.float64)
    tokens = 0
    for batch in stream(decoder, prompts, options, "heads and neurons"):
        with capture(decoder) as seen, reading(decoder) as reads:
            _, replay = record(decoder, batch.inputs)
        carried = _score_heads(decoder, batch, seen, reads, replay.states, deep, maps, heads)
        if options.neurons:
            _score_neurons(decoder, batch, seen, replay.states, carried, neurons)
        tokens += len(batch.targets)
    if not options.neurons:
        neurons.fill_(torch.nan)
    return mark_absent(decoder, (heads / tokens).float(), (neurons / tokens).float())


def _deep_neurons(decoder: Decoder, importance: torch.Tensor, count: int) -> dict[int, Deep]:
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
            found[layer] = Deep(weights, keys_of(decoder, layer)[:, slots.to(decoder.device)])
    return found


def keys_of(decoder: Decoder, layer: int) -> torch.Tensor:
    """The layer's FFN keys with the norm's weight folded in, (parts, n, D), float32."""
    norm = norm_of(decoder.ffn_reader(layer))
    parts = []
    for path in decoder.family.ffn_inputs:
        projection: nn.Module = decoder.layers[layer].get_submodule(path)
        parts.append(decoder.output_weight(projection).T)  # (n or parts * n, D)
    keys = torch.cat(parts).detach().float()
    keys = keys.unflatten(0, (-1, len(decoder.neuron_slots[layer])))
    folded: torch.Tensor = keys if norm is None else keys * decoder.norm_weight(norm)
    return folded


def norm_of(reader: nn.Module | None) -> nn.Module | None:
    """The module that reads the stream, if it is a norm: one vector of weights, or none at all."""
    return reader if reader is not None and not any(reader.children()) else None


@dataclass
class Reads:
    """Per layer, what the FFN reads (B, T, D), and what attention's output norm divides by."""

    ffn: dict[int, torch.Tensor]
    attention: dict[int, torch.Tensor]


@contextmanager
def reading(decoder: Decoder) -> Iterator[Reads]:
    """Watch the norms of a pass."""
    reads = Reads({}, {})

    def ffn(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reads.ffn[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    def attention(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            reads.attention[layer] = decoder.norm_divisor(module, args[0].detach())

        return hook

    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            if decoder.ffn_output(layer) is not None:
                reader = decoder.ffn_reader(layer)
                handle = reader.register_forward_pre_hook(ffn(layer), with_kwargs=True)
                stack.callback(handle.remove)
            if (norm := decoder.attention_output_norm(layer)) is not None:
                stack.callback(norm.register_forward_pre_hook(attention(layer)).remove)
        yield reads


def value_map(decoder: Decoder, layer: int, running: Running) -> torch.Tensor | None:
    """What reaches the output projection of the stream's coordinates, (D, slots * E).

    Through the linear part of the layer's norm, without its divisor; biases are left out. None for
    a layer without heads.
    """
    projection = decoder.attention_output(layer)
    if projection is None:
        return None
    width = decoder.unembedding.shape[1]
    probes = torch.zeros(width + 1, 1, width, device=decoder.device)  # the last is all zero
    probes[torch.arange(width), 0, torch.arange(width)] = float(width) ** 0.5
    # What the norm divides a probe by, the same for each coordinate.
    norm = decoder.attention_norm(layer)
    divisor = 1.0 if norm is None else decoder.norm_divisor(norm, probes[0, 0])
    found = []
    for some in probes.to(decoder.model.dtype).split(running.batch_tokens):
        _, replay = record(decoder, _one_token(decoder, len(some)))
        args, kwargs = replay.calls[layer]
        with capture(decoder) as seen:
            decoder.layers[layer](some, *args, **kwargs)
        found.append(seen.heads[layer][:, 0].float())
    values = torch.cat(found)
    linear: torch.Tensor = (values[:-1] - values[-1]) * divisor / float(width) ** 0.5
    return linear


def _one_token(decoder: Decoder, count: int) -> dict[str, torch.Tensor]:
    """Inputs of as many prompts of one token, for what the layers are given besides states."""
    zero = torch.zeros(count, 1, dtype=torch.long, device=decoder.device)
    return {"input_ids": zero, "attention_mask": zero + 1, "position_ids": zero}


def walk_back(
    decoder: Decoder,
    batch: Batch,
    reads: Reads,
    states: list[torch.Tensor],
    deep: dict[int, Deep],
) -> Iterator[tuple[int, torch.Tensor]]:
    """From the highest deep neuron down, each layer and what the keys look for in its heads.

    That is the direction (A, slots * E) at the answers whose product with the input of the layer's
    attention output projection is the heads' score.
    """
    places = (batch.rows, batch.columns)
    wanted = torch.zeros(len(batch.targets), decoder.unembedding.shape[1], device=decoder.device)
    for layer in reversed(range(max(deep, default=-1) + 1)):
        own: torch.Tensor | float = 0.0
        if layer in deep:
            read = reads.ffn[layer].view_as(states[layer])
            own = query_of(decoder, layer, read[places], deep[layer])
            # An FFN that reads what attention reads gets nothing from the heads beside it.
            if not torch.equal(read, states[layer]):
                wanted, own = wanted + own, 0.0
        projection = decoder.attention_output(layer)
        if projection is not None:
            asked = wanted
            if (norm := decoder.attention_output_norm(layer)) is not None:
                asked = wanted * decoder.norm_weight(norm) / reads.attention[layer][places]
            yield layer, asked @ decoder.output_weight(projection).detach().float().T
        wanted = wanted + own


def _score_heads(
    decoder: Decoder,
    batch: Batch,
    seen: Captured,
    reads: Reads,
    states: list[torch.Tensor],
    deep: dict[int, Deep],
    maps: dict[int, torch.Tensor | None],
    total: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """Add the heads' scores; what the keys look for before each layer's map, (A, D)."""
    places = (batch.rows, batch.columns)
    carried = {}
    for layer, back in walk_back(decoder, batch, reads, states, deep):
        values = maps[layer]
        assert values is not None
        products = seen.heads[layer][places].float() * back
        found = torch.zeros(len(products), decoder.head_shape[1], dtype=torch.float64)
        scatter_heads(decoder, layer, head_sums(decoder, products), found)
        total[layer] += found.sum(0)
        carried[layer] = back @ values.T
    return carried


def query_of(decoder: Decoder, layer: int, read: torch.Tensor, deep: Deep) -> torch.Tensor:
    """Sum of the layer's K_b where the FFN reads (A, D): (A, D)."""
    norm, read = norm_of(decoder.ffn_reader(layer)), read.float()
    middle = read if norm is None else centred(decoder, read)
    signs = torch.einsum("ad,pnd->apn", middle, deep.keys).sign()
    keys = torch.einsum("apn,pnd->ad", signs * deep.weights, deep.keys)
    return keys if norm is None else centred(decoder, keys) / decoder.norm_divisor(norm, read)


def centred(decoder: Decoder, vectors: torch.Tensor) -> torch.Tensor:
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
            norm = decoder.attention_norm(layer + 1)
            more = carried[layer + 1][:, None]
            if norm is not None:
                more = more / decoder.norm_divisor(norm, states[layer + 1])[batch.rows]  # (A, T, 1)
            wanted = more if wanted is None else wanted + more
        if wanted is None or layer not in seen.coefficients:
            continue
        products = wanted @ decoder.residual_values(layer).float().T  # (A, T, n)
        products = products * seen.effective(layer)[batch.rows].float()
        found = torch.einsum("at,atn->an", share, products).double().sum(0)
        total[layer, decoder.neuron_slots[layer]] += found.cpu()
