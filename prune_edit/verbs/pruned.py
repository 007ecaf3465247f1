"""Verb `prune`: the whole line, from task to evaluated checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.decoder import Decoder
from prune_edit.editing.asked import USUAL
from prune_edit.editing.card import edit_section
from prune_edit.errors import BudgetError, PlanError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import Comparison, compare_decoders
from prune_edit.evaluation.cost import weight_folder
from prune_edit.fitting import fit_task
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, parse_layers
from prune_edit.pruning import Pruning
from prune_edit.recover.gradual import Schedule
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.recover.shrink import without_dead
from prune_edit.recovery import SELECTIONS, Note, Recovery
from prune_edit.samples import TEST_EXAMPLES, Samples
from prune_edit.scoring import (
    Options,
    Progress,
    load_adapter,
    silent,
)
from prune_edit.scoring.run import check_settings
from prune_edit.selection import SEARCHES
from prune_edit.smallest import parse_share
from prune_edit.tasks import RETAINED, Task, load_task
from prune_edit.verbs.budgets import Asked, budget_report, check_layers_alone
from prune_edit.verbs.common import (
    FORMATS,
    RECOVERIES,
    TARGETS,
    Tasks,
    as_task,
    base_name,
    check_drop,
    check_format,
    check_known,
    check_limit,
    ignore,
    made_plan,
    pruning_method,
    retained_with_weights,
    stages_beside,
    with_retained,
    write,
    write_adapter,
)
from prune_edit.verbs.composed import SHARE, Editing


@claims_output
def prune(
    model: str | Path | None = None,
    *,
    task: Tasks = "arithmetic",
    keep_heads: str | int | None = None,
    keep_neurons: str | int | None = None,
    neuron_layers: str = "all",
    max_drop: float = 1.0,
    keep_accuracy: str | None = None,
    budget: str | None = None,
    budget_of: str = "parameters",
    align: int = 1,
    kv: str = "pad",
    whole_blocks: bool = False,
    serve: str = "",
    score: str = "auto",
    adapter: str | Path | None = None,
    format: str = "ragged",
    recover: str = "auto",
    select: str = "auto",
    random: int | None = None,
    retain: Sequence[str | Task | tuple[str | Task, float]] = (),
    edit: str | None = None,
    reduce: str = USUAL,
    out: str | Path = "pruned",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    target: str = "answer",
    overwrite: bool = False,
    speed: bool = True,
    schedule: Schedule | None = None,
    tuning: TuningSettings = PLAIN,
    progress: Progress = silent,
    note: Note = ignore,
) -> Comparison:
    """Prune a model for a task, write the checkpoint, and compare it with the dense model.

    See the README for the meaning of the budgets and recoveries; without any of them the knee is
    taken. Neurons go from `neuron_layers` ("4-7") alone; with a LoRA `adapter`'s folder, units go
    in one step. `random` selections of as many units are recovered alike and measured beside it, by
    default one where nothing is tuned. `keep_accuracy` ("99%" of the dense model's on validation)
    finds the smallest model that has it instead; with `budget` ("20%" of what attention and FFN
    cost, in `budget_of`) heads and neurons trade. Scores come from the train split, budgets and
    recovery from validation, the figures from test. Several tasks count alike; one to retain takes
    part by its weight (`facts=0.5`, or a pair), else it is only measured. With `edit`, a concept,
    the model is edited first, `reduce` of its bias taken out, and what the edited one says of the
    concept takes part in the recovery. Raises PruneEditError's
    branches; nothing is left at `out` then but what was there.
    """
    out = Path(out)
    for what, value, known in (
        ("format", format, FORMATS),
        ("recovery", recover, RECOVERIES),
        ("selection", select, SELECTIONS),
        ("target", target, TARGETS),
    ):
        check_known(what, value, known)
    asked = Asked(budget, budget_of, align, kv, whole_blocks, serve)
    budgets = _budgets(keep_heads, keep_neurons, asked, keep_accuracy)
    share = None if keep_accuracy is None else parse_share(keep_accuracy)
    _check_selection(select, recover, keep_accuracy, budget, budgets[0])
    if random is not None and random < 0:
        raise BudgetError(f"random {random} is no number of selections; give 0 or more")
    check_layers_alone(parse_layers(neuron_layers, "--neuron-layers"), budget)
    if adapter is not None and (share is not None or select not in ("auto", "one-shot")):
        other = f"--select {select}" if share is None else f"--keep-accuracy {keep_accuracy}"
        raise PlanError(
            f"--adapter {adapter} is of the dense model, and {other} scores others; leave out one "
            "of them"
        )
    check_drop(max_drop)
    tuning.check(recover)
    check_limit(limit)
    check_output(out, overwrite)
    score = pruning_method(score, adapter is not None)
    check_settings(score, Options(seed=seed), adapter=adapter)
    wanted = as_task(task)
    retained, weights = retained_with_weights(retain)
    editing = None if edit is None else Editing(edit, reduce)
    raw = load_decoder(model, device=device, dtype=dtype)
    decoder = without_dead(raw)
    tuning.check_layers(decoder.n_layers)
    check_format(format, decoder, recover)
    layers = parse_layers(neuron_layers, "--neuron-layers", decoder.n_layers)
    options = Options(seed=seed, progress=progress)
    fitted = fit_task(wanted, decoder, options, note)
    if not retain and model is None:
        retained, weights = [load_task(name) for name in RETAINED], [0.0] * len(RETAINED)
    retained = [fit_task(each, decoder, options) for each in retained]
    goal = with_retained(fitted, retained, weights)
    if editing is not None:
        retained, weights = editing.with_factual(retained, weights)
        goal = with_retained(fitted, retained, weights)
    for each in (fitted, *retained):  # what cannot be measured at the end is said at the start
        Samples(each, decoder, limit).encoded("test", TEST_EXAMPLES)
    adapted = None if adapter is None else load_adapter(decoder, adapter)
    workspace = stages_beside(
        out,
        decoder,
        goal,
        [keep_heads, keep_neurons, keep_accuracy, max_drop, score, recover, select, target, limit,
         seed, device, dtype, repr(schedule), tuning, asked, layers,
         adapted and adapted.digest, random, edit, reduce],
    )  # fmt: skip
    # Continuations that a model draws are neither right nor wrong: they judge nothing.
    start, judged = decoder, goal
    if editing is not None:
        guards = [each for each, weight in zip(retained, weights, strict=True) if weight]
        start = without_dead(editing.first(raw, workspace, [fitted, *guards], options, note))
        said = fit_task(editing.said(start, options), start, options)
        goal = with_retained(fitted, [*retained, said], [*weights, SHARE])
        adapted = None if adapter is None else load_adapter(start, adapter)
    options = replace(options, adapted=adapted)
    rules = asked.rules(start, progress, workspace)
    recovery = Recovery(
        start,
        Samples(goal, start, limit),
        recover,
        max_drop,
        score,
        target,
        options,
        workspace,
        note,
        schedule,
        select if adapted is None else "one-shot",
        rules,
        tuning=tuning,
        neuron_layers=layers,
        judged=Samples(judged, start, limit),
    )
    pruning = Pruning(recovery, *budgets, share)
    small, scores = pruning.result()
    made = replace(made_plan(small.layout.heads, small.layout.neurons, scores), seed=seed)
    if select in SEARCHES:
        made = replace(made, method=f"{made.method}+{select}")
    made = asked.noted(made, rules)
    with replacing(out, overwrite) as folder:
        provenance = write(folder, small, start, made, format, recovery.recovered)
        provenance |= write_adapter(folder, small, format, recovery.recovered, workspace, note)
        ragged = format == "ragged"
        shown = small if ragged else load_decoder(folder, device=device, dtype=dtype)
        if editing is not None:
            editing.show(folder, decoder, shown, [fitted, *guards], options, note)
        comparison = compare_decoders(
            fitted,
            decoder,
            shown,
            retained=retained,
            dense_folder=weight_folder(decoder.source),
            pruned_folder=folder,
            options=options,
            limit=limit if limit is not None else TEST_EXAMPLES,
            speed=speed,
            seed=seed,
        )
        comparison = replace(
            comparison,
            extra={
                **comparison.extra,
                "plan": {
                    "kept_heads": made.kept_heads,
                    "of_heads": sum(map(len, decoder.layout.heads)),
                    "kept_neurons": made.kept_neurons,
                    "of_neurons": sum(map(len, decoder.layout.neurons)),
                    **provenance,
                },
                **pruning.report,
                **_by_chance(pruning, small, random, fitted),
                **budget_report(rules, made),
                **({} if editing is None else {"edit": editing.summary()}),
            },
        )
        (folder / "evaluation.json").write_text(comparison.to_json(), encoding="utf-8")
        facts = {**provenance, "base_model": base_name(decoder)}
        card = model_card(comparison.to_dict(), made, facts)
        if editing is not None:
            card += f"\n{edit_section(editing.report)}\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    workspace.remove()
    return comparison


def _budgets(
    keep_heads: str | int | None,
    keep_neurons: str | int | None,
    asked: Asked,
    keep_accuracy: str | None,
) -> tuple[Budget | None, Budget | None]:
    """Budgets of heads and neurons; none of heads where the knee is to be found.

    Raises BudgetError for budgets that exclude each other.
    """
    if keep_heads is None and (keep_neurons is not None or asked.budget or keep_accuracy):
        keep_heads = "all"
    heads = None if keep_heads is None else Budget.parse(keep_heads, "--keep-heads")
    neurons = None if keep_neurons is None else Budget.parse(keep_neurons, "--keep-neurons")
    given = heads is not None and heads.share != 1.0
    if keep_accuracy is not None and (neurons is not None or given):
        raise BudgetError(
            f"--keep-accuracy {keep_accuracy} finds the budgets; leave out --keep-heads and "
            "--keep-neurons"
        )
    asked.check(
        keep_heads=given, keep_neurons=neurons is not None, keep_accuracy=keep_accuracy is not None
    )
    return heads, neurons


def _check_selection(
    select: str,
    recover: str,
    keep_accuracy: str | None,
    budget: str | None,
    heads: Budget | None,
) -> None:
    """Raise PlanError for a selection that does not go with the rest."""
    if keep_accuracy is not None and select not in ("auto", "gradual"):
        raise PlanError(f"--keep-accuracy goes in rounds; leave out --select {select}")
    if select in SEARCHES and budget is not None:
        raise PlanError(
            f"--select {select} searches at numbers of units; leave out --budget {budget}, or give "
            "--keep-heads"
        )
    if select in SEARCHES and (heads is None or (select == "greedy" and heads.share == 1.0)):
        raise PlanError(f"--select {select} searches at a budget; give --keep-heads")
    if recover == "auto" and select == "gradual" and keep_accuracy is None:
        raise PlanError(
            "--select gradual needs a --recover such as least-squares or full: auto judges by one "
            "step, and goes gradually where it tunes"
        )


def _by_chance(pruning: Pruning, small: Decoder, wanted: int | None, task: Task) -> dict[str, Any]:
    """Test accuracies of random choices of as many units, recovered alike, for evaluation.json."""
    recovery = pruning.recovery
    count = wanted if wanted is not None else int(not recovery.tuned)
    if count == 0 or small.layout.full:
        return {}
    test = replace(recovery.data, task=task).encoded("test", TEST_EXAMPLES)
    found = []
    for seed in range(1, count + 1):
        try:
            drawn = pruning.by_chance(small, seed)
        except PlanError as error:  # chance may leave nothing that could be recovered as asked
            recovery.note(f"random choice {seed} cannot be recovered alike: {error}")
            continue
        found.append(measure_accuracy(drawn, test, recovery.options, "random units").value)
    if not found:
        return {}
    return {"random": {"accuracies": found, "recover": recovery.recovered}}
