"""Chain: the four stages of one prediction as a graph that can be followed and verified.

arXiv 2409.14144, figure 1 and sections 4 and 5:

1. feature enhancing: shallow FFN neurons at the prompt's tokens;
2. feature transferring: attention carries what they say to the last position, by each head's
   value-output map and where it looks;
3. feature predicting: the heads that the answer costs most to lose activate deep neurons;
4. prediction enhancing: deep neurons activate deeper ones along the PE-DAG, and add the answer.

Edges are direct paths, read off the weights with everything else as it is. The `share` of an edge
into a deep neuron is the part of its key products that the source brings, summed over gate and up:
about the share of its coefficient that goes without the edge. Into a head, it is the part of what
the head brings the deep neurons' keys. `product` is the plain inner product of what is brought with
the key (norm folded in) or with what the keys look for. `verify.py` cuts the edges for real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_edit.decoder import Decoder
from prune_edit.explain.hidden import Concepts, count_named, question_concepts, reading_depth
from prune_edit.explain.neurons import Neurons
from prune_edit.explain.paths import Paths, Shallow, trace_paths
from prune_edit.explain.question import Question
from prune_edit.explain.values import Grid, Shown, Tokens, best_of, grid_of
from prune_edit.explain.verify import Cut, cut_edges
from prune_edit.scoring.intervention import all_head_drops
from prune_edit.scoring.options import Options
from prune_edit.scoring.projection import project

STAGES = ("feature enhancing", "feature transferring", "feature predicting", "prediction enhancing")


@dataclass(frozen=True)
class Size(Shown):
    """How many nodes of each kind, and edges into each, a chain shows."""

    kind: ClassVar[str] = "size"

    shallow: int = 8
    heads: int = 5
    deep: int = 8
    edges: int = 3


@dataclass(frozen=True)
class ShallowNode(Shown):
    """A shallow neuron at a token: what it says itself and after the map of `layer_after`.

    `score` is what it brings the deep neurons' keys through attention, as a share of the sizes of
    all that heads bring; `before` and `after` are top tokens in the direction it is used in, with
    the number of concepts named among those read. It is `hidden` if only the latter name any.
    """

    kind: ClassVar[str] = "shallow"

    name: str
    layer: int
    neuron: int
    position: int
    token: str
    coefficient: float
    score: float
    layer_after: int
    before: Tokens
    after: Tokens
    concepts_before: int
    concepts_after: int
    hidden: bool


@dataclass(frozen=True)
class HeadNode(Shown):
    """A head of the chain: the nats that the answer loses without it, and what it brings the deep
    neurons as a share of the sizes of all that heads bring. `predicts` or only transfers.
    """

    kind: ClassVar[str] = "chain head"

    name: str
    layer: int
    head: int
    drop: float
    brings: float
    predicts: bool


@dataclass(frozen=True)
class DeepNode(Shown):
    """A deep neuron: its CNA score and importance in nats. The root is the lowest of the PE-DAG."""

    kind: ClassVar[str] = "deep"

    name: str
    layer: int
    neuron: int
    change: float
    importance: float
    coefficient: float
    says: Tokens
    root: bool


@dataclass(frozen=True)
class Edge(Shown):
    """From `source` to `target`; where it was verified, what cutting this edge alone did.

    `source` is a token (`3 @2`), a neuron, a head or a neuron at a token (`1_7 @2`); `target` a
    head, a neuron or the answer. An edge to the answer has its importance (nats) for `product`, and
    no share. `measured_share` is the share that the target lost of its coefficient, or of what it
    brings; `measured_drop` what the answer's log probability lost, in nats.
    """

    kind: ClassVar[str] = "edge"

    stage: str
    source: str
    target: str
    share: float | None
    product: float
    measured_share: float | None = None
    measured_drop: float | None = None


@dataclass(frozen=True)
class Chain(Shown):
    """The graph of one prediction.

    `carriers` (L, T): what each layer brings the deep neurons from each token, as a share of the
    sizes of all of it. `concepts` is what is looked for among `tokens_read` top tokens.
    """

    kind: ClassVar[str] = "chain"

    tokens: tuple[str, ...]
    answer: str
    concepts: str
    tokens_read: int
    shallow: tuple[ShallowNode, ...]
    carriers: Grid
    heads: tuple[HeadNode, ...]
    deep: tuple[DeepNode, ...]
    edges: tuple[Edge, ...]
    verified: bool


def explain_chain(
    decoder: Decoder,
    question: Question,
    neurons: Neurons,
    options: Options,
    verify: bool = False,
    size: Size | None = None,
    concepts: Concepts | None = None,
    drops: torch.Tensor | None = None,
) -> Chain:
    """Follow one prediction back; `neurons` are the question's own (`explain_neurons`).

    With `verify`, every edge is cut and the effect measured. `drops` (L, H) are what the answer
    loses without each head, where they are known.
    """
    size = size or Size()
    concepts = concepts or question_concepts(decoder, question)
    drops = all_head_drops(decoder, [question.row], options)[0] if drops is None else drops
    chosen = [
        (layer, neuron)
        for layer, neuron in best_of(neurons.means.change, size.deep)
        if float(neurons.means.change[layer, neuron]) > 0
        and float(neurons.means.importance[layer, neuron]) > 0
    ]
    weights = {unit: float(neurons.means.importance[unit]) for unit in chosen}
    paths = trace_paths(decoder, question.batch(decoder), weights, options)
    predicting = [unit for unit in best_of(drops, size.heads) if float(drops[unit]) > 0]
    shallow = paths.best_shallow(size.shallow, set(chosen))
    # The heads that carry most of the shallow neurons belong to the graph as well.
    heads = sorted({*predicting, *(paths.best_head(each) for each in shallow)})
    cuts = _cuts(paths, shallow, heads, chosen, size.edges)
    cuts.sort(key=lambda cut: STAGES.index(_STAGE_OF[cut.kind]))
    if verify:
        cuts = cut_edges(decoder, question.batch(decoder), paths, cuts, options)
    root = min(chosen, default=None)
    return Chain(
        tokens=question.tokens,
        answer=question.answer,
        concepts=concepts.name,
        tokens_read=reading_depth(decoder),
        shallow=tuple(_shallow_node(decoder, question, paths, each, concepts) for each in shallow),
        carriers=grid_of(paths.carriers),
        heads=tuple(
            HeadNode(
                name=f"{layer}^{head}",
                layer=layer,
                head=head,
                drop=float(drops[layer, head]),
                brings=paths.brings(layer, head),
                predicts=(layer, head) in predicting,
            )
            for layer, head in heads
        ),
        deep=tuple(_deep_node(decoder, neurons, unit, unit == root) for unit in chosen),
        edges=tuple(_edge(question, neurons, cut) for cut in cuts),
        verified=verify,
    )


def _cuts(
    paths: Paths,
    shallow: Sequence[Shallow],
    heads: Sequence[tuple[int, int]],
    deep: Sequence[tuple[int, int]],
    most: int,
) -> list[Cut]:
    """The strongest edges into every node of the graph."""
    found: list[Cut] = []
    for each in shallow:
        head = paths.best_head(each)
        found.append(Cut("neuron to head", each, head, *paths.shallow_edge(each, head)))
    for head in heads:
        cuts = [
            Cut("token to head", place, head, *paths.token_edge(place, head))
            for place in range(paths.length)
        ]
        found += _strongest(cuts, min(2, most))
    for unit in deep:
        cuts = [
            Cut("head to neuron", head, unit, *paths.head_edge(head, unit))
            for head in heads
            if paths.reaches(head, unit)
        ]
        found += _strongest(cuts, most)
        cuts = [
            Cut("neuron to neuron", low, unit, *paths.neuron_edge(low, unit))
            for low in deep
            if low[0] < unit[0]
        ]
        found += _strongest(cuts, most)
        found.append(Cut("neuron to answer", unit, None, None, paths.weights[unit]))
    return found


def _strongest(cuts: list[Cut], most: int) -> list[Cut]:
    return sorted(cuts, key=lambda cut: -abs(cut.share or 0.0))[:most]


def _shallow_node(
    decoder: Decoder, question: Question, paths: Paths, each: Shallow, concepts: Concepts
) -> ShallowNode:
    layer_after = paths.best_head(each)[0]
    before, after = paths.said(decoder, each, layer_after)
    depth = reading_depth(decoder)
    named = [
        int(count_named(decoder, vector[None], concepts, depth)[0]) for vector in (before, after)
    ]
    return ShallowNode(
        name=f"{each.layer}_{each.neuron}",
        layer=each.layer,
        neuron=each.neuron,
        position=each.position,
        token=question.tokens[each.position],
        coefficient=each.coefficient,
        score=each.score / paths.total,
        layer_after=layer_after,
        before=project(decoder, before),
        after=project(decoder, after),
        concepts_before=named[0],
        concepts_after=named[1],
        hidden=named[0] == 0 and named[1] > 0,
    )


def _deep_node(decoder: Decoder, neurons: Neurons, unit: tuple[int, int], root: bool) -> DeepNode:
    layer, neuron = unit
    coefficient = float(neurons.means.coefficient[unit])
    value = decoder.residual_values(layer)[decoder.neuron_slots[layer].tolist().index(neuron)]
    return DeepNode(
        name=f"{layer}_{neuron}",
        layer=layer,
        neuron=neuron,
        change=float(neurons.means.change[unit]),
        importance=float(neurons.means.importance[unit]),
        coefficient=coefficient,
        says=project(decoder, -value if coefficient < 0 else value),
        root=root,
    )


_STAGE_OF = {
    "neuron to head": STAGES[0],
    "token to head": STAGES[1],
    "head to neuron": STAGES[2],
    "neuron to neuron": STAGES[3],
    "neuron to answer": STAGES[3],
}


def _edge(question: Question, neurons: Neurons, cut: Cut) -> Edge:
    """A cut under the names of its ends."""

    def unit(value: tuple[int, int], mark: str) -> str:
        return f"{value[0]}{mark}{value[1]}"

    source, target = cut.source, cut.target
    if isinstance(source, Shallow):
        named = f"{source.layer}_{source.neuron} @{source.position}"
    elif isinstance(source, int):
        named = f"{question.tokens[source]} @{source}"
    else:
        named = unit(source, "^" if cut.kind == "head to neuron" else "_")
    mark = "^" if cut.kind.endswith("head") else "_"
    return Edge(
        stage=_STAGE_OF[cut.kind],
        source=named,
        target=question.answer if target is None else unit(target, mark),
        share=cut.share,
        product=cut.product,
        measured_share=cut.measured_share,
        measured_drop=cut.measured_drop,
    )
