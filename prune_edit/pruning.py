"""One run of `prune`, in memory: scores, heads, the recovery they ask for, then the neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.layout import Kept
from prune_edit.planning import Budget, keep_top
from prune_edit.planning import keep_neurons as best_neurons
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.shrink import shrink
from prune_edit.recover.tuning import FULL_LIMIT, KINDS, Teacher, tune
from prune_edit.samples import SCORING_EXAMPLES, VALIDATION_EXAMPLES, Samples
from prune_edit.scoring import METHODS, Options, Scores, predicted_targets
from prune_edit.scoring.run import score_task
from prune_edit.search import smallest_neurons
from prune_edit.tasks.prompts import Encoded
from prune_edit.workspace import Workspace

Note = Callable[[str], None]

_SENSIBLE = 0.5  # of the answers right in the dense model, for accuracy to guide anything
_TURNS = 4  # of removing neurons and tuning
_WORTH = 0.04  # of the neurons, for another turn


@dataclass
class Recovery:
    """What makes up for removed units: `recover`, or what validation asks for where it is `auto`.

    `recovered` says which it was, once `settle` has been asked.
    """

    dense: Decoder
    data: Samples
    recover: str
    max_drop: float
    method: str
    target: str
    options: Options
    workspace: Workspace
    note: Note
    schedule: Schedule | None = None
    recovered: str = ""
    teacher: Teacher | None = field(default=None, repr=False)

    @cached_property
    def scoring(self) -> list[Encoded]:
        """The train prompts that are scored and averaged over."""
        return self.data.encoded("train", SCORING_EXAMPLES)

    @cached_property
    def validation(self) -> list[Encoded]:
        """The prompts that budgets and recoveries are chosen by."""
        return self.data.encoded("validation", VALIDATION_EXAMPLES)

    @property
    def means(self) -> list[Encoded] | None:
        """The prompts whose means replace removed units; None for zero."""
        return None if self.recover == "none" else self.scoring

    @property
    def tuned(self) -> bool:
        """Whether the model is tuned."""
        return self.recovered in KINDS

    def accuracy(self, decoder: Decoder) -> float:
        """Of a model on the validation prompts, in percent."""
        return 100 * measure_accuracy(decoder, self.validation, self.options, "validation").value

    def settle(self, heads: Kept, neurons: Kept) -> Decoder | None:
        """Decide on the recovery; the model with these units where it needs no tuning."""
        if self.recover in KINDS:
            self.recovered = self.recover
            return None
        small = shrink(self.dense, heads, neurons, self.means, self.options)
        self.recovered = "none" if self.recover == "none" else "mean"
        if self.recover != "auto":
            return small
        dense, left = self.accuracy(self.dense), self.accuracy(small)
        said = f"mean compensation alone: {left:.1f} % on validation, dense {dense:.1f} %"
        if dense < 100 * _SENSIBLE:
            self.note(
                f"the dense model answers {dense:.1f} % of this task itself: what pruning costs "
                "cannot be judged by it"
            )
        if dense - left <= self.max_drop + 1e-9:
            self.note(f"{said}; no tuning needed")
            return small
        size = self.dense.parameters_count()
        self.recovered = "full" if size <= FULL_LIMIT else "lora"
        self.note(f"{said}; tuning gradually ({self.recovered})")
        return None

    def gradually(
        self, heads: int, neurons: int | None = None, must_keep: Kept | None = None
    ) -> Decoder:
        """Down to so many heads and neurons (None: all), tuned on the way."""
        chosen = self.schedule or Schedule.of(self.recovered)
        self.schedule = chosen.tuned_by(self.recovered)
        self.teacher = Teacher(self.dense)
        return gradual(
            self.dense,
            self.data.train(),
            self.method,
            heads,
            neurons,
            self.options,
            self.schedule,
            self.workspace,
            must_keep=must_keep,
            predicted=self.target == "predicted",
            teacher=self.teacher,
        )

    def with_neurons(self, small: Decoder, kept: Kept, stage: str) -> Decoder:
        """The model with these of its neurons, tuned again where its heads were."""
        found = self.workspace.load_model(stage, small)
        if found is not None:
            return found
        fewer = shrink(small, small.layout.heads, kept, self.means, self.options)
        if self.tuned and kept != small.layout.neurons:
            assert self.schedule is not None
            tuned = tune(
                fewer,
                self.data.train(),
                self.schedule.neuron_tuning,
                self.options,
                self.teacher,
                what=f"{sum(map(len, kept))} neurons: tuning",
                keeper=self.workspace,
                stage=f"{stage}-tuning",
            )
            fewer = tuned if self.accuracy(tuned) >= self.accuracy(fewer) else fewer
        self.workspace.save_model(stage, fewer)
        return fewer


@dataclass
class Pruning:
    """One run of `prune`: scores, then the recovery that the validation accuracy asks for."""

    recovery: Recovery
    head_budget: Budget
    neuron_budget: Budget | None

    def result(self) -> tuple[Decoder, Scores]:
        """The pruned model in memory, and the scores of the dense one."""
        recovery, dense = self.recovery, self.recovery.dense
        layout, method = dense.layout, recovery.method
        head_count = self.head_budget.of(sum(map(len, layout.heads)), "--keep-heads")
        total = sum(map(len, layout.neurons))
        neuron_count = None
        if self.neuron_budget is not None:
            neuron_count = self.neuron_budget.of(total, "--keep-neurons")
            neuron_count = None if neuron_count == total else neuron_count
        # Neurons by intervention take very long: only where the user gives a number of them.
        ranked = method != "intervention" or neuron_count is not None
        scores = recovery.workspace.load_scores()
        if scores is None:
            options = replace(recovery.options, neurons=ranked)
            scores = score_task(
                dense, recovery.data.task, recovery.scoring, method, recovery.target, options
            )
            recovery.workspace.save_scores(scores)
        heads = keep_top(scores.heads, head_count)
        neurons = layout.neurons if not neuron_count else best_neurons(scores.neurons, neuron_count)
        small = recovery.settle(heads, neurons)
        if small is None:
            small = recovery.gradually(head_count, neuron_count)
        if self.neuron_budget is None and not ranked:
            recovery.note(
                f"--score {method} ranks heads alone: all neurons stay (a number of "
                "--keep-neurons ranks them too, very slowly)"
            )
        elif self.neuron_budget is None:
            small = self._fewer_neurons(small, scores)
        return small, scores

    def _fewer_neurons(self, small: Decoder, scores: Scores) -> Decoder:
        """The fewest neurons that keep the accuracy, in turns with tuning for tuned heads."""
        recovery = self.recovery
        floor = recovery.accuracy(small) - recovery.max_drop
        for turn in range(1, 1 + (_TURNS if recovery.tuned else 1)):
            ranks, scoring = scores.neurons, recovery.scoring
            if recovery.tuned:  # the tuned model's neurons are worth what they are now
                if recovery.target == "predicted":
                    scoring = predicted_targets(small, scoring, recovery.options)
                ranks = METHODS[recovery.method](small, scoring, recovery.options)[1]
            have = small.layout.neurons
            kept = smallest_neurons(
                small, ranks, recovery.validation, recovery.means, floor / 100, recovery.options
            )
            small = recovery.with_neurons(small, kept, f"neurons-{turn}")
            before, after = (sum(map(len, units)) for units in (have, kept))
            if before - after < _WORTH * before:
                break
        return small
