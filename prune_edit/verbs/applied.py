"""Verb `apply`: the checkpoint a plan describes."""

from __future__ import annotations

from pathlib import Path

from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.layout import Layout
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.errors import PlanError
from prune_edit.loading import load_decoder
from prune_edit.planning import Plan
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.lora import Teacher, tune
from prune_edit.recover.shrink import shrink
from prune_edit.samples import SCORING_EXAMPLES, Samples
from prune_edit.scoring import (
    METHODS,
    Options,
    Progress,
    silent,
)
from prune_edit.support import check_prunable
from prune_edit.tasks import Task
from prune_edit.tasks.fit import fit_task
from prune_edit.verbs.common import (
    as_task,
    check_task,
    write,
)
from prune_edit.workspace import Workspace


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
        chosen = as_task(task or plan.task_source)
        data = Samples(fit_task(chosen, decoder, options), decoder, limit)
        check_task(data.task, plan.task_digest, task is not None)
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
        provenance = write(folder, small, decoder, plan, format, recover)
        card = model_card(None, plan, provenance)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out
