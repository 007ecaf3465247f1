"""Verb `prune`: the whole line, from task to evaluated checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.errors import BudgetError, PlanError
from prune_edit.evaluation.comparison import Comparison, compare_decoders
from prune_edit.evaluation.cost import weight_folder
from prune_edit.fitting import fit_task
from prune_edit.loading import load_decoder
from prune_edit.planning import Budget, parse_layers
from prune_edit.pruning import Pruning
from prune_edit.recover.gradual import Schedule
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
from prune_edit.smallest import parse_share
from prune_edit.support import check_prunable
from prune_edit.tasks import RETAINED, Task, load_task
from prune_edit.verbs.common import (
    FORMATS,
    RECOVERIES,
    TARGETS,
    as_task,
    check_drop,
    check_format,
    check_known,
    check_limit,
    check_method,
    ignore,
    made_plan,
    retained_tasks,
    stages_beside,
    write,
)


def prune(
    model: str | Path | None = None,
    *,
    task: str | Task = "arithmetic",
    keep_heads: str | int = "all",
    keep_neurons: str | int | None = None,
    neuron_layers: str = "all",
    max_drop: float = 1.0,
    keep_accuracy: str | None = None,
    score: str = "cna",
    adapter: str | Path | None = None,
    format: str = "ragged",
    recover: str = "auto",
    select: str = "auto",
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
    note: Note = ignore,
) -> Comparison:
    """Prune a model for a task, write the checkpoint, and compare it with the dense model.

    See the README for the meaning of the budgets and recoveries. Neurons go from `neuron_layers`
    ("4-7") alone; with a LoRA `adapter`'s folder, units go in one step. `keep_accuracy` ("99%" of
    the dense model's on validation) finds the smallest model that has it instead. Scores come from
    the train split, budgets and recovery from validation, the figures from test. Raises
    PruneEditError's branches; nothing is left at `out` then but what was there.
    """
    out = Path(out)
    budgets = (
        Budget.parse(keep_heads, "--keep-heads"),
        Budget.parse(keep_neurons, "--keep-neurons") if keep_neurons is not None else None,
    )
    for what, value, known in (
        ("format", format, FORMATS),
        ("recovery", recover, RECOVERIES),
        ("selection", select, SELECTIONS),
        ("target", target, TARGETS),
    ):
        check_known(what, value, known)
    share = None if keep_accuracy is None else parse_share(keep_accuracy)
    if share is not None and (keep_neurons is not None or budgets[0].share != 1.0):
        raise BudgetError(
            f"--keep-accuracy {keep_accuracy} finds the budgets; leave out --keep-heads and "
            "--keep-neurons"
        )
    parse_layers(neuron_layers, "--neuron-layers")
    if adapter is not None and (share is not None or select == "gradual"):
        other = "--select gradual" if share is None else f"--keep-accuracy {keep_accuracy}"
        raise PlanError(
            f"--adapter {adapter} is of the dense model, and {other} scores smaller ones; leave "
            "out one of them"
        )
    if share is not None and select == "one-shot":
        raise PlanError("--keep-accuracy goes in rounds; leave out --select one-shot")
    if recover == "auto" and select == "gradual" and share is None:
        raise PlanError(
            "--select gradual needs a --recover such as least-squares or full: auto judges by one "
            "step, and goes gradually where it tunes"
        )
    check_drop(max_drop)
    check_limit(limit)
    check_output(out, overwrite)
    check_method(score)
    check_settings(score, Options(seed=seed), adapter=adapter)
    wanted = as_task(task)
    retained = retained_tasks(retain)
    decoder = without_dead(load_decoder(model, device=device, dtype=dtype))
    check_prunable(decoder.family)
    check_format(format, decoder, recover)
    layers = parse_layers(neuron_layers, "--neuron-layers", decoder.n_layers)
    adapted = None if adapter is None else load_adapter(decoder, adapter)
    options = Options(seed=seed, progress=progress, adapted=adapted)
    fitted = fit_task(wanted, decoder, options, note)
    if not retain and model is None:
        retained = [load_task(name) for name in RETAINED]
    retained = [fit_task(each, decoder, options) for each in retained]
    for each in (fitted, *retained):  # what cannot be measured at the end is said at the start
        Samples(each, decoder, limit).encoded("test", TEST_EXAMPLES)
    workspace = stages_beside(
        out,
        decoder,
        fitted,
        [keep_heads, keep_neurons, keep_accuracy, max_drop, score, recover, select, target, limit,
         seed, device, dtype, repr(schedule), layers, adapted and adapted.digest],
    )  # fmt: skip
    recovery = Recovery(
        decoder,
        Samples(fitted, decoder, limit),
        recover,
        max_drop,
        score,
        target,
        options,
        workspace,
        note,
        schedule,
        select if adapted is None else "one-shot",
        neuron_layers=layers,
    )
    pruning = Pruning(recovery, *budgets, share)
    small, scores = pruning.result()
    made = replace(made_plan(small.layout.heads, small.layout.neurons, scores), seed=seed)
    with replacing(out, overwrite) as folder:
        provenance = write(folder, small, decoder, made, format, recovery.recovered)
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
                **pruning.report,
            },
        )
        (folder / "evaluation.json").write_text(comparison.to_json(), encoding="utf-8")
        card = model_card(comparison.to_dict(), made, provenance)
        (folder / "README.md").write_text(card, encoding="utf-8")
    workspace.remove()
    return comparison
