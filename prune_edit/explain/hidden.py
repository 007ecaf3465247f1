"""Hidden-interpretable neurons: shallow ones that say a task's words only after attention.

arXiv 2409.14144, section 4.4 (table 8). The top tokens of a shallow neuron's value vector say
nothing of the task; carried through some higher layer's value-output map, they do: at least M of
its concepts are among them. The paper reads 50 tokens of 32,000; a smaller vocabulary is read less
deep, since 50 of a few hundred tokens name any concept by chance. How likely chance is to name M is
told beside the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.answers import answers_with
from prune_edit.explain.question import Question
from prune_edit.explain.values import Shown, shallow_layers
from prune_edit.running import Running
from prune_edit.scoring.cases import present_neurons
from prune_edit.scoring.query import value_map
from prune_edit.tasks.numbers import TENS, UNITS
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units

LEAST = (1, 2, 3)
"""The paper's M."""
_OPERATIONS = {
    "addition": ("plus", "sum", "add", "added", "adding", "addition", "total", "+"),
    "subtraction": ("minus", "difference", "subtract", "subtracted", "subtraction", "-"),
    "multiplication": ("times", "product", "multiply", "multiplied", "multiplication", "*", "×"),
    "division": ("ratio", "divide", "divides", "divided", "division", "quotient", "/", "÷"),
}
_WORDS = {
    **{word: str(i) for i, word in enumerate(UNITS)},
    **{word: str(10 * i + 20) for i, word in enumerate(TENS)},
    **{word: name for name, words in _OPERATIONS.items() for word in words},
}
_CHUNK = 1 << 26  # logits at once


@dataclass(frozen=True)
class Concepts:
    """Which tokens (ids) speak of which concept of a task."""

    name: str
    of: Mapping[int, str]

    def __len__(self) -> int:
        return len(set(self.of.values()))


def arithmetic_concepts(decoder: Decoder) -> Concepts:
    """Numbers, as digits or words, and the four operations; one concept however it is written."""
    found = {}
    for token, text in _vocabulary(decoder):
        if text.isdecimal():
            found[token] = str(int(text))
        elif text in _WORDS:
            found[token] = _WORDS[text]
    return Concepts("numbers and operations", found)


def question_concepts(decoder: Decoder, question: Question) -> Concepts:
    """Arithmetic's where the answer is a number, else the words of prompt and answer."""
    known = arithmetic_concepts(decoder)
    answer = question.row.answer[0]
    if known.of.get(answer, "").isdecimal():
        return known
    special = set(decoder.tokenizer.all_special_ids)
    used = {
        str(decoder.tokenizer.decode([token])).strip().lower()
        for token in question.row.ids
        if token not in special
    }
    used = {text for text in used if any(map(str.isalnum, text))}
    own = {token: text for token, text in _vocabulary(decoder) if text in used}
    return Concepts("words of the prompt and its answer", own)


def _vocabulary(decoder: Decoder) -> Iterator[tuple[int, str]]:
    size = min(len(decoder.unembedding), len(decoder.tokenizer))
    texts = decoder.tokenizer.batch_decode([[token] for token in range(size)])
    for token, text in enumerate(texts):
        yield token, str(text).strip().lower()


def reading_depth(decoder: Decoder) -> int:
    """How many top tokens are read: 50, or 1 in 64 of a small vocabulary, at least 5."""
    size = len(decoder.unembedding)
    return min(50, max(5, size // 64), size)


@dataclass(frozen=True)
class HiddenRow(Shown):
    """The shallow neurons whose tokens name at least `least` concepts after a layer's map only.

    `share` is theirs of all shallow neurons, `chance` the probability that as many tokens drawn
    from the vocabulary name as many concept words. Accuracy (a share) and mean log probability
    (nats) are those with these neurons zeroed, the random ones with as many others of the same
    layers, means over draws.
    """

    kind: ClassVar[str] = "hidden row"

    least: int
    neurons: int
    share: float
    chance: float
    accuracy: float
    log_prob: float
    random_accuracy: float
    random_log_prob: float


@dataclass(frozen=True)
class Hidden(Shown):
    """Hidden-interpretable sets by M, read `tokens` deep, beside the whole model's figures."""

    kind: ClassVar[str] = "hidden"

    concepts: str
    layers: tuple[int, ...]
    tokens: int
    examples: int
    accuracy: float
    log_prob: float
    rows: tuple[HiddenRow, ...]


@torch.no_grad()
def explain_hidden(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    options: Running,
    concepts: Concepts | None = None,
    least: Sequence[int] = LEAST,
    layers: Sequence[int] | None = None,
    tokens: int | None = None,
    draws: int = 3,
) -> Hidden:
    """Find the sets in the shallow layers and zero them, random ones beside them (table 8).

    `layers` default to the lower half's, 0 to 15 of 32; `tokens` to `reading_depth`.
    """
    chosen = tuple(shallow_layers(decoder.n_layers) if layers is None else layers)
    concepts = arithmetic_concepts(decoder) if concepts is None else concepts
    depth = reading_depth(decoder) if tokens is None else tokens
    before, after = concept_counts(decoder, options, concepts, chosen, depth)
    inside = torch.zeros(decoder.n_layers, 1, dtype=torch.bool)
    inside[list(chosen)] = True
    pool = present_neurons(decoder) & inside
    whole = answers_with(decoder, prompts, options)
    generator = torch.Generator().manual_seed(options.seed)
    rows = []
    for m in least:
        found = pool & (before < m) & (after >= m)
        count = int(found.sum())
        own = _zeroed(decoder, prompts, options, found)
        places = pool.flatten().nonzero()[:, 0]
        random = []
        for _ in range(draws):
            some = places[torch.randperm(len(places), generator=generator)[:count]]
            drawn = torch.zeros(pool.numel(), dtype=torch.bool)
            drawn[some] = True
            random.append(_zeroed(decoder, prompts, options, drawn.view_as(pool)))
        rows.append(
            HiddenRow(
                least=m,
                neurons=count,
                share=count / max(1, int(pool.sum())),
                chance=_chance(len(decoder.unembedding), len(concepts.of), depth, m),
                accuracy=own[0],
                log_prob=own[1],
                random_accuracy=sum(each[0] for each in random) / max(1, draws),
                random_log_prob=sum(each[1] for each in random) / max(1, draws),
            )
        )
    return Hidden(
        concepts=concepts.name,
        layers=chosen,
        tokens=depth,
        examples=len(prompts),
        accuracy=whole.accuracy,
        log_prob=whole.log_prob,
        rows=tuple(rows),
    )


def concept_counts(
    decoder: Decoder, running: Running, concepts: Concepts, layers: Sequence[int], depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many concepts each neuron's `depth` top tokens name: itself, and at best after a higher
    layer's value-output map; (L, N) int64 each, 0 outside `layers`.
    """
    before = torch.zeros(decoder.neuron_shape, dtype=torch.long)
    after = torch.zeros(decoder.neuron_shape, dtype=torch.long)
    have = [layer for layer in layers if decoder.layout.neurons[layer]]
    for layer in have:
        named = count_named(decoder, decoder.residual_values(layer), concepts, depth)
        before[layer, decoder.neuron_slots[layer]] = named
    for above in range(min(have, default=0) + 1, decoder.n_layers):
        values = value_map(decoder, above, running)
        if values is None:
            continue
        for layer in (each for each in have if each < above):
            carried = carry(decoder, above, values, decoder.residual_values(layer))
            named = count_named(decoder, carried, concepts, depth)
            slots = decoder.neuron_slots[layer]
            after[layer, slots] = torch.maximum(after[layer, slots], named)
    return before, after


def carry(
    decoder: Decoder, layer: int, values: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """Vectors (..., D) through a layer's value-output map, all heads together; its divisors, which
    change no order of tokens, left out. `values` is the layer's `value_map`.
    """
    projection = decoder.attention_output(layer)
    assert projection is not None
    out = vectors.float() @ values @ decoder.output_weight(projection).detach().float()
    norm = decoder.attention_output_norm(layer)
    return out if norm is None else out * decoder.norm_weight(norm)


def count_named(
    decoder: Decoder, vectors: torch.Tensor, concepts: Concepts, depth: int
) -> torch.Tensor:
    """How many concepts the `depth` top tokens of each vector (n, D) name, (n,) int64."""
    names = sorted(set(concepts.of.values()))
    unembedding = decoder.unembedding.float()
    speaks = torch.full((len(unembedding),), len(names))
    for token, name in concepts.of.items():
        speaks[token] = names.index(name)
    speaks = speaks.to(unembedding.device)
    found = []
    for some in vectors.float().split(max(1, _CHUNK // len(unembedding))):
        top = (some @ unembedding.T).topk(depth, dim=1).indices
        named = torch.zeros(len(some), len(names) + 1, device=top.device)
        named.scatter_(1, speaks[top], 1.0)
        found.append(named[:, :-1].sum(1).long().cpu())
    return torch.cat(found)


def _zeroed(
    decoder: Decoder, prompts: Sequence[Encoded], running: Running, gone: torch.Tensor
) -> tuple[float, float]:
    found = answers_with(
        decoder, prompts, running, "hidden neurons", lambda rows: Units(neurons=(~gone).float())
    )
    return found.accuracy, found.log_prob


def _chance(vocabulary: int, words: int, depth: int, least: int) -> float:
    """Probability of at least `least` concept words among `depth` tokens of the vocabulary."""
    ways = math.comb(vocabulary, depth)
    below = sum(
        math.comb(words, k) * math.comb(vocabulary - words, depth - k) for k in range(least)
    )
    return 1 - below / ways
