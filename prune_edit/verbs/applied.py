"""Verb `apply`: the checkpoint a plan describes."""

from __future__ import annotations

from pathlib import Path

from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, PlanError
from prune_edit.fitting import fit_task
from prune_edit.layout import Layout
from prune_edit.loading import load_decoder
from prune_edit.planning import Plan
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.outside import compensation_in_place
from prune_edit.recover.settings import PLAIN, TuningSettings
from prune_edit.recover.shrink import without_dead
from prune_edit.recovery import Note, Recovery
from prune_edit.running import Progress, silent
from prune_edit.samples import SCORING_EXAMPLES, Samples
from prune_edit.scoring import METHODS, Options
from prune_edit.streamed import StreamedDecoder
from prune_edit.verbs.common import (
    FORMATS,
    RECOVERIES,
    Tasks,
    as_task,
    check_format,
    check_known,
    check_limit,
    check_task,
    ignore,
    stages_beside,
    task_of_origin,
    write,
    write_adapter,
)
from prune_edit.verbs.cut import cut_plan


@claims_output
def apply(
    model: str | Path | None,
    plan: Plan,
    out: str | Path,
    *,
    format: str = "ragged",
    recover: str = "mean",
    task: Tasks | None = None,
    max_drop: float = 1.0,
    target: str = "answer",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    overwrite: bool = False,
    schedule: Schedule | None = None,
    tuning: TuningSettings = PLAIN,
    device_map: str | None = None,
    max_memory: str | None = None,
    progress: Progress = silent,
    note: Note = ignore,
) -> Path:
    """Write the checkpoint a plan describes; every recovery but `none` needs the task.

    Without recovery the weights are streamed: neither model is ever in memory, and they keep their
    `dtype` unless one is given; else float32 is the default. The task is by default the plan's.
    `device_map` and `max_memory` are load_decoder's: of a model whose layers stay on disk the means
    are taken layer by layer, and its weights are streamed, too.
    `auto` tunes where the mean loses more than `max_drop` points of validation accuracy; tuning
    goes gradually, and the heads of the plan stay in every round.
    Raises PlanError for a plan of another model, OutputExistsError, OutputWriteError,
    VerificationError.
    """
    out = Path(out)
    check_known("format", format, FORMATS)
    check_known("recovery", recover, RECOVERIES)
    tuning.check(recover)
    check_limit(limit)
    check_output(out, overwrite)
    if recover == "none" and task is None:
        with replacing(out, overwrite) as folder:
            cut_plan(model, plan, folder, format, dtype, device, progress, note)
        return out
    dtype = dtype or "float32"
    decoder = load_decoder(
        model, device=device, dtype=dtype, device_map=device_map, max_memory=max_memory
    )
    on_disk = isinstance(decoder, StreamedDecoder)
    if on_disk and recover != "mean":
        raise ModelError(
            f"--recover {recover} changes weights in memory, which {decoder.source} does not fit "
            "into; give --recover mean or none, or more --max-memory"
        )
    decoder = decoder if on_disk else without_dead(decoder)
    tuning.check_layers(decoder.n_layers)
    check_format(format, decoder, recover)
    if plan.model_digest and plan.model_digest != decoder.digest:
        raise PlanError(
            f"the plan is for another model than {decoder.source}; give the one that was scored "
            "with --model"
        )
    asked = Layout(
        plan.n_heads, decoder.layout.n_kv_heads, plan.n_neurons, plan.heads, plan.neurons
    )
    asked.check_within(decoder.layout)
    options = Options(seed=seed, progress=progress)
    chosen = as_task(task) if task is not None else task_of_origin(plan.task_source)
    data = Samples(fit_task(chosen, decoder, options), decoder, limit)
    check_task(data.task, plan.task_digest, task is not None)
    if on_disk:
        rows = data.encoded("train", SCORING_EXAMPLES)
        made = compensation_in_place(decoder, plan.heads, plan.neurons, rows, options)
        with replacing(out, overwrite) as folder:
            cut_plan(model, plan, folder, format, dtype, device, progress, note, made)
        return out
    workspace = stages_beside(
        out,
        decoder,
        data.task,
        [plan.digest, recover, max_drop, target, limit, seed, device, dtype, repr(schedule),
         tuning],
    )  # fmt: skip
    method = plan.method if plan.method in METHODS else "cna"
    # The units are given: rounds serve tuning alone.
    select = "one-shot" if recover == "least-squares" else "auto"
    recovery = Recovery(
        decoder, data, recover, max_drop, method, target, options, workspace, note, schedule,
        select, tuning=tuning,
    )  # fmt: skip
    small, recovered = _recovered(recovery, plan), recovery.recovered
    with replacing(out, overwrite) as folder:
        provenance = write(folder, small, decoder, plan, format, recovered)
        provenance |= write_adapter(folder, small, format, recovered, workspace, note)
        card = model_card(None, plan, provenance)
        (folder / "README.md").write_text(card, encoding="utf-8")
    workspace.remove()
    return out


def _recovered(recovery: Recovery, plan: Plan) -> Decoder:
    """The model with the plan's units and what makes up for the others."""
    small = recovery.settle(plan.heads, plan.neurons)
    if small is None:
        small = gradual(recovery.in_rounds(must_keep=plan.heads), plan.kept_heads)
        small = recovery.with_neurons(small, plan.neurons, "neurons")
    return small
