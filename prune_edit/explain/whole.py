"""Whole explanations: of a prompt, of a task, of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prune_edit.decoder import Decoder
from prune_edit.evaluation.comparison import environment
from prune_edit.explain.carry import explain_carries
from prune_edit.explain.chain import Chain, explain_chain
from prune_edit.explain.curves import (
    COUNTS,
    Curves,
    Lowest,
    explain_curves,
    explain_lowest,
)
from prune_edit.explain.depth import Depth, explain_depth
from prune_edit.explain.heads import Attention, HeadMaps, attention_of, explain_heads
from prune_edit.explain.hidden import Hidden, explain_hidden, question_concepts
from prune_edit.explain.lora import Lora, explain_lora
from prune_edit.explain.neurons import Neurons, explain_neurons
from prune_edit.explain.question import Question, ask
from prune_edit.explain.values import Shown
from prune_edit.report.explained import page
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded

SCHEMA_VERSION = 1
_LOOKED_AT = 6  # heads whose attention is shown


@dataclass(frozen=True)
class About(Shown):
    """Whose explanation this is: names that are no paths, and what it was made with."""

    kind: ClassVar[str] = "about"

    model: str
    model_digest: str
    environment: Mapping[str, Any]


def about_of(decoder: Decoder, options: Options, name: str | None = None) -> About:
    """Where an explanation comes from, under the model's `name` (default: its folder's or id)."""
    if name is None:
        name = Path(decoder.source).name if Path(decoder.source).is_dir() else decoder.source
    return About(name, decoder.digest, environment(decoder, options.seed))


class Whole(Shown):
    """An explanation of its own, with a page. A subclass is a frozen dataclass."""

    def to_dict(self) -> dict[str, Any]:
        """As explanation.json has it."""
        return {"schema": SCHEMA_VERSION, "kind": self.kind, **super().to_dict()}

    def to_html(self) -> str:
        """One page that needs nothing else."""
        return page(self.to_dict())


@dataclass(frozen=True)
class PromptExplanation(Whole):
    """One prediction: heads, what the top ones look at, neurons, depth, chain, curves, the lowest
    neuron, hidden-interpretable sets by the chain's concepts.
    """

    kind: ClassVar[str] = "prompt"

    about: About
    question: Question
    heads: HeadMaps
    attention: Attention
    neurons: Neurons
    depth: Depth
    chain: Chain
    curves: Curves
    lowest: Lowest
    hidden: Hidden


@dataclass(frozen=True)
class TaskExplanation(Whole):
    """A task: heads per group, sums with and without a carry (`carries`, where there are such),
    neurons, depth, curves, the lowest neuron, hidden-interpretable sets.
    """

    kind: ClassVar[str] = "task"

    about: About
    task: str
    examples: int
    notes: tuple[str, ...]
    heads: HeadMaps
    carries: HeadMaps | None
    neurons: Neurons
    depth: Depth
    curves: Curves
    lowest: Lowest
    hidden: Hidden


@dataclass(frozen=True)
class LoraExplanation(Whole):
    """What an adapter changes, over a task's prompts or one."""

    kind: ClassVar[str] = "lora"

    about: About
    adapter: str
    task: str
    notes: tuple[str, ...]
    lora: Lora


def explain_prompt(
    decoder: Decoder,
    prompt: str,
    options: Options,
    about: About | None = None,
    answer: str | None = None,
    token: int | None = None,
    verify: bool = False,
    top: int = 10,
) -> PromptExplanation:
    """All that is known of why the model says what it says after a prompt. Raises as `ask`."""
    question = ask(decoder, prompt, answer, token)
    heads = explain_heads(decoder, [question.row], options)
    drops = heads.of().drops
    neurons = explain_neurons(decoder, [question.row], options, top, drops[None])
    looked_at = heads.of().best(_LOOKED_AT)
    return PromptExplanation(
        about=about or about_of(decoder, options),
        question=question,
        heads=heads,
        attention=attention_of(decoder, question.batch(decoder), question.tokens, looked_at),
        neurons=neurons,
        depth=explain_depth(decoder, [question.row], options),
        chain=explain_chain(decoder, question, neurons, options, verify, drops=drops),
        curves=explain_curves(
            decoder, [question.row], options, changes=neurons.means.change[None].float()
        ),
        lowest=explain_lowest(decoder, [question.row], options),
        hidden=explain_hidden(
            decoder, [question.row], options, question_concepts(decoder, question)
        ),
    )


def explain_task(
    decoder: Decoder,
    task: str,
    prompts: Sequence[Encoded],
    options: Options,
    about: About | None = None,
    top: int = 10,
    counts: Sequence[int] = COUNTS,
) -> TaskExplanation:
    """How the model does a task, over these prompts."""
    heads = explain_heads(decoder, prompts, options)
    notes = []
    if heads.of().accuracy < 1:
        notes.append(
            f"the model answers {heads.of().accuracy:.1%} of the prompts; scores are of the right "
            "answers, which it does not always give"
        )
    return TaskExplanation(
        about=about or about_of(decoder, options),
        task=task,
        examples=len(prompts),
        notes=tuple(notes),
        heads=heads,
        carries=explain_carries(decoder, prompts, options),
        neurons=explain_neurons(decoder, prompts, options, top),
        depth=explain_depth(decoder, prompts, options),
        curves=explain_curves(decoder, prompts, options, counts),
        lowest=explain_lowest(decoder, prompts, options, counts),
        hidden=explain_hidden(decoder, prompts, options),
    )


def explain_adapter(
    decoder: Decoder,
    adapted: Decoder,
    adapter: str,
    task: str,
    prompts: Sequence[Encoded],
    options: Options,
    about: About | None = None,
    notes: Sequence[str] = (),
    top: int = 10,
) -> LoraExplanation:
    """What an adapter changes. Raises ModelError where it is not this model's."""
    lora = explain_lora(decoder, adapted, prompts, options, top=top)
    about = about or about_of(decoder, options)
    return LoraExplanation(about, adapter, task, tuple(notes), lora)
