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
from anatomy import anatomy, ffn_coefficients, ffn_keys, logits, through, values_of
from torch import nn

Ids = Sequence[int]
Unit = tuple[int, int]
"""A layer, and a head or neuron of it."""


@dataclass(frozen=True)
class Prompt:
    """Token ids; those from `start` on are the answer, each predicted at the position before."""

    ids: tuple[int, ...]
    start: int


def layers(model: Any) -> Any:
    return model.get_submodule(anatomy(model).layers)


def projection(model: Any, layer: int, part: str) -> Any:
    """The output projection of a layer's `attention` or `ffn`."""
    own = anatomy(model)
    return layers(model)[layer].get_submodule(own.attention if part == "attention" else own.ffn_out)


def _from_units(model: Any, layer: int, part: str) -> torch.Tensor:
    """A view of an output projection as (in, D)."""
    weight = projection(model, layer, part).weight
    return weight if anatomy(model).conv else weight.T


def attention_weight(model: Any, layer: int) -> torch.Tensor:
    """Output projection, (heads * E, D), a view: row block h is head h (eq. 2)."""
    return _from_units(model, layer, "attention")


def values(model: Any, layer: int) -> torch.Tensor:
    """FFN values fc2, (N, D), a view: row k is fc2_k (eq. 5)."""
    return _from_units(model, layer, "ffn")


def ffn_bias(model: Any, layer: int) -> torch.Tensor | None:
    return projection(model, layer, "ffn").bias


def n_heads(model: Any) -> int:
    return model.config.num_attention_heads


def duplicate(model: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy with modules and parameters of its own, tied ones still tied.

    What else the modules hold is shared: nothing here changes it, and it is slow to copy.
    """
    known = {} if known is None else known
    twin = copy.copy(model)
    for kind in ("_parameters", "_modules"):
        parts = dict(vars(model)[kind])
        for name, part in parts.items():
            if part is not None and id(part) not in known:
                known[id(part)] = (
                    nn.Parameter(part.detach().clone())
                    if kind == "_parameters"
                    else duplicate(part, known)
                )
            parts[name] = None if part is None else known[id(part)]
        vars(twin)[kind] = parts
    return twin


@torch.no_grad()
def without(model: Any, heads: Iterable[Unit] = (), neurons: Iterable[Unit] = ()) -> Any:
    """A deep copy whose weights from these heads and neurons to the residual stream are zero."""
    model = duplicate(model)
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
    """The states before the final norm, (T, D): the model with norm and unembedding taken out."""
    model = duplicate(model)
    parent, _, name = anatomy(model).final.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    if hasattr(model.get_submodule(parent), "project_out"):
        model.get_submodule(parent).project_out = None
    return model.base_model(torch.tensor([ids])).last_hidden_state[0]


def _silence(model: Any, layer: int, part: str) -> None:
    """Let a block add nothing: zero its output projection and bias."""
    module = projection(model, layer, part)
    module.weight.zero_()
    if module.bias is not None:
        module.bias.zero_()


@torch.no_grad()
def residual_outputs(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """x^{l-1} + A^l (T, D), eq. 1: the final state when nothing from layer l's FFN on is added."""
    model = duplicate(model)
    for after in range(layer, len(layers(model))):
        _silence(model, after, "ffn")
        if after > layer:
            _silence(model, after, "attention")
    return final_states(model, ids)


@torch.no_grad()
def layer_inputs(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """x^{l-1} (T, D): the final state when nothing from layer l on is added."""
    model = duplicate(model)
    _silence(model, layer, "attention")
    return residual_outputs(model, layer, ids)


@torch.no_grad()
def coefficients(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """m^l of eq. 6, (T, N): the input of the FFN's output projection."""
    reads = layer_inputs if anatomy(model).parallel else residual_outputs
    return ffn_coefficients(model, layers(model)[layer], reads(model, layer, ids))


@torch.no_grad()
def neuron_shares(model: Any, layer: int, m: torch.Tensor) -> torch.Tensor:
    """What each neuron adds to the stream, (N, D), for coefficients m (N,).

    A norm after the FFN is applied to every share with the statistics of the whole output.
    """
    shares = m[:, None] * values(model, layer)
    path = anatomy(model).ffn_post
    if path is None:
        return shares
    bias = ffn_bias(model, layer)
    whole = shares.sum(0) + (0 if bias is None else bias)
    return anatomy(model).norm(shares, whole, layers(model)[layer].get_submodule(path))


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
            frozen_log_probs(model, base + share, final)[token]
            for share in neuron_shares(model, layer, m)  # m_k fc2_k
        ]
    )
    return after - before  # log p(w | x + A + m_k fc2_k) - log p(w | x + A)


def frozen_log_probs(model: Any, x: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Log of eq. 4 at x (D,), with the norm's scale frozen at the state `final`, (V,)."""
    return logits(model, x, final).log_softmax(-1)


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
    module = projection(model, layer, "attention")
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def mean_over_tokens(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean (U,) over all tokens of all prompts, of (T, U) parts."""
    return torch.cat(list(parts)).mean(0)


@torch.no_grad()
def adding(model: Any, layer: int, part: str, constant: torch.Tensor) -> Any:
    """A deep copy whose attention or FFN output in one layer has a constant (D,) added."""
    model = duplicate(model)
    module = projection(model, layer, part)
    old = 0 if module.bias is None else module.bias
    module.bias = nn.Parameter(old + constant)
    return model


# The other methods, for what a unit's output projection reads: `part` is "heads" or "neurons".

PARTS = ("heads", "neurons")


def is_gpt2(model: Any) -> bool:
    return hasattr(model, "transformer")


def reader(model: Any, layer: int, part: str) -> Any:
    """The output projection that reads the layer's units."""
    return projection(model, layer, "attention" if part == "heads" else "ffn")


def output_weight(model: Any, layer: int, part: str) -> torch.Tensor:
    """(channels, D), a view."""
    return attention_weight(model, layer) if part == "heads" else values(model, layer)


def inputs(model: Any, layer: int, part: str, ids: Ids) -> torch.Tensor:
    """What the layer's output projection reads, (T, channels)."""
    return head_outputs(model, layer, ids) if part == "heads" else coefficients(model, layer, ids)


def channels_of(model: Any, part: str) -> int:
    """Channels of one unit: E, or 1."""
    return attention_weight(model, 0).shape[0] // n_heads(model) if part == "heads" else 1


def per_unit(model: Any, part: str, channels: torch.Tensor) -> torch.Tensor:
    """Sums over each unit's channels."""
    return channels.unflatten(-1, (-1, channels_of(model, part))).sum(-1)


def all_inputs(model: Any, layer: int, part: str, prompts: Sequence[Prompt]) -> torch.Tensor:
    """What the projection reads at all tokens of all prompts; the last answer token is not read."""
    return torch.cat([inputs(model, layer, part, prompt.ids[:-1]) for prompt in prompts])


@torch.no_grad()
def is_right(model: Any, prompt: Prompt) -> float:
    """1 if each token of the answer is the likeliest, given all before it."""
    best = log_probs(model, prompt.ids).argmax(-1)
    spots = range(prompt.start, len(prompt.ids))
    return float(all(int(best[place - 1]) == prompt.ids[place] for place in spots))


@torch.no_grad()
def ablated(model: Any, layer: int, part: str, unit: int, mean: torch.Tensor | None = None) -> Any:
    """A copy without the unit; with what it adds on `mean` inputs (channels,), where given."""
    size = channels_of(model, part)
    own = slice(unit * size, (unit + 1) * size)
    left = without(model, **{part: [(layer, unit)]})
    if mean is None:
        return left
    constant = mean[own] @ output_weight(model, layer, part)[own]
    return adding(left, layer, "ffn" if part == "neurons" else "attention", constant)


def ablation_score(
    model: Any,
    prompts: Sequence[Prompt],
    part: str,
    unit: Unit,
    mean: bool = False,
    accuracy: bool = False,
) -> float:
    """Mean drop of the answer's log probability, or of the right answers, without the unit."""
    worth = is_right if accuracy else answer_log_prob
    layer, number = unit
    mean_input = all_inputs(model, layer, part, prompts).mean(0) if mean else None
    other = ablated(model, layer, part, number, mean_input)
    return sum(worth(model, prompt) - worth(other, prompt) for prompt in prompts) / len(prompts)


def wanda(model: Any, prompts: Sequence[Prompt], part: str) -> torch.Tensor:
    """Sum of |W_dj| * ||x_j||_2 (arXiv 2306.11695, eq. 1) over a unit's weights, (L, U)."""
    found = []
    for layer in range(len(layers(model))):
        norms = all_inputs(model, layer, part, prompts).norm(dim=0)  # ||x_j||_2
        weight = output_weight(model, layer, part).detach()
        found.append(per_unit(model, part, (weight.abs() * norms[:, None]).sum(1)))
    return torch.stack(found)


def flap(model: Any, prompts: Sequence[Prompt], part: str) -> torch.Tensor:
    """Standardised fluctuation (arXiv 2312.11983): mean over a unit's channels, (L, U)."""
    found = []
    for layer in range(len(layers(model))):
        x = all_inputs(model, layer, part, prompts)
        fluctuation = (x - x.mean(0)).pow(2).sum(0) / (len(x) - 1)
        metric = fluctuation * output_weight(model, layer, part).detach().norm(dim=1).pow(2)
        standard = (metric - metric.mean()) / metric.std()
        found.append(per_unit(model, part, standard) / channels_of(model, part))
    return torch.stack(found)


def activation(model: Any, prompts: Sequence[Prompt], part: str) -> torch.Tensor:
    """Root mean square over prompts of the mean norm over tokens (arXiv 2407.14679), (L, U)."""
    found = []
    for layer in range(len(layers(model))):
        squares = []
        for prompt in prompts:
            x = inputs(model, layer, part, prompt.ids[:-1])
            squares.append(per_unit(model, part, x.pow(2)).sqrt().mean(0).pow(2))
        found.append(torch.stack(squares).mean(0).sqrt())
    return torch.stack(found)


def gradients(model: Any, prompt: Prompt, part: str, odds: bool = False) -> torch.Tensor:
    """Sum over tokens of a unit's output times the answer's gradient by it, (L, U).

    The answer's summed log probability, or with `odds` its tokens' summed log-odds.
    """
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any) -> Any:
        # Separated from what comes before: only this place's own gradient counts.
        seen.append(args[0])
        args[0].retain_grad()

    count = len(layers(model))
    handles = [reader(model, layer, part).register_forward_pre_hook(keep) for layer in range(count)]
    after = model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    spots = range(prompt.start, len(prompt.ids))
    found = [after[place - 1, prompt.ids[place]] for place in spots]
    if odds:
        found = [log_p - (1 - log_p.exp()).log() for log_p in found]
    sum(found).backward()  # type: ignore[union-attr]
    products = [(v * v.grad).sum((0, 1)).detach() for v in seen]  # type: ignore[operator]
    model.zero_grad()
    return torch.stack([per_unit(model, part, product) for product in products])


@torch.no_grad()
def scaled(model: Any, part: str, factor: float) -> Any:
    """A copy in which all units of one kind give `factor` times what they give."""
    model = copy.deepcopy(model)
    for layer in range(len(layers(model))):
        output_weight(model, layer, part).mul_(factor)
    return model


def integrated(model: Any, prompt: Prompt, part: str, steps: int) -> torch.Tensor:
    """Mean derivative by each unit's factor while all factors rise from 0 to 1, (L, U)."""
    total = 0.0
    for step in range(steps):
        factor = (step + 0.5) / steps
        # The factor is in the weights: the gradient has it, the derivative by it has not.
        total = total + gradients(scaled(model, part, factor), prompt, part) / factor
    return total / steps  # type: ignore[return-value]


@torch.no_grad()
def true_importances(model: Any, prompt: Prompt, place: int, layer: int) -> torch.Tensor:
    """Importance (section 4.1) through the model's own final norm, at each sum itself, (N,)."""
    ids, token, read = prompt.ids[:place], prompt.ids[place], place - 1
    base = residual_outputs(model, layer, ids)[read]
    m = coefficients(model, layer, ids)[read]

    def log_p(x: torch.Tensor) -> torch.Tensor:
        return frozen_log_probs(model, x, final=x)[token]

    rows = [log_p(base + share) - log_p(base) for share in neuron_shares(model, layer, m)]
    return torch.stack(rows)


@torch.no_grad()
def attention_added(model: Any, layer: int, ids: Ids) -> torch.Tensor:
    """What attention's output projection gives, before any norm after it, (T, D)."""
    bias = projection(model, layer, "attention").bias
    added = head_outputs(model, layer, ids) @ attention_weight(model, layer)
    return added if bias is None else added + bias


@torch.no_grad()
def query(
    model: Any, prompts: Sequence[Prompt], deep: Sequence[tuple[int, int, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What heads (L, H) and neurons (L, N) bring the keys of deep (layer, neuron, importance)."""
    own, count = anatomy(model), len(layers(model))
    width = values(model, 0).shape[0]
    found_heads, found_neurons = [], []
    for prompt in prompts:
        for place in range(prompt.start, len(prompt.ids)):
            ids, last = prompt.ids[:place], place - 1
            heads, neurons = torch.zeros(count, n_heads(model)), torch.zeros(count, width)
            inputs = [layer_inputs(model, a, ids) for a in range(count)]
            outputs = [head_outputs(model, a, ids) for a in range(count)]
            added = [attention_added(model, a, ids)[last] for a in range(count)]
            for layer, neuron, importance in deep:
                block = layers(model)[layer]
                stream = inputs[layer] if own.parallel else residual_outputs(model, layer, ids)
                read = stream[last]
                keys = ffn_keys(model, block, neuron)
                normed = through(model, block, own.ffn_norm, read, read)

                def asked(
                    v: torch.Tensor,
                    block: Any = block,
                    read: torch.Tensor = read,
                    keys: list[torch.Tensor] = keys,
                    normed: torch.Tensor = normed,
                    importance: float = importance,
                ) -> torch.Tensor:
                    """K_b . v of vectors (..., D)."""
                    v = through(model, block, own.ffn_norm, v, read.expand_as(v))
                    return importance * sum(v @ key * (normed @ key).sign() for key in keys)

                for a in range(layer if own.parallel else layer + 1):
                    block_a = layers(model)[a]
                    size = attention_weight(model, a).shape[0] // n_heads(model)
                    for head in range(n_heads(model)):
                        part = slice(head * size, (head + 1) * size)
                        v = outputs[a][last, part] @ attention_weight(model, a)[part]
                        v = through(model, block_a, own.attention_post, v, added[a])
                        heads[a, head] += asked(v)
                    carry = values_of(model, block_a) @ attention_weight(model, a)
                    for s in range(a):
                        m = coefficients(model, s, ids)
                        for i in range(place):
                            brought = neuron_shares(model, s, m[i])  # (N, D)
                            at = inputs[a][i].expand_as(brought)
                            v = through(model, block_a, own.attention_norm, brought, at) @ carry
                            at = added[a].expand_as(v)
                            v = through(model, block_a, own.attention_post, v, at)
                            neurons[s] += asked(v) / place
            found_heads.append(heads)
            found_neurons.append(neurons)
    return torch.stack(found_heads).mean(0), torch.stack(found_neurons).mean(0)


# The kernels, in float64


def gains(
    logits: torch.Tensor, images: torch.Tensor, coefficients: torch.Tensor, token: int
) -> torch.Tensor:
    """Importance (section 4.1) where x + A has `logits` (V,), neuron k adds m_k images_k, (n,)."""
    before = logits.double().log_softmax(-1)[token]
    return torch.stack(
        [
            (logits.double() + float(m) * image.double()).log_softmax(-1)[token] - before
            for m, image in zip(coefficients, images, strict=True)
        ]
    )


def cases(
    model: Any, prompts: Sequence[Prompt], tuned: Any = None, top_heads: int = 1
) -> list[dict[Unit, float]]:
    """Each case's CNA score of every neuron, the mean over its answer tokens.

    Against the model without the case's own top heads; with `tuned`, of that model against this.
    """
    found = []
    for prompt in prompts:
        if tuned is None:
            change = neuron_scores(model, [prompt], True, top_heads)
        else:
            change = neuron_scores(tuned, [prompt], False) - neuron_scores(model, [prompt], False)
        found.append(
            {
                (layer, neuron): float(change[layer, neuron])
                for layer in range(change.shape[0])
                for neuron in range(change.shape[1])
            }
        )
    return found


def top(case: dict[Unit, float], n: int) -> set[Unit]:
    """The n neurons of one case that change most (section 4.1)."""
    return set(sorted(case, key=lambda unit: -case[unit])[:n])


def union(cases: Sequence[dict[Unit, float]], n: int) -> set[Unit]:
    """Section 6.1: the neurons that are among the n best of at least one case."""
    return {unit for case in cases for unit in top(case, n)}
