"""Prune some, recover, score again, prune more: the way to few heads when one step loses the task.

Every round is the same three steps on the model the round before left: scores, plan, checkpoint
(in memory), then what makes up for the removed. What stays at the end is the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.layout import Kept
from prune_edit.planning import within_layers
from prune_edit.recover.least_squares import EXAMPLES, enough, refit
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.trade import trade
from prune_edit.recover.tuning import KINDS, Tuning, tune
from prune_edit.recover.watch import Watch
from prune_edit.rules import Rules
from prune_edit.running import Progress
from prune_edit.scoring import METHODS, predicted_targets
from prune_edit.scoring.combine import weighted
from prune_edit.scoring.intervention import score_intervention
from prune_edit.scoring.options import Options
from prune_edit.tasks.combine import first
from prune_edit.tasks.prompts import Encoded
from prune_edit.workspace import Workspace

_FEWER = 1536  # that a round's least squares fits to, where more rounds follow


@dataclass(frozen=True)
class Schedule:
    """How fast units go, what makes up for them, and how long each round and the end are tuned."""

    keep_share: float = 0.6  # of the units a round starts with, at the least
    round_tuning: Tuning = field(default_factory=lambda: Tuning(steps=20, warmup=10))
    final_tuning: Tuning = field(default_factory=lambda: Tuning(steps=2400, watched=True))
    neuron_tuning: Tuning = field(default_factory=lambda: Tuning(steps=60, learning_rate=4e-3))
    scoring_examples: int = 96
    recover: str = "full"  # none, mean, least-squares, lora or full

    @classmethod
    def of(cls, kind: str) -> Schedule:
        """The usual schedule of a recovery."""
        if kind == "full":
            return cls()
        if kind not in KINDS:  # rounds cost little and are all that is done: more of them
            return cls(recover=kind, keep_share=0.85)
        # Rounds are gentler than the end: what still works must not be shaken loose again.
        gentle = Tuning(steps=40, kind=kind, learning_rate=4e-3, warmup=10)
        return cls(
            recover=kind,
            round_tuning=gentle,
            final_tuning=Tuning(steps=500, kind=kind, warmup=10, watched=True),
            neuron_tuning=gentle,
        )

    def recovered_by(self, kind: str) -> Schedule:
        """The same schedule for another recovery, all tuning of this kind where it is one."""
        if kind not in KINDS:
            return replace(self, recover=kind)
        tunings = ("round_tuning", "final_tuning", "neuron_tuning")
        tuned = {name: replace(getattr(self, name), kind=kind) for name in tunings}
        return replace(self, recover=kind, **tuned)

    def counts(self, have: int, target: int, rounds: int | None = None) -> list[int]:
        """Unit counts after each round, from just below `have` down to `target`."""
        if rounds is None:
            rounds = max(1, math.ceil(math.log(target / have) / math.log(self.keep_share)))
        ratio = (target / have) ** (1 / rounds)
        counts = [max(target, round(have * ratio**i)) for i in range(1, rounds)]
        return [*counts, target]


@dataclass(frozen=True)
class Rounds:
    """What all rounds of one run share.

    `train` is in canonical order; its first examples are scored. With `must_keep`, those heads stay
    whatever their scores. `teacher` is the dense model's, where runs share it. A finished round is
    found again in `workspace`.
    """

    dense: Decoder
    train: Sequence[Encoded]
    method: str
    options: Options
    schedule: Schedule
    workspace: Workspace
    must_keep: Kept | None = None
    predicted: bool = False
    teacher: Teacher | None = field(default=None, repr=False)
    limit: int | None = None  # of the examples that are scored, averaged over and fitted to
    watch: Watch | None = field(default=None, repr=False)  # of tunings that are watched
    rules: Rules = field(default_factory=Rules)
    neuron_layers: tuple[int, ...] | None = None  # whose neurons may go; None: all

    @property
    def tuned(self) -> bool:
        """Whether rounds end in tuning."""
        return self.schedule.recover in KINDS

    def step(
        self,
        decoder: Decoder,
        heads: int | None,
        neurons: int | None,
        name: str,
        seed: int,
        last: bool = False,
        cost: float | None = None,
    ) -> Decoder:
        """One round: `decoder` with so many of its heads and neurons (None: all), recovered.

        Without `heads`, what the rules' budget keeps of both, or `cost` on the way to it.
        """
        found = self.workspace.load_model(name, decoder)
        if found is not None:
            return found
        schedule = self.schedule
        scored = first(self.train, min(schedule.scoring_examples, self.limit or len(self.train)))
        means = None if schedule.recover == "none" else scored
        labelled = replace(
            self.options,
            progress=_labelled(
                self.options.progress, f"{name if heads is None else heads} heads: "
            ),
            neurons=neurons is not None or heads is None,
        )
        prompts = predicted_targets(decoder, scored, labelled) if self.predicted else scored
        by_mean = means is not None
        head_scores, neuron_scores = weighted(
            lambda rows: _scores(decoder, self.method, rows, labelled, by_mean), prompts
        )
        if self.tuned or schedule.recover == "least-squares":
            head_scores = _spread(head_scores)
        if heads is None:
            scores = head_scores, neuron_scores
            kept_heads, kept_neurons = trade(
                decoder, prompts, scores, self.rules, labelled, by_mean, cost
            )
        else:
            kept_heads = self.rules.heads(_protect(head_scores, self.must_keep), heads)
            kept_neurons = decoder.layout.neurons
            if neurons is not None:
                kept_neurons = self.rules.neurons(
                    within_layers(neuron_scores, self.neuron_layers), neurons, last
                )
        # What is fitted starts from the dense weights: fits of fits add up their noise.
        start = self.dense if schedule.recover == "least-squares" else decoder
        small = shrink(start, kept_heads, kept_neurons, means, labelled)
        tuning = schedule.final_tuning if last else schedule.round_tuning
        small = self.recover(small, tuning, name, seed, labelled, EXAMPLES if last else _FEWER)
        self.workspace.save_model(name, small)
        self.workspace.drop(f"{name}-tuning")
        return small

    def recover(
        self,
        small: Decoder,
        tuning: Tuning,
        name: str,
        seed: int,
        options: Options | None = None,
        examples: int = EXAMPLES,
    ) -> Decoder:
        """The model after what the schedule says makes up for what is gone."""
        options = options or self.options
        if self.tuned:
            seeded = replace(options, seed=options.seed + seed)
            keeper, stage = self.workspace, f"{name}-tuning"
            return tune(
                small, self.train, tuning, seeded, self.teacher, keeper=keeper, stage=stage,
                watch=self.watch,
            )  # fmt: skip
        if self.schedule.recover == "least-squares":
            most = min(examples, self.limit or examples)
            return refit(small, self.dense, enough(self.train, self.dense, most), options)
        return small


def gradual(rounds: Rounds, head_count: int, neuron_count: int | None = None) -> Decoder:
    """The model with `head_count` heads and `neuron_count` neurons (None: all), in rounds."""
    schedule, decoder = rounds.schedule, rounds.dense
    have_heads = sum(map(len, decoder.layout.heads))
    have_neurons = sum(map(len, decoder.layout.neurons))
    # As many rounds as the steeper of the two goes down by.
    steps = max(
        len(schedule.counts(have_heads, head_count)),
        len(schedule.counts(have_neurons, neuron_count or have_neurons)),
    )
    counts = schedule.counts(have_heads, head_count, steps)
    ratio = 1.0 if neuron_count is None else (neuron_count / have_neurons) ** (1 / steps)
    for number, heads in enumerate(counts, 1):
        last = number == len(counts)
        neurons = neuron_count
        if neuron_count is not None and not last:
            neurons = round(have_neurons * ratio**number)
        decoder = rounds.step(decoder, heads, neurons, f"round-{number}", number, last)
    return decoder


def gradual_cost(rounds: Rounds) -> Decoder:
    """The model within the rules' budget, its cost going down in rounds by equal shares."""
    rules, decoder = rounds.rules, rounds.dense
    assert rules.costs is not None and rules.budget is not None
    have = rules.costs.of(decoder.layout)
    share = rules.budget / have
    steps = max(1, math.ceil(math.log(share) / math.log(rounds.schedule.keep_share)))
    for number in range(1, steps + 1):
        last = number == steps
        cost = None if last else have * share ** (number / steps)
        decoder = rounds.step(decoder, None, None, f"round-{number}", number, last, cost)
    return decoder


def _scores(
    decoder: Decoder, method: str, prompts: Sequence[Encoded], options: Options, by_mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The method's scores; heads are ablated to their mean where removal leaves them there."""
    if method not in ("cna", "circuit", "cna-cases", "importance", "intervention"):
        return METHODS[method](decoder, prompts, options)
    ablated = replace(options, ablation="mean" if by_mean else "zero")
    if method == "intervention" or not options.neurons:
        return score_intervention(decoder, prompts, ablated)
    heads, _ = score_intervention(decoder, prompts, replace(ablated, neurons=False))
    return heads, METHODS[method](decoder, prompts, options)[1]


def _spread(scores: torch.Tensor) -> torch.Tensor:
    """Each head's score over its rank within its layer, (L, H).

    Tuning (and, less so, refitting) lets the heads of one layer stand in for each other, which it
    cannot do for a layer that lost them all; single ablations before tuning do not show that.
    Negative scores stay.
    """
    order = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1) + 1
    return torch.where(scores > 0, scores / ranks, scores)


def _protect(scores: torch.Tensor, must_keep: Kept | None) -> torch.Tensor:
    if must_keep is None:
        return scores
    scores = scores.clone()
    for layer, units in enumerate(must_keep):
        scores[layer, list(units)] = torch.inf
    return scores


def _labelled(progress: Progress, label: str) -> Progress:
    """The same progress with the round's name in front."""

    def labelled(what: str, done: int, total: int) -> None:
        progress(label + what, done, total)

    return labelled
