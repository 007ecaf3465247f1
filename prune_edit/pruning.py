"""One run of `prune`, in memory: scores, heads, the recovery they ask for, then the neurons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.planning import Budget, keep_top, neurons_that_stay, within_layers
from prune_edit.planning import keep_neurons as best_neurons
from prune_edit.recover.gradual import gradual
from prune_edit.recovery import Recovery, fewer_neurons
from prune_edit.scoring import Scores
from prune_edit.scoring.run import score_task
from prune_edit.smallest import Smallest


@dataclass
class Pruning:
    """One run of `prune`: scores, then the recovery that the validation accuracy asks for.

    With `keep_accuracy`, a share of the dense model's, the budgets are found and not given;
    `report` is then what was tried, as JSON.
    """

    recovery: Recovery
    head_budget: Budget
    neuron_budget: Budget | None
    keep_accuracy: float | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def result(self) -> tuple[Decoder, Scores]:
        """The pruned model in memory, and the scores of the dense one."""
        return self._budgeted() if self.keep_accuracy is None else self._smallest()

    def _scores(self, ranked: bool) -> Scores:
        """The dense model's scores; without the neurons' where those are not `ranked`."""
        recovery = self.recovery
        scores = recovery.workspace.load_scores()
        if scores is None:
            scores = score_task(
                recovery.dense,
                recovery.data.task,
                recovery.scoring,
                recovery.method,
                recovery.target,
                replace(recovery.options, neurons=ranked),
            )
            recovery.workspace.save_scores(scores)
        return scores

    def _smallest(self) -> tuple[Decoder, Scores]:
        assert self.keep_accuracy is not None
        recovery = self.recovery
        ranked = recovery.method != "intervention"
        scores = self._scores(ranked)
        recovery.strongest()
        search = Smallest(recovery, self.keep_accuracy)
        small = search.heads()
        if ranked:
            small = fewer_neurons(recovery, small, scores.neurons, search.floor)
        else:
            self._leave_neurons()
        self.report = {"keep_accuracy": search.report(small)}
        return small, scores

    def _leave_neurons(self) -> None:
        self.recovery.note(
            f"--score {self.recovery.method} ranks heads alone: all neurons stay (a number of "
            "--keep-neurons ranks them too, very slowly)"
        )

    def _budgeted(self) -> tuple[Decoder, Scores]:
        recovery, layout, method = self.recovery, self.recovery.dense.layout, self.recovery.method
        head_count = self.head_budget.of(sum(map(len, layout.heads)), "--keep-heads")
        total = sum(map(len, layout.neurons))
        neuron_count = None
        if self.neuron_budget is not None:
            neuron_count = neurons_that_stay(
                self.neuron_budget,
                [len(units) for units in layout.neurons],
                recovery.neuron_layers,
                "--keep-neurons",
            )
            neuron_count = None if neuron_count == total else neuron_count
        # Neurons by intervention take very long: only where the user gives a number of them.
        ranked = method != "intervention" or neuron_count is not None
        scores = self._scores(ranked)
        heads = keep_top(scores.heads, head_count)
        neurons = layout.neurons
        if neuron_count:
            ranks = within_layers(scores.neurons, recovery.neuron_layers)
            neurons = best_neurons(ranks, neuron_count)
        small = recovery.settle(heads, neurons)
        if small is None:
            small = gradual(recovery.in_rounds(), head_count, neuron_count)
        if self.neuron_budget is None and not ranked:
            self._leave_neurons()
        elif self.neuron_budget is None:
            floor = recovery.accuracy(small) - recovery.max_drop
            small = fewer_neurons(recovery, small, scores.neurons, floor)
        return small, scores
