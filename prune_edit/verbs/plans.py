"""Verb `plan`: which units stay."""

from __future__ import annotations

from pathlib import Path

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.fitting import fit_task
from prune_edit.layout import Kept
from prune_edit.loading import load_decoder
from prune_edit.planning import (
    Budget,
    Plan,
    neurons_that_stay,
    parse_layers,
    within_layers,
)
from prune_edit.recover.shrink import shrink, without_dead
from prune_edit.recover.trade import trade
from prune_edit.recovery import Note
from prune_edit.samples import SCORING_EXAMPLES, VALIDATION_EXAMPLES, Samples
from prune_edit.scoring import (
    Options,
    Progress,
    Scores,
    predicted_targets,
    silent,
)
from prune_edit.search import smallest_neurons
from prune_edit.tasks import Task
from prune_edit.verbs.budgets import Asked, check_layers_alone
from prune_edit.verbs.common import (
    Tasks,
    as_task,
    check_drop,
    check_limit,
    check_task,
    ignore,
    made_plan,
    present,
    task_of_origin,
)

_COLLAPSED = 20.0  # points of validation accuracy, beyond which only tuning can help


def plan(
    scores: Scores,
    *,
    keep_heads: str | int = "all",
    keep_neurons: str | int | None = None,
    neuron_layers: str = "all",
    budget: str | None = None,
    budget_of: str = "parameters",
    align: int = 1,
    kv: str = "pad",
    whole_blocks: bool = False,
    serve: str = "",
    max_drop: float = 1.0,
    model: str | Path | None = None,
    task: Tasks | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
    note: Note = ignore,
) -> Plan:
    """Which units stay at these budgets; neurons go from `neuron_layers` ("4-7") alone.

    Without `keep_neurons` the smallest neuron budget is searched that loses at most `max_drop`
    points of validation accuracy against the same model with only its heads pruned, both with mean
    compensation; that needs the model and task, by default those the scores name. Where neurons
    were not scored all of them stay. With `budget` ("20%" of what attention and FFN cost, in
    `budget_of`) heads and neurons trade instead, which needs both, too. Raises BudgetError,
    PlanError for scores of another model, or without neurons where some are to be chosen.
    """
    check_drop(max_drop)
    check_limit(limit)
    head_budget = Budget.parse(keep_heads, "--keep-heads")
    neuron_budget = Budget.parse(keep_neurons, "--keep-neurons") if keep_neurons else None
    asked = Asked(budget, budget_of, align, kv, whole_blocks, serve)
    asked.check(
        keep_heads=head_budget.share != 1.0,
        keep_neurons=keep_neurons is not None,
    )
    scored = bool(present(scores.neurons))
    layers = parse_layers(neuron_layers, "--neuron-layers", len(scores.neurons))
    check_layers_alone(layers, budget)
    ranks = within_layers(scores.neurons, layers)
    options = Options(progress=progress)
    where = (model, device, dtype)
    if budget is not None:
        return _within(asked, scores, _scored_model(scores, *where), task, limit, options)
    # Scores say how wide layers are, but not how heads share keys and values.
    grouped = _scored_model(scores, *where).layout if kv in ("keep-groups", "equal") else None
    rules = asked.counted(scores, grouped)
    head_count = head_budget.of(present(scores.heads), "--keep-heads")
    rules.check_counts(head_count, None)
    heads = rules.heads(scores.heads, head_count)
    wanted: Task | None = None
    best = scores.metadata.get("top_neurons")
    if best and layers is not None:
        raise PlanError(
            f"these scores have the {best} best neurons alone, and others of other layers were to "
            "stay; score without --top-neurons, or leave out --neuron-layers"
        )
    if best and (neuron_budget is None or neuron_budget.count is None):
        raise PlanError(
            f"these scores have the {best} best neurons alone; give --keep-neurons as a count up "
            f"to {best}, or score without --top-neurons"
        )
    if not scored and neuron_budget is not None and neuron_budget.share != 1.0:
        raise PlanError(
            f"--keep-neurons {keep_neurons}: these scores have no neurons; score with --neurons "
            "(slow by intervention) or by another --score, or give --keep-neurons all"
        )
    if scored and neuron_budget is not None:
        per_layer = [present(row) for row in scores.neurons]
        count = neurons_that_stay(neuron_budget, per_layer, layers, "--keep-neurons")
        rules.check_counts(head_count, count)
        neurons = rules.neurons(ranks, count)
    else:
        remedy = ", or --keep-neurons" if scored else ""
        decoder = _scored_model(scores, *where, remedy)
        if not scored:
            note("the scores have no neurons: all neurons stay")
            return asked.noted(made_plan(heads, decoder.layout.neurons, scores), rules)
        data = _scored_task(scores, decoder, task, limit, options)
        wanted = data.task if task is not None else None
        means = data.encoded("train", SCORING_EXAMPLES)
        validation = data.encoded("validation", VALIDATION_EXAMPLES)
        fewer = shrink(decoder, heads, decoder.layout.neurons, means, options)
        dense, left = (
            100 * measure_accuracy(side, validation, options, "validation").value
            for side in (decoder, fewer)
        )
        if dense - left > _COLLAPSED:
            # A search would keep what little accuracy there is; tuning needs the neurons.
            neurons = decoder.layout.neurons
            note(
                f"these heads alone keep {left:.1f} of {dense:.1f} % on validation: all neurons "
                "stay, for tuning (apply --recover auto) or your own --keep-neurons"
            )
        else:
            floor = (left - max_drop) / 100

            def build(kept: Kept) -> Decoder:
                return shrink(fewer, heads, kept, means, options)

            neurons, _ = smallest_neurons(fewer, ranks, validation, build, floor, options, rules)
    return asked.noted(made_plan(heads, neurons, scores, wanted), rules)


def _within(
    asked: Asked,
    scores: Scores,
    decoder: Decoder,
    task: Tasks | None,
    limit: int | None,
    options: Options,
) -> Plan:
    """The plan of one budget over heads and neurons, which the task's prompts price."""
    if present(scores.neurons) < sum(map(len, decoder.layout.neurons)):
        raise PlanError(
            f"--budget {asked.budget}: these scores do not have all neurons; score with --neurons "
            "and without --top-neurons, or give --keep-heads"
        )
    rules = asked.rules(decoder, options.progress)
    data = _scored_task(scores, decoder, task, limit, options)
    wanted = data.task if task is not None else None
    prompts = data.encoded("train", SCORING_EXAMPLES)
    if scores.metadata.get("target") == "predicted":
        prompts = predicted_targets(decoder, prompts, options)
    kept = trade(decoder, prompts, (scores.heads, scores.neurons), rules, options)
    return asked.noted(made_plan(*kept, scores, wanted), rules)


def _scored_model(
    scores: Scores, model: str | Path | None, device: str, dtype: str, remedy: str = ""
) -> Decoder:
    """The model that was scored. Raises PlanError for another."""
    source = model or scores.metadata.get("model") or None
    decoder = without_dead(load_decoder(source, device=device, dtype=dtype))
    if decoder.digest != scores.metadata.get("model_digest"):
        raise PlanError(
            f"the scores are of another model than {decoder.source}; give the model they were "
            f"made with{remedy}"
        )
    return decoder


def _scored_task(
    scores: Scores,
    decoder: Decoder,
    task: Tasks | None,
    limit: int | None,
    options: Options,
) -> Samples:
    """The task given, or the one that was scored, as the model's prompts."""
    source = scores.metadata.get("task_source", "")
    chosen = as_task(task) if task is not None else task_of_origin(source)
    data = Samples(fit_task(chosen, decoder, options), decoder, limit)
    check_task(data.task, scores.metadata.get("task_digest", ""), task is not None)
    return data
