"""All head interventions in one pass: every ablated run is a branch that leaves the dense run.

A layer-l ablation leaves what is below alone, so at layer l the H branches are born from the dense
run's residual output by subtraction, `x + A - z_h W_O^h` (arXiv 2409.14144, eq. 2), and from there
on run as further copies of the batch. In the last layer only the rows that predict answers are
queried and go on. All matrix products see packed rows without padding.

C branches (the dense run is copy 0), n windows of W rows, R = n * W rows, A asked rows; D hidden,
E head_dim, V vocabulary. Memory: (C + 1) * (R + A) states, and work space for one block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from prune_edit.decoder import Decoder
from prune_edit.running import answer_log_probs, best_tokens
from prune_edit.scoring.kernels import Angles, Workspace, divisor, log_sum
from prune_edit.scoring.lean import Activation, Attention, Ffn, Layer, activation, prepare
from prune_edit.scoring.prefixes import Forest

Head = tuple[int, int]  # layer, base index
_CPU_BLOCK, _GPU_BLOCK = 4 << 20, 512 << 20  # bytes of the widest intermediate result


def block_rows(decoder: Decoder) -> int:
    """Rows that are worked on together: few enough for the caches, enough to hide the calls."""
    width = 2 * max(decoder.neuron_shape[1], decoder.head_shape[1] * decoder.head_dim)
    room = _GPU_BLOCK if decoder.device.type == "cuda" else _CPU_BLOCK
    return min(8192, max(256, room // (width * decoder.model.dtype.itemsize)))


@torch.no_grad()
def answer_values(
    decoder: Decoder,
    trees: Forest,
    heads: Sequence[Head],
    space: Workspace,
    means: Mapping[int, torch.Tensor] | None = None,
    measure: str = "logprob",
) -> torch.Tensor:
    """What every pair's target is worth, (C + 1, P) float64: dense, then without each head.

    Its log probability, or for `measure` "accuracy" 1 where it is not the arg-max. An ablated head
    gives zero, or its part of its layer's `means` (slots * E,). `heads` ascend by layer. The model
    must be `lean.supported`.
    """
    return _Run(decoder, trees, heads, space, means or {}, measure).result()


class _Run:
    """One pass over the layers with all branches."""

    def __init__(
        self,
        decoder: Decoder,
        trees: Forest,
        heads: Sequence[Head],
        space: Workspace,
        means: Mapping[int, torch.Tensor],
        measure: str,
    ) -> None:
        self.decoder, self.trees, self.heads, self.space = decoder, trees, heads, space
        self.means, self.measure = means, measure
        self.rows, self.block = trees.tokens.numel(), block_rows(decoder)
        act = activation(decoder)
        assert act is not None
        self.act: Activation = act
        width = trees.tokens.shape[1]
        self.at_once = max(1, self.block // self.rows)  # copies in a block
        self.angles = Angles(decoder, trees.depths)
        self.last = decoder.n_layers - 1
        # Asked rows, the windows' equally many: a gap repeats a row, `real` leaves it out again.
        windows = trees.asked // width
        counts = windows.bincount(minlength=len(trees.tokens))
        most = int(counts.max())
        starts = counts.cumsum(0) - counts
        index = starts[:, None] + torch.arange(most, device=starts.device)
        filled = torch.arange(most, device=starts.device) < counts[:, None]
        self.asking = trees.asked[
            torch.where(filled, index, starts[:, None]).clamp_(max=len(trees.asked) - 1)
        ]
        self.real = None if bool(filled.all()) else filled.flatten().nonzero()[:, 0]
        self.masks: dict[tuple[int | None, bool], torch.Tensor] = {}

    def result(self) -> torch.Tensor:
        decoder, trees, space = self.decoder, self.trees, self.space
        copies, hidden = len(self.heads) + 1, decoder.unembedding.shape[1]
        states = space.take("states", copies, self.rows, hidden)
        embedding: Any = decoder.module(decoder.family.embedding)
        states[0] = functional.embedding(trees.tokens.flatten(), embedding.weight)
        alive = 1
        for index in range(decoder.n_layers):
            born = [head for layer, head in self.heads if layer == index]
            layer = prepare(decoder, index)
            if index == self.last:
                tail = space.take("tail", copies, len(trees.asked), hidden)
                self._last(layer, states[:alive], tail, born)
                return self._misses(tail) if self.measure == "accuracy" else self._log_probs(tail)
            dense = self._lost(index, self._attend(layer, states, alive))
            self._bear(layer, states, alive, dense, born)
            alive += len(born)
            if layer.ffn is not None:
                self._feed(layer, states, alive, alive - len(born), dense)
            elif layer.ffn_bias is not None:
                states[:alive] += layer.ffn_bias
        raise AssertionError("a model has a last layer")

    def _blocks(self, copies: int, rows: int) -> list[slice]:
        step = max(1, self.block // rows)
        count = -(-copies // step)
        return [slice(copies * i // count, copies * (i + 1) // count) for i in range(count)]

    def _attend(self, layer: Layer, states: torch.Tensor, alive: int) -> torch.Tensor | None:
        """Add the attention's output to `states`; the dense run's head outputs (R, slots * E)."""
        attention, dense = layer.attention, None
        if attention is not None:
            for part in self._blocks(alive, self.rows):
                x = states[part].view(-1, states.shape[-1])
                wide = attention.queries + 2 * attention.keys
                joined = self.space.take("joined", len(x), wide)
                self._linear(
                    self._normed(x, attention), attention.inputs, attention.input_bias, joined
                )
                found = self._heads(attention, joined, joined, None)
                if part.start == 0:
                    dense = found[: self.rows].clone()
                x.addmm_(found, attention.output.T)
        if layer.attention_bias is not None:
            states[:alive] += layer.attention_bias
        return dense

    def _last(
        self, layer: Layer, states: torch.Tensor, tail: torch.Tensor, born: list[int]
    ) -> None:
        """The last layer, for asked rows only, into `tail` (C + 1, A, D)."""
        attention, dense, hidden = layer.attention, None, states.shape[-1]
        alive, asked = len(states), len(self.trees.asked)
        for part in self._blocks(alive, self.rows):
            out = tail[part]
            torch.index_select(states[part], 1, self.trees.asked, out=out)
            if attention is None:
                continue
            x = states[part].view(-1, hidden)
            normed = self._normed(x, attention)
            joined = self.space.take("joined", len(x), 2 * attention.keys)
            cut, bias = attention.queries, attention.input_bias
            self._linear(
                normed, attention.inputs[cut:], None if bias is None else bias[cut:], joined
            )
            asking = normed.view(-1, self.rows, hidden)[:, self.asking.flatten()].flatten(0, 1)
            queries = self.space.take("queries", len(asking), cut)
            self._linear(
                asking, attention.inputs[:cut], None if bias is None else bias[:cut], queries
            )
            found = self._heads(attention, joined, queries, self.asking)
            if self.real is not None:
                found = found.view(len(out), -1, cut)[:, self.real].flatten(0, 1)
            if part.start == 0:
                dense = found[:asked]
            out.view(-1, hidden).addmm_(found, attention.output.T)
        if layer.attention_bias is not None:
            tail[:alive] += layer.attention_bias
        dense = self._lost(self.last, dense)
        self._bear(layer, tail, alive, dense, born)
        if layer.ffn is not None:
            self._feed(layer, tail, len(tail), alive, dense)
        elif layer.ffn_bias is not None:
            tail += layer.ffn_bias

    def _normed(self, x: torch.Tensor, block: Attention | Ffn) -> torch.Tensor:
        out = self.space.take("normed", *x.shape)
        if block.norm is None:
            return torch.mul(x, divisor(x, block.epsilon), out=out)
        wide = x.float()
        scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + block.epsilon)).to(x)
        return torch.mul(scaled, block.norm, out=out)

    @staticmethod
    def _linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)

    def _heads(
        self,
        attention: Attention,
        joined: torch.Tensor,
        queries: torch.Tensor,
        asking: torch.Tensor | None,
    ) -> torch.Tensor:
        """Head outputs (copies * Q, slots * E) of projected rows; `asking` (n, q) are the queries.

        `joined` holds queries (unless `asking` is given), keys and values.
        """
        size, count = self.decoder.head_dim, len(self.trees.tokens)
        copies = len(joined) // self.rows
        if asking is None:
            split = attention.queries + attention.keys
            self.angles.rotate(joined.view(copies, self.rows, -1)[..., :split], None)
            q, k = joined[:, : attention.queries], joined[:, attention.queries : split]
        else:
            self.angles.rotate(joined.view(copies, self.rows, -1)[..., : attention.keys], None)
            self.angles.rotate(queries.view(copies, asking.numel(), -1), asking.flatten())
            q, k = queries, joined[:, : attention.keys]
        v = joined[:, -attention.keys :]
        q, k, v = (
            t.unflatten(1, (-1, size)).unflatten(0, (copies * count, -1)).transpose(1, 2)
            for t in (q, k, v)
        )
        mask = self._mask(attention.sight, asking)
        mask = mask.repeat(copies, 1, 1, 1) if len(mask) > 1 else mask
        groups = q.shape[1] // k.shape[1]
        if groups == 1:
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            # One call for each place in the groups: no copies of keys and values are made.
            z = torch.stack(
                [
                    functional.scaled_dot_product_attention(q[:, i::groups], k, v, attn_mask=mask)
                    for i in range(groups)
                ],
                2,
            ).flatten(1, 2)
        return z.transpose(1, 2).reshape(-1, attention.queries)

    def _mask(self, sight: int | None, asking: torch.Tensor | None) -> torch.Tensor:
        """What is added to attention scores, (n or 1, 1, q, W)."""
        key = sight, asking is None
        if key not in self.masks:
            trees = self.trees
            seen, depths = trees.visible, trees.depths
            if sight is not None:
                seen = seen & (depths[:, :, None] - depths[:, None] < sight)
            if asking is not None:
                seen = seen.flatten(0, 1)[asking]
            if bool((seen == seen[:1]).all()):
                seen = seen[:1]
            mask = torch.zeros(seen.shape, dtype=self.space.like.dtype, device=seen.device)
            self.masks[key] = mask.masked_fill_(~seen, -torch.inf)[:, None]
        return self.masks[key]

    def _lost(self, layer: int, dense: torch.Tensor | None) -> torch.Tensor | None:
        """What the heads' outputs (R, slots * E) lose when they are ablated."""
        if dense is None or layer not in self.means:
            return dense
        return dense - self.means[layer].to(dense)

    def _bear(
        self,
        layer: Layer,
        states: torch.Tensor,
        alive: int,
        dense: torch.Tensor | None,
        born: list[int],
    ) -> None:
        """New branches behind those alive: the dense residual output less one head's part."""
        for i, head in enumerate(born):
            assert layer.attention is not None and dense is not None
            part = self._part(layer.attention, head)
            weight = layer.attention.output[:, part]
            torch.addmm(states[0], dense[:, part], weight.T, alpha=-1, out=states[alive + i])

    def _part(self, attention: Attention, head: int) -> slice:
        slot, size = attention.slots.index(head), self.decoder.head_dim
        return slice(slot * size, (slot + 1) * size)

    def _feed(
        self, layer: Layer, states: torch.Tensor, alive: int, old: int, dense: torch.Tensor | None
    ) -> None:
        """Add the FFN's output to the first `alive` states; those from `old` on are new."""
        ffn, attention, rows = layer.ffn, layer.attention, states.shape[1]
        assert ffn is not None
        direct = alive
        if (
            attention is not None
            and dense is not None
            and _worth(rows, alive - old, ffn, attention)
        ):
            direct = old
            self._feed_new(ffn, attention, states, alive, old, dense)
        for part in self._blocks(direct, rows):
            x = states[part].view(-1, states.shape[-1])
            inner = self.space.take("inner", len(x), 2 * ffn.width)
            self._linear(self._normed(x, ffn), ffn.inputs, ffn.input_bias, inner)
            self._finish(ffn, inner, x)
        if layer.ffn_bias is not None:
            states[:alive] += layer.ffn_bias

    def _finish(self, ffn: Ffn, inner: torch.Tensor, x: torch.Tensor) -> None:
        """Activate, gate and project what the FFN's first products gave, and add it to `x`."""
        gate, up = inner[:, : ffn.width], inner[:, ffn.width :]
        if self.act is functional.silu:
            functional.silu(gate, inplace=True).mul_(up)
        else:
            torch.mul(self.act(gate), up, out=gate)
        x.addmm_(gate, ffn.output.T)

    def _feed_new(
        self,
        ffn: Ffn,
        attention: Attention,
        states: torch.Tensor,
        alive: int,
        old: int,
        dense: torch.Tensor,
    ) -> None:
        """The same for new branches, whose inputs differ from the dense run's by one head's part.

        The first products are linear but for the norm's divisor: with G the FFN's inputs,
        `(x + A - z_h W_O^h) G = (x + A) G - z_h (W_O^h G)`, E instead of D wide for all but one.
        """
        inner = self.space.take("inner", states.shape[1], 2 * ffn.width)
        base = self.space.take("base", *inner.shape)
        torch.mm(states[0], ffn.inputs.T, out=base)
        mixed = self.space.take("mixed", attention.queries, 2 * ffn.width)
        torch.mm(attention.output.T, ffn.inputs.T, out=mixed)
        for i, (_, head) in enumerate(self.heads[old - 1 : alive - 1]):
            x, part = states[old + i], self._part(attention, head)
            torch.addmm(base, dense[:, part], mixed[part], alpha=-1, out=inner)
            inner.mul_(divisor(x, ffn.epsilon))
            if ffn.input_bias is not None:
                inner += ffn.input_bias
            self._finish(ffn, inner, x)

    def _log_probs(self, tail: torch.Tensor) -> torch.Tensor:
        """(C + 1, P) of the last states (C + 1, A, D)."""
        decoder, trees = self.decoder, self.trees
        weight = decoder.unembedding
        flat = tail.view(-1, tail.shape[-1])
        states = decoder.final_norm(flat)
        if tail.device.type == "cpu" and tail.dtype == torch.float32:
            normaliser = log_sum(states, weight, self.space).view(tail.shape[:2])
            wanted = states.view(tail.shape)[:, trees.pairs].mul_(weight[trees.targets]).sum(-1)
            sums: torch.Tensor = wanted.double() - normaliser[:, trees.pairs].double()
            return sums
        # The target's logit must be one of those it is normalised with: in half precision a product
        # made apart is rounded otherwise, and the difference drowns what heads are worth.
        found = answer_log_probs(decoder, *self._pairs(states.view(tail.shape)))
        return found.view(len(tail), -1).double()

    def _misses(self, tail: torch.Tensor) -> torch.Tensor:
        """(C + 1, P): 1 where a pair's target is not the arg-max."""
        states, targets = self._pairs(self.decoder.final_norm(tail))
        return (best_tokens(self.decoder, states) != targets).view(len(tail), -1).double()

    def _pairs(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs' states ((C + 1) * P, D) of asked ones (C + 1, A, D), and their targets."""
        chosen = states[:, self.trees.pairs]
        return chosen.flatten(0, 1), self.trees.targets.repeat(len(chosen))


def _worth(rows: int, born: int, ffn: Ffn, attention: Attention) -> bool:
    """Whether new branches' first FFN products cost less as differences from the dense run's."""
    hidden, size = ffn.inputs.shape[1], attention.queries // len(attention.slots)
    apart = rows * born * hidden
    joint = rows * hidden + attention.queries * hidden + 2 * rows * born * size
    return ffn.norm is None and rows >= 128 and size >= 32 and joint < 0.8 * apart
