"""The slow, obvious oracle: the formulas line by line, one prompt and one copy of the model a time.

Equations are those of arXiv 2409.14144. Nothing here comes from `prune_edit`: units are zeroed in
deep copies of the stock model's weights, states are read off models whose later parts are zeroed.
B = 1 throughout; D hidden, E head_dim, N FFN width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Ids = Sequence[int]
Unit = tuple[int, int]
"""A layer, and a head or neuron of it."""


@dataclass(frozen=True)
class Prompt:
    """Token ids; those from `start` on are the answer, each predicted at the position before."""

    ids: tuple[int, ...]
    start: int


def layers(model: Any) -> Any:
    return model.transformer.h if is_gpt2(model) else model.model.layers


def is_gpt2(model: Any) -> bool:
    return hasattr(model, "transformer")


def attention_weight(model: Any, layer: int) -> torch.Tensor:
    """Output projection, (heads * E, D), a view: row block h is head h (eq. 2)."""
    block = layers(model)[layer]
    return block.attn.c_proj.weight if is_gpt2(model) else block.self_attn.o_proj.weight.T


def values(model: Any, layer: int) -> torch.Tensor:
    """FFN values fc2, (N, D), a view: row k is fc2_k (eq. 5)."""
    block = layers(model)[layer]
    return block.mlp.c_proj.weight if is_gpt2(model) else block.mlp.down_proj.weight.T


def ffn_bias(model: Any, layer: int) -> torch.Tensor | None:
    block = layers(model)[layer]
    return block.mlp.c_proj.bias if is_gpt2(model) else block.mlp.down_proj.bias


def n_heads(model: Any) -> int:
    return model.config.n_head if is_gpt2(model) else model.config.num_attention_heads


@torch.no_grad()
def without(model: Any, heads: Iterable[Unit] = (), neurons: Iterable[Unit] = ()) -> Any:
    """A deep copy whose weights from these heads and neurons to the residual stream are zero."""
    model = copy.deepcopy(model)
    for layer, head in heads:
        weight = attention_weight(model, layer)
        size = weight.shape[0] // n_heads(model)
        weight[head * size : (head + 1) * size] = 0
    for layer, neuron in neurons:
        values(model, layer)[neuron] = 0
    return model


@torch.no_grad()
def log_probs(model: Any, ids: Ids) -> torch.Tensor:
    """Log of eq. 4's distribution after every token, (T, V)."""
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def answer_log_prob(model: Any, prompt: Prompt) -> float:
    """Summed log probability of the answer's tokens, each given all before it."""
    after = log_probs(model, prompt.ids)
    return sum(
        float(after[place - 1, prompt.ids[place]]) for place in range(prompt.start, len(prompt.ids))
    )


def head_drop(model: Any, prompt: Prompt, head: Unit) -> float:
    """Head intervention (section 3.2): what the answer loses without the head."""
    return answer_log_prob(model, prompt) - answer_log_prob(without(model, [head]), prompt)


@torch.no_grad()
def final_states(model: Any, ids: Ids) -> torch.Tensor:
    """The states before the final norm, (T, D): the model with that norm taken out."""
    model = copy.deepcopy(model)
    if is_gpt2(model):
        model.transformer.ln_f = nn.Identity()
    else:
        model.model.norm = nn.Identity()
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


@torch.no_grad()
def residual_outputs(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """x^{l-1} + A^l (T, D), eq. 1: the final state when nothing from layer l's FFN on is added."""
    model = copy.deepcopy(model)
    values(model, layer).zero_()
    if (bias := ffn_bias(model, layer)) is not None:
        bias.zero_()
    for after in range(layer + 1, len(layers(model))):
        for part in (attention_weight(model, after), values(model, after)):
            part.zero_()
        block = layers(model)[after]
        for projection in (
            (block.attn.c_proj, block.mlp.c_proj)
            if is_gpt2(model)
            else (block.self_attn.o_proj, block.mlp.down_proj)
        ):
            if projection.bias is not None:
                projection.bias.zero_()
    return final_states(model, ids)


@torch.no_grad()
def coefficients(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """m^l of eq. 6, (T, N): the input of the FFN's output projection."""
    block = layers(model)[layer]
    stream = residual_outputs(model, layer, ids)
    if is_gpt2(model):
        return block.mlp.act(block.mlp.c_fc(block.ln_2(stream)))
    x = block.post_attention_layernorm(stream)
    return functional.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)


@torch.no_grad()
def importances(
    model: Any, prompt: Prompt, place: int, layer: int, unablated: Any = None
) -> torch.Tensor:
    """Importance (section 4.1) of a layer's neurons for the token at `place`, (N,).

    The final norm keeps the scale it has for the real final state, that of the `unablated` model.
    """
    read, token = place - 1, prompt.ids[place]
    ids = prompt.ids[:place]
    final = final_states(unablated or model, ids)[read]  # (D,)
    base = residual_outputs(model, layer, ids)[read]  # x_T^{l-1} + A_T^l, (D,)
    m = coefficients(model, layer, ids)[read]  # (N,)
    before = frozen_log_probs(model, base, final)[token]
    after = torch.stack(
        [
            frozen_log_probs(model, base + m[k] * fc2_k, final)[token]
            for k, fc2_k in enumerate(values(model, layer))
        ]
    )
    return after - before  # log p(w | x + A + m_k fc2_k) - log p(w | x + A)


def frozen_log_probs(model: Any, x: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Log of eq. 4 at x (D,), with the norm's scale frozen at the state `final`, (V,)."""
    if is_gpt2(model):
        norm = model.transformer.ln_f
        scale = ((final - final.mean()).pow(2).mean() + norm.eps).sqrt()
        normed = (x - x.mean()) / scale * norm.weight + norm.bias
    else:
        norm = model.model.norm
        scale = (final.pow(2).mean() + norm.variance_epsilon).sqrt()
        normed = x / scale * norm.weight
    return (model.lm_head.weight @ normed).log_softmax(-1)


def head_scores(model: Any, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Mean drop of the answer's log probability over the examples, (L, H)."""
    rows, width = len(layers(model)), n_heads(model)
    return torch.tensor(
        [
            [
                sum(head_drop(model, prompt, (layer, head)) for prompt in prompts) / len(prompts)
                for head in range(width)
            ]
            for layer in range(rows)
        ]
    )


def neuron_scores(
    model: Any, prompts: Sequence[Prompt], contrast: bool, top_heads: int = 1
) -> torch.Tensor:
    """Mean over all answer tokens of importance, or of its change without the top heads, (L, N)."""
    found = []
    for prompt in prompts:
        ablated = without(model, top_heads_of(model, prompt, top_heads)) if contrast else None
        for place in range(prompt.start, len(prompt.ids)):
            rows = []
            for layer in range(len(layers(model))):
                gain = importances(model, prompt, place, layer)
                if ablated is not None:  # CNA score (a): original against one head zeroed
                    gain = gain - importances(ablated, prompt, place, layer, unablated=model)
                rows.append(gain)
            found.append(torch.stack(rows))
    return torch.stack(found).mean(0)


def top_heads_of(model: Any, prompt: Prompt, count: int = 1) -> list[Unit]:
    """The heads that this example's answer loses most without."""
    units = [(i, h) for i in range(len(layers(model))) for h in range(n_heads(model))]
    return sorted(units, key=lambda unit: -head_drop(model, prompt, unit))[:count]


@torch.no_grad()
def head_outputs(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """What the layer's heads hand to their output projection, (T, heads * E)."""
    seen = []
    block = layers(model)[layer]
    projection = block.attn.c_proj if is_gpt2(model) else block.self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def mean_over_tokens(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean (U,) over all tokens of all prompts, of (T, U) parts."""
    return torch.cat(list(parts)).mean(0)


@torch.no_grad()
def adding(model: Any, layer: int, part: str, constant: torch.Tensor) -> Any:
    """A deep copy whose attention or FFN output in one layer has a constant (D,) added."""
    model = copy.deepcopy(model)
    block = layers(model)[layer]
    names = (
        ("attn.c_proj", "mlp.c_proj") if is_gpt2(model) else ("self_attn.o_proj", "mlp.down_proj")
    )
    projection: Any = block.get_submodule(names[part == "ffn"])
    old = 0 if projection.bias is None else projection.bias
    projection.bias = nn.Parameter(old + constant)
    return model
