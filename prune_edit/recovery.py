"""What makes up for removed units in one run: asked for, or decided by validation; then neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.layout import Kept
from prune_edit.planning import within_layers
from prune_edit.recover.gradual import Rounds, Schedule
from prune_edit.recover.least_squares import EXAMPLES, Known, enough, refit
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.tuning import FULL_LIMIT, KINDS, tune
from prune_edit.recover.watch import EXAMPLES as WATCHED
from prune_edit.recover.watch import Watch
from prune_edit.rules import Rules
from prune_edit.samples import SCORING_EXAMPLES, VALIDATION_EXAMPLES, Samples
from prune_edit.scoring import METHODS, Options, predicted_targets
from prune_edit.scoring.combine import weighted
from prune_edit.search import smallest_neurons
from prune_edit.selection import SEARCHES
from prune_edit.tasks.combine import balanced
from prune_edit.tasks.prompts import Encoded
from prune_edit.workspace import Workspace

Note = Callable[[str], None]

_SENSIBLE = 0.5  # of the answers right in the dense model, for accuracy to guide anything
_NEAR = 20.0  # points of validation accuracy within which least squares may be enough
_ROUGH = 256  # examples, at least, that say roughly what all would
_TURNS = 4  # of removing neurons and tuning
_WORTH = 0.04  # of the neurons, for another turn


SELECTIONS = ("auto", "one-shot", "gradual", *SEARCHES)


@dataclass
class Recovery:
    """What makes up for removed units: `recover`, or what validation asks for where it is `auto`.

    `select` says whether units go in one step or gradually, scored again on the way, or are
    searched for, `greedy` or by `gates`, and go in one step; `auto`: gradually where the model is
    tuned or refitted. `recovered` says what made up for them, once `settle` has been asked.
    Validation asks what is `judged`, where not all of `data` has right answers.
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
    select: str = "auto"
    rules: Rules = field(default_factory=Rules)
    recovered: str = ""
    tuning: TuningSettings = PLAIN
    teacher: Teacher | None = field(default=None, repr=False)
    neuron_layers: tuple[int, ...] | None = None  # whose neurons may go; None: all
    judged: Samples | None = None
    known: Known = field(default_factory=Known, repr=False)  # of the rough fits

    @cached_property
    def scoring(self) -> list[Encoded]:
        """The train prompts that are scored and averaged over."""
        return self.data.encoded("train", SCORING_EXAMPLES)

    @cached_property
    def validation(self) -> list[Encoded]:
        """The prompts that budgets and recoveries are chosen by."""
        return (self.judged or self.data).encoded("validation", VALIDATION_EXAMPLES)

    @cached_property
    def calibration(self) -> list[Encoded]:
        """The train prompts that least squares fits to."""
        return enough(self.data.train(), self.dense, self.data.limit or EXAMPLES)

    @cached_property
    def watch(self) -> Watch:
        """What the final tuning is watched by: it may stop where it is as good as the dense model.

        A dense model that hardly knows the task sets no such mark.
        """
        rows, rest = self.validation[:WATCHED], self.validation[WATCHED:]
        dense = self.accuracy(self.dense) / 100
        return Watch(rows, dense if dense >= _SENSIBLE else None, rest)

    @property
    def means(self) -> list[Encoded] | None:
        """The prompts whose means replace removed units; None for zero."""
        return None if self.recover == "none" else self.scoring

    @property
    def tuned(self) -> bool:
        """Whether the model is tuned."""
        return self.recovered in KINDS

    @property
    def fitted(self) -> bool:
        """Whether what stays is fitted in closed form."""
        return self.recovered == "least-squares"

    @property
    def rounds(self) -> bool:
        """Whether units go gradually."""
        usual = self.tuned or self.fitted
        return usual if self.select == "auto" else self.select == "gradual"

    def accuracy(self, decoder: Decoder) -> float:
        """Of a model on the validation prompts, in percent."""
        return 100 * measure_accuracy(decoder, self.validation, self.options, "validation").value

    def settle(self, heads: Kept, neurons: Kept) -> Decoder | None:
        """Decide on the recovery; the model with these units where one step makes it."""
        if self.recover != "auto":
            self.recovered = self.recover
            return None if self.rounds else self.once(heads, neurons)
        small = shrink(self.dense, heads, neurons, self.means, self.options)
        self.recovered = "mean"
        dense, left = self.accuracy(self.dense), self.accuracy(small)
        said = f"mean compensation alone: {left:.1f} % on validation, dense {dense:.1f} %"
        self.judge(dense)
        if dense - left <= self.max_drop + 1e-9:
            self.note(f"{said}; no tuning needed")
            return small
        if dense - left <= _NEAR:
            refitted = refit(small, self.dense, self.calibration, self.options)
            left = self.accuracy(refitted)
            said += f"; least squares: {left:.1f} %"
            if dense - left <= self.max_drop + 1e-9:
                self.recovered = "least-squares"
                self.note(f"{said}; no tuning needed")
                return refitted
        self.strongest()
        how = "gradually " if self.rounds else ""
        self.note(f"{said}; tuning {how}({self.recovered})")
        return None if self.rounds else self.once(heads, neurons)

    def judge(self, dense: float) -> None:
        """Say where the dense model's accuracy, in percent, is too low to guide anything."""
        if dense < 100 * _SENSIBLE:
            self.note(
                f"the dense model answers {dense:.1f} % of this task itself: what pruning costs "
                "cannot be judged by it"
            )

    def strongest(self) -> None:
        """Take the recovery that is asked for, or where that is `auto` the one that does most."""
        size = self.dense.parameters_count()
        strongest = "full" if size <= FULL_LIMIT else "lora"
        self.recovered = strongest if self.recover == "auto" else self.recover

    def once(self, heads: Kept, neurons: Kept, stage: str = "once") -> Decoder:
        """The model with these units in one step, and what makes up for the others."""
        small = shrink(self.dense, heads, neurons, self.means, self.options)
        if not self.tuned:
            return self._refitted(small)
        schedule = self._scheduled()
        self.teacher = Teacher(self.dense)
        found = self.workspace.load_model(stage, small)
        if found is None:
            found = tune(
                small, self.data.train(), schedule.final_tuning, self.options, self.teacher,
                keeper=self.workspace, stage=f"{stage}-tuning", watch=self.watch,
            )  # fmt: skip
            self.workspace.save_model(stage, found)
            self.workspace.drop(f"{stage}-tuning")
        return found

    def _refitted(self, small: Decoder) -> Decoder:
        """A model without some units, by least squares where that is the recovery."""
        if not self.fitted:
            return small
        return refit(small, self.dense, self.calibration, self.options)

    def _scheduled(self) -> Schedule:
        chosen = self.schedule or Schedule.of(self.recovered)
        self.schedule = self.tuning.of(chosen.recovered_by(self.recovered))
        return self.schedule

    def in_rounds(self, must_keep: Kept | None = None) -> Rounds:
        """The rounds in which units go, recovering on the way."""
        schedule = self._scheduled()
        if self.tuned:
            self.teacher = Teacher(self.dense)
        return Rounds(
            self.dense,
            self.data.train(),
            self.method,
            self.options,
            schedule,
            self.workspace,
            must_keep,
            self.target == "predicted",
            self.teacher,
            self.data.limit,
            self.watch if self.tuned else None,
            self.rules,
            self.neuron_layers,
        )

    def fewer(self, small: Decoder, kept: Kept) -> Decoder:
        """The model with these of its neurons; tuning does not follow."""
        fewer = shrink(small, small.layout.heads, kept, self.means, self.options)
        return fewer if kept == small.layout.neurons else self._refitted(fewer)

    def roughly_fewer(self, small: Decoder, kept: Kept) -> Decoder:
        """The model with these of its neurons, fitted to fewer examples."""
        return self.roughly(shrink(small, small.layout.heads, kept, self.means, self.options))

    def roughly(self, small: Decoder) -> Decoder:
        """A model by least squares from fewer examples: somewhat worse, in a fraction of the time.

        What a search looks at on its way.
        """
        some = balanced(self.calibration, max(_ROUGH, len(self.calibration) // 8))
        # The values of many heads take half of the time and bring little.
        have, had = (sum(map(len, decoder.layout.heads)) for decoder in (small, self.dense))
        few = 2 * have <= had
        return refit(small, self.dense, some, self.options, values=few, known=self.known)

    def with_neurons(
        self, small: Decoder, kept: Kept, stage: str, fewer: Decoder | None = None
    ) -> Decoder:
        """The model with these of its neurons, tuned again where its heads were.

        `fewer` is that before tuning, where it is there already.
        """
        found = self.workspace.load_model(stage, small)
        if found is not None:
            return found
        fewer = fewer or self.fewer(small, kept)
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
        self.workspace.drop(f"{stage}-tuning")
        return fewer


def fewer_neurons(
    recovery: Recovery, small: Decoder, scores: torch.Tensor, floor: float
) -> Decoder:
    """The fewest neurons with an accuracy of `floor` percent, in turns with tuning for tuned heads.

    `scores` (L, N) are the dense model's.
    """
    for turn in range(1, 1 + (_TURNS if recovery.tuned else 1)):
        ranks, scoring = scores, recovery.scoring
        if recovery.rounds:  # a model that changed: its neurons are worth what they are now
            if recovery.target == "predicted":
                scoring = predicted_targets(small, scoring, recovery.options)
            method, now = METHODS[recovery.method], small
            ranks = weighted(lambda rows: method(now, rows, recovery.options), scoring)[1]  # noqa: B023
        have = small.layout.neurons
        kept, fewer = smallest_neurons(
            small,
            within_layers(ranks, recovery.neuron_layers),
            recovery.validation,
            partial(recovery.fewer, small),
            floor / 100,
            recovery.options,
            recovery.rules,
            partial(recovery.roughly_fewer, small) if recovery.fitted else None,
        )
        small = recovery.with_neurons(small, kept, f"neurons-{turn}", fewer)
        before, after = (sum(map(len, units)) for units in (have, kept))
        if before - after < _WORTH * before:
            break
    return small
