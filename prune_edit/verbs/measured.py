"""Verb `evaluate`: a model's figures, alone or beside another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prune_edit.evaluation.comparison import Comparison, Evaluation, compare_decoders
from prune_edit.evaluation.comparison import evaluate_decoder as _evaluate_decoder
from prune_edit.evaluation.cost import weight_folder
from prune_edit.fitting import fit_task
from prune_edit.loading import load_decoder
from prune_edit.samples import TEST_EXAMPLES
from prune_edit.scoring import (
    Options,
    Progress,
    silent,
)
from prune_edit.tasks import Task
from prune_edit.verbs.common import (
    Tasks,
    as_task,
    check_limit,
    retained_tasks,
)


def evaluate(
    model: str | Path | None,
    task: Tasks = "arithmetic",
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
    """Measure a model on the test split of its tasks; with `against`, beside that (dense) model."""
    check_limit(limit)
    wanted = as_task(task)
    retained = retained_tasks(retain)
    decoder = load_decoder(model, device=device, dtype=dtype)
    options = Options(seed=seed, progress=progress)
    retained = [fit_task(each, decoder, options) for each in retained]
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
