"""One run of `prune`, in memory: scores, heads, the recovery they ask for, then the neurons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.knee import find_knee
from prune_edit.layout import Kept
from prune_edit.planning import Budget, keep_neurons, keep_top, neurons_that_stay, within_layers
from prune_edit.recover.gradual import gradual, gradual_cost
from prune_edit.recover.trade import trade
from prune_edit.recovery import Recovery, fewer_neurons
from prune_edit.rules import Rules
from prune_edit.scoring import METHODS, Scores, predicted_targets
from prune_edit.scoring.run import score_task
from prune_edit.selection import SEARCHES
from prune_edit.selection.run import search
from prune_edit.smallest import Smallest


@dataclass
class Pruning:
    """One run of `prune`: scores, then the recovery that the validation accuracy asks for.

    With `keep_accuracy`, a share of the dense model's, the budgets are found and not given, and
    without any budget the knee is; `report` is then what was tried, as JSON. `result` comes first;
    `by_chance` is to be measured beside it.
    """

    recovery: Recovery
    head_budget: Budget | None
    neuron_budget: Budget | None
    keep_accuracy: float | None = None
    report: dict[str, Any] = field(default_factory=dict)
    in_rounds: bool = False  # how the units of the result went

    def result(self) -> tuple[Decoder, Scores]:
        """The pruned model in memory, and the scores of the dense one."""
        if self.recovery.rules.budget is not None:
            return self._traded()
        return self._budgeted() if self.keep_accuracy is None else self._smallest()

    def by_chance(self, small: Decoder, seed: int) -> Decoder:
        """As many random units as `small` has, recovered as they were.

        Neurons that were searched for after the heads go after them here, too, in one turn.
        """
        recovery = self.recovery
        drawn = replace(
            recovery,
            method="random",
            select="gradual" if self.in_rounds else "one-shot",
            recover=recovery.recovered,
            rules=Rules(),
            options=replace(recovery.options, seed=recovery.options.seed + seed),
            workspace=recovery.workspace.within(f"random-{seed}"),
        )
        kept = small.layout
        heads, neurons = (sum(map(len, units)) for units in (kept.heads, kept.neurons))
        ranks = METHODS["random"](recovery.dense, recovery.scoring, drawn.options)
        every = recovery.dense.layout.neurons
        few = keep_neurons(within_layers(ranks[1], recovery.neuron_layers), neurons)
        later = self.neuron_budget is None
        if not self.in_rounds:
            return drawn.once(keep_top(ranks[0], heads), few)
        found = gradual(drawn.in_rounds(), heads, None if later else neurons)
        return drawn.with_neurons(found, few, "neurons") if later and few != every else found

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
        self.in_rounds = not recovery.fitted
        search = Smallest(recovery, self.keep_accuracy)
        small = search.heads(scores.heads)
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

    def _traded(self) -> tuple[Decoder, Scores]:
        """Heads and neurons under one budget, as the rules have it."""
        recovery, dense = self.recovery, self.recovery.dense
        scores, prompts = self._scores(ranked=True), recovery.scoring
        if recovery.target == "predicted":
            prompts = predicted_targets(dense, prompts, recovery.options)
        ranks, by_mean = (scores.heads, scores.neurons), recovery.means is not None
        kept = trade(dense, prompts, ranks, recovery.rules, recovery.options, by_mean)
        small = recovery.settle(*kept)
        self.in_rounds = small is None
        return gradual_cost(recovery.in_rounds()) if small is None else small, scores

    def _searched(
        self, scores: Scores, head_count: int, neuron_count: int | None
    ) -> tuple[Kept, Kept]:
        """The units that a search finds; a finished one is found again in the workspace."""
        recovery, layout = self.recovery, self.recovery.dense.layout
        found = recovery.workspace.load_tensors("searched")
        if found is None:
            found = search(recovery, scores, head_count, neuron_count)
            recovery.workspace.save_tensors("searched", found)
        heads = recovery.rules.heads(found["heads"], head_count)
        if neuron_count is None:
            return heads, layout.neurons
        ranks = within_layers(found["neurons"], recovery.neuron_layers)
        return heads, recovery.rules.neurons(ranks, neuron_count)

    def _budgeted(self) -> tuple[Decoder, Scores]:
        recovery, layout, method = self.recovery, self.recovery.dense.layout, self.recovery.method
        if self.head_budget is None:
            head_count, self.report["knee"] = find_knee(recovery)
        else:
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
        recovery.rules.check_counts(head_count, neuron_count)
        # Neurons by intervention take very long: only where they decide on a number of them.
        searched = recovery.select in SEARCHES
        ranked = method != "intervention" or (neuron_count is not None and not searched)
        scores = self._scores(ranked)
        if searched:
            heads, neurons = self._searched(scores, head_count, neuron_count)
        else:
            heads, neurons = recovery.rules.heads(scores.heads, head_count), layout.neurons
            if neuron_count:
                ranks = within_layers(scores.neurons, recovery.neuron_layers)
                neurons = recovery.rules.neurons(ranks, neuron_count)
        small = recovery.settle(heads, neurons)
        self.in_rounds = small is None
        if small is None:
            small = gradual(recovery.in_rounds(), head_count, neuron_count)
        if self.neuron_budget is None and not ranked:
            self._leave_neurons()
        elif self.neuron_budget is None:
            floor = recovery.accuracy(small) - recovery.max_drop
            small = fewer_neurons(recovery, small, scores.neurons, floor)
        return small, scores
