"""One run of `prune`, in memory: scores, heads, the recovery they ask for, then the neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.planning import Budget, Kept, keep_top
from prune_edit.planning import keep_neurons as best_neurons
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.lora import Teacher, tune
from prune_edit.recover.shrink import shrink
from prune_edit.samples import SCORING_EXAMPLES, VALIDATION_EXAMPLES, Samples
from prune_edit.scoring import METHODS, Options, Scores, predicted_targets
from prune_edit.scoring.run import score_task
from prune_edit.search import smallest_neurons
from prune_edit.tasks.prompts import Encoded
from prune_edit.workspace import Workspace

Note = Callable[[str], None]


@dataclass
class Pruning:
    """One run of `prune`: scores, then the recovery that the validation accuracy asks for."""

    dense: Decoder
    data: Samples
    head_budget: Budget
    neuron_budget: Budget | None
    max_drop: float
    method: str
    target: str
    recover: str
    options: Options
    schedule: Schedule
    workspace: Workspace
    note: Note
    recovered: str = ""

    def result(self) -> tuple[Decoder, Scores]:
        """The pruned model in memory, and the scores of the dense one."""
        layout = self.dense.layout
        head_count = self.head_budget.of(sum(map(len, layout.heads)), "--keep-heads")
        total = sum(map(len, layout.neurons))
        neuron_count = self.neuron_budget and self.neuron_budget.of(total, "--keep-neurons")
        if neuron_count == total:
            neuron_count = None
        # Neurons by intervention take very long: only where the user gives a number of them.
        ranked = self.method != "intervention" or neuron_count is not None
        scoring = self.data.encoded("train", SCORING_EXAMPLES)
        self.validation = self.data.encoded("validation", VALIDATION_EXAMPLES)
        scores = self.workspace.load_scores()
        if scores is None:
            options = replace(self.options, neurons=ranked)
            scores = score_task(
                self.dense, self.data.task, scoring, self.method, self.target, options
            )
            self.workspace.save_scores(scores)
        heads = keep_top(scores.heads, head_count)
        neurons = layout.neurons if not neuron_count else best_neurons(scores.neurons, neuron_count)
        means = None if self.recover == "none" else scoring
        self.recovered = "none" if self.recover == "none" else "mean"
        if self.recover == "lora" or (
            self.recover == "auto" and self._loses(heads, neurons, means)
        ):
            self.recovered = "lora"
            small = gradual(
                self.dense,
                self.data.train(),
                self.method,
                head_count,
                neuron_count or None,
                self.options,
                self.schedule,
                self.workspace,
                predicted=self.target == "predicted",
            )
        else:
            small = shrink(self.dense, heads, neurons, means, self.options)
        if self.neuron_budget is None and not ranked:
            self.note(
                f"--score {self.method} ranks heads alone: all neurons stay (a number of "
                "--keep-neurons ranks them too, very slowly)"
            )
        elif self.neuron_budget is None:
            small = self._fewer_neurons(small, scores, scoring, means)
        return small, scores

    def _loses(self, heads: Kept, neurons: Kept, means: list[Encoded] | None) -> bool:
        """Whether mean compensation alone drops more than `--max-drop` below dense; says so."""
        small = shrink(self.dense, heads, neurons, means, self.options)
        dense, pruned = (
            100 * measure_accuracy(model, self.validation, self.options, "validation").value
            for model in (self.dense, small)
        )
        loses = dense - pruned > self.max_drop + 1e-9
        self.note(
            f"mean compensation alone: {pruned:.1f} % on validation, dense {dense:.1f} %; "
            + ("tuning gradually" if loses else "no tuning needed")
        )
        return loses

    def _fewer_neurons(
        self, small: Decoder, scores: Scores, scoring: list[Encoded], means: list[Encoded] | None
    ) -> Decoder:
        """The smallest neuron budget that keeps the accuracy, tuned again after tuned heads."""
        ranks = scores.neurons
        if self.recovered == "lora":  # the tuned model's neurons are worth what they are now
            if self.target == "predicted":
                scoring = predicted_targets(small, scoring, self.options)
            ranks = METHODS[self.method](small, scoring, self.options)[1]
        kept = smallest_neurons(small, ranks, self.validation, means, self.max_drop, self.options)
        fewer = shrink(small, small.layout.heads, kept, means, self.options)
        if self.recovered == "lora" and kept != small.layout.neurons:
            tuned = tune(
                fewer,
                self.data.train(),
                self.schedule.round_tuning,
                self.options,
                Teacher(self.dense),
            )
            before, after = (
                measure_accuracy(model, self.validation, self.options, "validation").value
                for model in (fewer, tuned)
            )
            fewer = tuned if after >= before else fewer
        return fewer
