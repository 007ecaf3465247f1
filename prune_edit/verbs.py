"""The verbs of the library, the same as the command line's: score, plan, apply, prune, evaluate.

Each takes names or paths and composes the rooms along the flow; none of them prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prune_edit import __version__
from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.layout import Layout
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.editing.concept import load_concept
from prune_edit.editing.find import concept_scores
from prune_edit.editing.report import edit_card, measure_side, random_biases, top_neurons
from prune_edit.editing.report import save as save_edit
from prune_edit.editing.suppress import scale_neurons
from prune_edit.errors import PlanError, PruneEditError
from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.evaluation.comparison import Comparison, Evaluation, compare_decoders
from prune_edit.evaluation.comparison import evaluate_decoder as _evaluate_decoder
from prune_edit.evaluation.cost import weight_folder
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, Kept, Plan, keep_top
from prune_edit.planning import keep_neurons as best_neurons
from prune_edit.pruning import Note, Pruning
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.lora import Teacher, tune
from prune_edit.recover.shrink import shrink
from prune_edit.samples import SCORING_EXAMPLES, TEST_EXAMPLES, VALIDATION_EXAMPLES, Samples
from prune_edit.scoring import (
    METHODS,
    Options,
    Progress,
    Scores,
    load_adapter,
    predicted_targets,
    silent,
)
from prune_edit.scoring.parallel import joined
from prune_edit.scoring.projection import TopUnits, top_units
from prune_edit.scoring.run import (
    check_settings,
    contrast_prompts,
    score_task,
)
from prune_edit.search import smallest_neurons
from prune_edit.support import check_prunable
from prune_edit.tasks import RETAINED, Task, load_task
from prune_edit.tasks.fit import fit_task
from prune_edit.tasks.gender import factual_gender
from prune_edit.tasks.prompts import Encoded
from prune_edit.workspace import Workspace

FORMATS = ("ragged", "masked")
RECOVERIES = ("auto", "none", "mean", "lora")
_COLLAPSED = 20.0  # points of validation accuracy, beyond which only tuning can help


def _ignore(text: object) -> None:
    """The Note that shows nothing."""


def score(
    model: str | Path | None = None,
    task: str | Task = "arithmetic",
    *,
    method: str = "cna",
    split: str = "train",
    target: str = "answer",
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    top_heads: int = 1,
    neurons: bool | None = None,
    ablation: str = "zero",
    measure: str = "logprob",
    norm: str = "frozen",
    adapter: str | Path | None = None,
    contrast: bool = False,
    integrated_steps: int = 1,
    query_neurons: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
    device_map: str | None = None,
    max_memory: str | None = None,
    cache: bool = False,
    launched: bool = False,
    show: int = 0,
    shown: Callable[[TopUnits], None] = _ignore,
    progress: Progress = silent,
    note: Note = _ignore,
) -> Scores:
    """How much every head and neuron matters for a task: heads (L, H), neurons (L, N).

    `target="predicted"` scores the model's own next token instead of the answer. Without `neurons`
    theirs are NaN (default: scored, but by `intervention`, which takes very long). The settings
    from `top_heads` to `query_neurons` are Options'; `adapter` is the folder of a LoRA adapter and
    `contrast` takes the examples' own contrast prompts, both for `cna`. `device_map` and
    `max_memory` are load_decoder's. With `cache`, a killed run goes on and a finished one is found
    again; `launched` shares the work with the other processes of an `accelerate launch`. The top
    `show` units with their vocabulary projections go to `shown`. Raises ModelError, TaskError,
    PlanError for settings that the method does not read.
    """
    wanted = _task(task)
    check_method(method)
    plain = Options(
        seed=seed,
        batch_tokens=batch_tokens,
        top_heads=top_heads,
        neurons=method != "intervention" if neurons is None else neurons,
        ablation=ablation,
        measure=measure,
        norm=norm,
        integrated_steps=integrated_steps,
        query_neurons=query_neurons,
        progress=progress,
    )
    check_settings(method, plain, adapter=adapter, contrast=contrast)
    with joined(launched) as workers:

        def prepare() -> tuple[Decoder, Task, list[Encoded], Options]:
            decoder = load_decoder(
                model,
                device=workers.local(device),
                dtype=dtype,
                device_map=device_map,
                max_memory=max_memory,
            )
            data = Samples(fit_task(wanted, decoder, plain), decoder, limit)
            prompts = data.encoded(split, SCORING_EXAMPLES if split == "train" else None)
            options = replace(
                plain,
                adapted=None if adapter is None else load_adapter(decoder, adapter),
                contrast=contrast_prompts(decoder, prompts, wanted.name) if contrast else (),
            )
            return decoder, data.task, prompts, options

        decoder, fitted, prompts, options = workers.here(prepare)
        scores = score_task(
            decoder, fitted, prompts, method, target, options, split, workers, cache, note
        )
        if show:

            def describe() -> None:
                rows = prompts
                if target == "predicted":
                    rows = predicted_targets(decoder, prompts, options)
                shown(top_units(decoder, scores, rows, options, show))

            workers.from_main(describe)
    return scores


def plan(
    scores: Scores,
    *,
    keep_heads: str = "all",
    keep_neurons: str | None = None,
    max_drop: float = 1.0,
    model: str | Path | None = None,
    task: str | Task | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
    note: Note = _ignore,
) -> Plan:
    """Which units stay at these budgets.

    Without `keep_neurons` the smallest neuron budget is searched that loses at most `max_drop`
    points of validation accuracy against the same model with only its heads pruned, both with mean
    compensation; that needs the model and task, by default those the scores name. Where neurons
    were not scored all of them stay. Raises BudgetError, PlanError for scores of another model, or
    without neurons where some are to be chosen.
    """
    head_budget = Budget.parse(keep_heads, "--keep-heads")
    neuron_budget = Budget.parse(keep_neurons, "--keep-neurons") if keep_neurons else None
    heads = keep_top(scores.heads, head_budget.of(_present(scores.heads), "--keep-heads"))
    scored = bool(_present(scores.neurons))
    if not scored and neuron_budget is not None and neuron_budget.share != 1.0:
        raise PlanError(
            f"--keep-neurons {keep_neurons}: these scores have no neurons; score with --neurons "
            "(slow by intervention) or by another --score, or give --keep-neurons all"
        )
    if scored and neuron_budget is not None:
        count = neuron_budget.of(_present(scores.neurons), "--keep-neurons")
        neurons = best_neurons(scores.neurons, count)
    else:
        decoder = load_decoder(
            model or scores.metadata.get("model") or None, device=device, dtype=dtype
        )
        if decoder.digest != scores.metadata.get("model_digest"):
            raise PlanError(
                f"the scores are of another model than {decoder.source}; give the model they were "
                "made with" + (", or --keep-neurons" if scored else "")
            )
        if not scored:
            note("the scores have no neurons: all neurons stay")
            return _plan(heads, decoder.layout.neurons, scores)
        options = Options(progress=progress)
        chosen = _task(task or scores.metadata.get("task_source", ""))
        data = Samples(fit_task(chosen, decoder, options), decoder, limit)
        _check_task(data.task, scores.metadata.get("task_digest", ""), task is not None)
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
                "stay, for tuning (apply --recover lora) or your own --keep-neurons"
            )
        else:
            neurons = smallest_neurons(fewer, scores.neurons, validation, means, max_drop, options)
    return _plan(heads, neurons, scores)


def _plan(heads: Kept, neurons: Kept, scores: Scores) -> Plan:
    return Plan(
        heads=heads,
        neurons=neurons,
        n_heads=scores.heads.shape[1],
        n_neurons=scores.neurons.shape[1],
        method=scores.metadata.get("method", ""),
        task=scores.metadata.get("task", ""),
        task_source=_portable(scores.metadata.get("task_source", "")),
        task_digest=scores.metadata.get("task_digest", ""),
        model_digest=scores.metadata.get("model_digest", ""),
        scores_digest=scores.digest,
        seed=int(scores.metadata.get("seed", "0")),
    )


def apply(
    model: str | Path | None,
    plan: Plan,
    out: str | Path,
    *,
    format: str = "ragged",
    recover: str = "mean",
    task: str | Task | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the checkpoint a plan describes; `mean` and `lora` need the task (default: the plan's).

    `lora` goes gradually: the heads of the plan stay in every round. Raises PlanError for a plan of
    another model, OutputExistsError, OutputWriteError, VerificationError.
    """
    out = Path(out)
    check_output(out, overwrite)
    decoder = load_decoder(model, device=device, dtype=dtype)
    check_prunable(decoder.family)
    if plan.model_digest and plan.model_digest != decoder.digest:
        raise PlanError(f"the plan is for another model than {decoder.source}; use that one")
    Layout.of_plan(plan, decoder.layout.n_kv_heads).check_within(decoder.layout)
    options = Options(seed=seed, progress=progress)
    data: Samples | None = None
    if recover != "none" or task is not None:
        chosen = _task(task or plan.task_source)
        data = Samples(fit_task(chosen, decoder, options), decoder, limit)
        _check_task(data.task, plan.task_digest, task is not None)
    if recover == "lora":
        assert data is not None
        small = gradual(
            decoder,
            data.train(),
            plan.method if plan.method in METHODS else "cna",
            plan.kept_heads,
            None,
            options,
            Schedule(),
            Workspace(),
            must_keep=plan.heads,
        )
        means = data.encoded("train", SCORING_EXAMPLES)
        small = shrink(small, plan.heads, plan.neurons, means, options)
        if plan.neurons != decoder.layout.neurons:
            small = tune(small, data.train(), Schedule().round_tuning, options, Teacher(decoder))
    else:
        prompts = None if recover == "none" else data and data.encoded("train", SCORING_EXAMPLES)
        small = shrink(decoder, plan.heads, plan.neurons, prompts or None, options)
    with replacing(out, overwrite) as folder:
        provenance = _write(folder, small, decoder, plan, format, recover)
        card = model_card(None, plan, provenance)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _write(
    folder: Path, small: Decoder, dense: Decoder, plan: Plan, format: str, recover: str
) -> dict[str, Any]:
    """Write, verify by reading back, and return where the checkpoint comes from."""
    provenance = {
        "tool_version": __version__,
        "base_model": _base_name(dense),
        "base_digest": dense.digest,
        "task": plan.task,
        "method": plan.method,
        "recover": recover,
        "format": format,
        "plan_digest": plan.digest,
    }
    source = Path(dense.source)
    write_checkpoint(
        folder,
        format,
        small.family,
        small.model.config.to_dict(),
        {name: tensor.cpu() for name, tensor in small.model.state_dict().items()},
        small.layout,
        source_folder=source if source.is_dir() else None,
        provenance=provenance,
    )
    if not source.is_dir():
        dense.tokenizer.save_pretrained(folder)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    verify(folder, small.model, _probe(small))
    return provenance


def _base_name(decoder: Decoder) -> str:
    """A name that is no path of this machine."""
    from prune_edit.loading import REFERENCE_MODEL

    source = decoder.source
    if source == str(REFERENCE_MODEL):
        return "prune-edit/reference-model"
    return Path(source).name if Path(source).is_dir() else source


def _probe(decoder: Decoder) -> torch.Tensor:
    """A few ids to verify with: arbitrary, but the same every time, (2, T)."""
    length = min(8, decoder.max_positions or 8)
    ids = torch.arange(2 * length).view(2, length) * 7 + 3
    return ids % decoder.unembedding.shape[0]


def prune(
    model: str | Path | None = None,
    *,
    task: str | Task = "arithmetic",
    keep_heads: str = "all",
    keep_neurons: str | None = None,
    max_drop: float = 1.0,
    score: str = "cna",
    format: str = "ragged",
    recover: str = "auto",
    retain: Sequence[str | Task] = (),
    out: str | Path = "pruned",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    target: str = "answer",
    overwrite: bool = False,
    speed: bool = True,
    schedule: Schedule | None = None,
    progress: Progress = silent,
    note: Note = _ignore,
) -> Comparison:
    """Prune a model for a task, write the checkpoint, and compare it with the dense model.

    See the README for the meaning of the budgets and recoveries. Scores come from the train split,
    budgets and recovery from validation, the figures from test. Raises PruneEditError's branches;
    nothing is left at `out` then but what was there.
    """
    out = Path(out)
    budgets = (
        Budget.parse(keep_heads, "--keep-heads"),
        Budget.parse(keep_neurons, "--keep-neurons") if keep_neurons is not None else None,
    )
    check_output(out, overwrite)
    check_method(score)
    wanted = _task(task)
    retained = [_task(name) for name in retain]
    decoder = load_decoder(model, device=device, dtype=dtype)
    check_prunable(decoder.family)
    options = Options(seed=seed, progress=progress)
    fitted = fit_task(wanted, decoder, options, note)
    if not retain and model is None:
        retained = [load_task(name) for name in RETAINED]
    for each in (fitted, *retained):  # what cannot be measured at the end is said at the start
        Samples(each, decoder, limit).encoded("test", TEST_EXAMPLES)
    workspace = Workspace.beside(
        out,
        {
            "version": __version__,
            "model": decoder.digest or decoder.source,
            "task": fitted.digest,
            "budgets": [keep_heads, keep_neurons, max_drop],
            "how": [score, recover, target, limit, seed, device, dtype, repr(schedule)],
        },
    )
    run = Pruning(
        decoder,
        Samples(fitted, decoder, limit),
        *budgets,
        max_drop,
        score,
        target,
        recover,
        options,
        schedule or Schedule(),
        workspace,
        note,
    )
    small, scores = run.result()
    made = replace(_plan(small.layout.heads, small.layout.neurons, scores), seed=seed)
    with replacing(out, overwrite) as folder:
        provenance = _write(folder, small, decoder, made, format, run.recovered)
        shown = small if format == "ragged" else load_decoder(folder, device=device, dtype=dtype)
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
            },
        )
        (folder / "evaluation.json").write_text(comparison.to_json(), encoding="utf-8")
        card = model_card(comparison.to_dict(), made, provenance)
        (folder / "README.md").write_text(card, encoding="utf-8")
    workspace.remove()
    return comparison


def evaluate(
    model: str | Path | None,
    task: str | Task = "arithmetic",
    *,
    against: str | Path | None = None,
    retain: Sequence[str | Task] = (),
    speed: bool = True,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
) -> Evaluation | Comparison:
    """Measure a model on a task's test split; with `against`, beside that (dense) model."""
    wanted = _task(task)
    retained = [_task(name) for name in retain]
    decoder = load_decoder(model, device=device, dtype=dtype)
    options = Options(seed=seed, progress=progress)
    count = limit if limit is not None else TEST_EXAMPLES
    folder = weight_folder(decoder.source)
    if against is None:
        fitted = fit_task(wanted, decoder, options)
        return _evaluate_decoder(
            decoder,
            fitted,
            retain=retained,
            folder=folder,
            options=options,
            limit=count,
            speed=speed,
        )
    dense = load_decoder(against, device=device, dtype=dtype)
    return compare_decoders(
        fit_task(wanted, dense, options),
        dense,
        decoder,
        retained=retained,
        dense_folder=weight_folder(dense.source),
        pruned_folder=folder,
        options=options,
        limit=count,
        speed=speed,
        seed=seed,
    )


def check_method(method: str) -> None:
    """Raise PruneEditError for a method that does not exist, naming the nearest."""
    import difflib

    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        raise PruneEditError(
            f"unknown score {method!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"known are {', '.join(METHODS)}"
        )


def _task(task: str | Task) -> Task:
    return task if isinstance(task, Task) else load_task(task)


def _portable(source: str) -> str:
    """A task's source without this machine's folders, which a plan must not hold."""
    return Path(source).name if Path(source).is_absolute() else source


def _check_task(task: Task, digest: str, chosen: bool) -> None:
    """Raise PlanError where a task found by name is another than the one that was scored."""
    if digest and not chosen and task.digest != digest:
        raise PlanError(
            f"task {task.name!r} is not the one that was scored; give that one with --task"
        )


def _present(scores: torch.Tensor) -> int:
    """How many units the scored model has."""
    return int((~scores.isnan()).sum())


def edit(
    model: str | Path | None = None,
    *,
    concept: str = "gender",
    neurons: int = 18,
    scale: float = 0.0,
    out: str | Path = "edited",
    retain: Sequence[str | Task] = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = _ignore,
) -> dict[str, Any]:
    """Scale the neurons that carry a concept, write the checkpoint, show what that did.

    Neurons are found on the concept's training pairs only (CNA input against input). Returns what
    `edit.json` holds: bias in nats before and after on training and held-out pairs, factual
    gender, retained tasks and perplexity beside it, and ten random choices of as many neurons.
    Raises TaskError, BudgetError for more neurons than there are.
    """
    out = Path(out)
    check_output(out, overwrite)
    wanted = load_concept(concept)
    tasks = [factual_gender(), *(_task(name) for name in retain)]
    decoder = load_decoder(model, device=device, dtype=dtype)
    check_prunable(decoder.family)
    options = Options(seed=seed, progress=progress)
    total = sum(map(len, decoder.layout.neurons))
    count = Budget.parse(str(neurons), "--neurons").of(total, "--neurons")
    scores = concept_scores(decoder, wanted.train, options)
    chosen = keep_top(scores, count)
    edited = scale_neurons(decoder, chosen, scale)
    before, after = (measure_side(side, wanted, tasks, options) for side in (decoder, edited))
    chance = random_biases(decoder, wanted, count, scale, seed, options)
    report = {
        "concept": wanted.name,
        "model": _base_name(decoder),
        "model_digest": decoder.digest,
        "version": __version__,
        "seed": seed,
        "scale": scale,
        "neurons": top_neurons(scores, chosen),
        "of_neurons": total,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "random": {
            "train": [value for value, _ in chance],
            "held_out": [value for _, value in chance],
        },
    }
    if abs(after.train.value) >= min(abs(value) for value, _ in chance):
        note("a random choice of as many neurons lowers the bias as much: this edit proves nothing")
    format = "masked" if decoder.layout.full else "ragged"
    with replacing(out, overwrite) as folder:
        source = Path(decoder.source)
        write_checkpoint(
            folder,
            format,
            edited.family,
            edited.model.config.to_dict(),
            {name: tensor.cpu() for name, tensor in edited.model.state_dict().items()},
            edited.layout,
            source_folder=source if source.is_dir() else None,
            provenance={
                "tool_version": __version__,
                "base_model": _base_name(decoder),
                "base_digest": decoder.digest,
                "concept": wanted.name,
                "edited_neurons": [list(units) for units in chosen],
                "scale": scale,
            },
        )
        if not source.is_dir():
            decoder.tokenizer.save_pretrained(folder)
        save_edit(report, folder)
        (folder / "README.md").write_text(edit_card(report), encoding="utf-8")
        verify(folder, edited.model, _probe(edited))
    return report
