"""Verb `sweep`: accuracy, size and speed at a grid of budgets, and a plan for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prune_edit import plots
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.evaluation.accuracy import Accuracy, measure_accuracy
from prune_edit.evaluation.comparison import environment
from prune_edit.evaluation.cost import count_parameters, flops_per_token
from prune_edit.evaluation.speed import measure_speed_pair
from prune_edit.fitting import fit_task
from prune_edit.frontier import Frontier, Point, walk
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget
from prune_edit.recover.gradual import Schedule
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.recover.shrink import without_dead
from prune_edit.recovery import SELECTIONS, Note, Recovery
from prune_edit.running import Progress, silent
from prune_edit.samples import TEST_EXAMPLES, Samples
from prune_edit.scoring import Options
from prune_edit.scoring.run import score_task
from prune_edit.selection import SEARCHES
from prune_edit.tasks import Task
from prune_edit.verbs.common import (
    RECOVERIES,
    Tasks,
    as_task,
    check_known,
    check_limit,
    ignore,
    made_plan,
    pruning_method,
    retained_with_weights,
    stages_beside,
    with_retained,
)
from prune_edit.workspace import Workspace

_MARK = "frontier.json"
_STEPS = 700  # of tuning a point in full, where a single model is given more
_CONTEXT = 64  # tokens in sight, for FLOPs a token


@claims_output
def sweep(
    model: str | Path | None = None,
    *,
    task: Tasks = "arithmetic",
    heads: str | int | Sequence[str | int] = ("50%", "25%", "10%", "5%"),
    neurons: str | int | Sequence[str | int] = ("all",),
    score: str = "auto",
    recover: str = "auto",
    select: str = "auto",
    retain: Sequence[str | Task | tuple[str | Task, float]] = (),
    random: int = 0,
    out: str | Path = "frontier",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    speed: bool = True,
    schedule: Schedule | None = None,
    tuning: TuningSettings = PLAIN,
    progress: Progress = silent,
    note: Note = ignore,
) -> Frontier:
    """Measure a model pruned to every combination of `heads` and `neurons`; write plans for each.

    `recover` "auto" is tuning here. With `random`, so many random selections stand beside each
    point, recovered alike. Writes `frontier.json`, a plan a point, and a picture where matplotlib
    is installed. Raises PruneEditError's branches; nothing is left at `out` then but what was
    there, and the same call goes on from the last finished model.
    """
    out = Path(out)
    asked = [
        [Budget.parse(text, flag) for text in ([texts] if isinstance(texts, str | int) else texts)]
        for texts, flag in ((heads, "--heads"), (neurons, "--neurons"))
    ]
    check_known("recovery", recover, RECOVERIES)
    check_known("selection", select, [each for each in SELECTIONS if each not in SEARCHES])
    tuning.check(recover)
    check_limit(limit)
    if random < 0:
        raise BudgetError(f"random {random} is no number of selections; give 0 or more")
    check_output(out, overwrite, _MARK)
    score = pruning_method(score)
    wanted = as_task(task)
    retained, weights = retained_with_weights(retain)
    decoder = without_dead(load_decoder(model, device=device, dtype=dtype))
    tuning.check_layers(decoder.n_layers)
    layout = decoder.layout
    counts = [
        [budget.of(sum(map(len, units)), flag) for budget in budgets]
        for budgets, units, flag in (
            (asked[0], layout.heads, "--heads"),
            (asked[1], layout.neurons, "--neurons"),
        )
    ]
    options = Options(seed=seed, progress=progress)
    fitted = fit_task(wanted, decoder, options, note)
    retained = [fit_task(each, decoder, options) for each in retained]
    data = Samples(with_retained(fitted, retained, weights), decoder, limit)
    workspace = stages_beside(
        out, decoder, data.task, [counts, score, recover, select, limit, seed, device, dtype,
                                  repr(schedule), tuning, random],
    )  # fmt: skip
    recovery = Recovery(
        decoder, data, recover, 0.0, score, "answer", options, workspace, note, schedule, select,
        tuning=tuning,
    )  # fmt: skip
    recovery.strongest()
    if recovery.tuned and schedule is None and tuning.steps is None:
        recovery.tuning = replace(tuning, steps=_STEPS if recovery.recovered == "full" else None)
    measure = _Measure(recovery, speed, fitted, retained)
    scores = score_task(
        decoder, data.task, recovery.scoring, score, "answer", replace(options, neurons=False)
    )
    by_chance: dict[tuple[int, int], list[float]] = {}
    for number in range(random):
        folder = workspace.folder and workspace.folder / f"random-{number}"
        drawn = replace(
            recovery,
            method="random",
            options=replace(options, seed=seed + number),
            workspace=Workspace(folder),
        )
        for few_heads, few_neurons, small in walk(drawn, *counts):
            found = measure.accuracy(small).value
            by_chance.setdefault((few_heads, few_neurons), []).append(found)
            note(f"random {few_heads} heads, {few_neurons} neurons: {found:.1%}")
    points = []
    with replacing(out, overwrite, _MARK) as target:
        for few_heads, few_neurons, small in walk(recovery, *counts):
            name = f"plan-{few_heads}-heads-{few_neurons}-neurons.json"
            made = replace(made_plan(small.layout.heads, small.layout.neurons, scores), seed=seed)
            (target / name).write_text(made.to_json(), encoding="utf-8")
            random_found = tuple(by_chance.get((few_heads, few_neurons), ()))
            point = replace(measure.point(small), random=random_found, plan=name)
            points.append(point)
            note(f"{few_heads} heads, {few_neurons} neurons: {point.accuracy:.1%}")
        frontier = Frontier(
            decoder.source,
            fitted.name,
            score,
            recovery.recovered,
            measure.point(decoder),
            tuple(sorted(points, key=lambda point: (-point.neurons, -point.heads))),
            environment(decoder, seed),
        )
        (target / _MARK).write_text(frontier.to_json(), encoding="utf-8")
        if plots.available():
            plots.draw_frontier(frontier, target)
        else:
            note(plots.MISSING)
    workspace.remove()
    return frontier


class _Measure:
    """Accuracy, size and speed of the models of one sweep."""

    def __init__(
        self, recovery: Recovery, speed: bool, task: Task, retained: Sequence[Task]
    ) -> None:
        self.recovery, self.speed = recovery, speed
        self.test, *others = (
            replace(recovery.data, task=each).encoded("test", TEST_EXAMPLES)
            for each in (task, *retained)
        )
        self.retained = dict(zip((each.name for each in retained), others, strict=True))

    def accuracy(self, decoder: Decoder) -> Accuracy:
        """On the test split."""
        return measure_accuracy(decoder, self.test, self.recovery.options, "test")

    def point(self, decoder: Decoder) -> Point:
        """Everything but the plan and the random selections."""
        recovery, found = self.recovery, self.accuracy(decoder)
        faster = None
        if self.speed and decoder is not recovery.dense:
            before, after = measure_speed_pair(recovery.dense, decoder)
            faster = {
                f"{phase} {batch}": after[batch][phase]["tokens_per_second"]
                / before[batch][phase]["tokens_per_second"]
                for batch in ("batch_1", "batch_32")
                for phase in ("prefill", "decode")
            }
        return Point(
            sum(map(len, decoder.layout.heads)),
            sum(map(len, decoder.layout.neurons)),
            found.value,
            found.interval,
            recovery.accuracy(decoder) / 100,
            count_parameters(decoder),
            flops_per_token(decoder, _CONTEXT),
            faster,
            tasks={name: hits / total for name, (_, hits, total) in found.parts.items()},
            retained={
                name: measure_accuracy(decoder, rows, recovery.options, "test").value
                for name, rows in self.retained.items()
            },
        )
