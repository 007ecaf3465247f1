"""Verb `score`: how much every unit matters for a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prune_edit.decoder import Decoder
from prune_edit.fitting import fit_task
from prune_edit.loading import load_decoder
from prune_edit.recover.shrink import without_dead
from prune_edit.recovery import Note
from prune_edit.samples import SCORING_EXAMPLES, Samples
from prune_edit.scoring import (
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
from prune_edit.tasks import Task
from prune_edit.tasks.prompts import Encoded
from prune_edit.tasks.task import SPLITS
from prune_edit.verbs.common import (
    TARGETS,
    Tasks,
    as_task,
    check_known,
    check_limit,
    check_method,
    ignore,
)


def score(
    model: str | Path | None = None,
    task: Tasks = "arithmetic",
    *,
    method: str = "cna",
    split: str = "train",
    target: str = "answer",
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    top_heads: int = 1,
    top_neurons: int = 0,
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
    shown: Callable[[TopUnits], None] = ignore,
    progress: Progress = silent,
    note: Note = ignore,
) -> Scores:
    """How much every head and neuron matters for a task: heads (L, H), neurons (L, N).

    For several tasks, the mean of what each gives alone.

    `target="predicted"` scores the model's own next token instead of the answer. Without `neurons`
    theirs are NaN (default: scored, but by `intervention`, which takes very long). The settings
    from `top_heads` to `query_neurons` are Options'; `adapter` is the folder of a LoRA adapter and
    `contrast` takes the examples' own contrast prompts, both for `cna`. `device_map` and
    `max_memory` are load_decoder's. With `cache`, a killed run goes on and a finished one is found
    again; `launched` shares the work with the other processes of an `accelerate launch`. The top
    `show` units with their vocabulary projections go to `shown`. Raises ModelError, TaskError,
    PlanError for settings that the method does not read.
    """
    wanted = as_task(task)
    check_method(method)
    check_known("split", split, (*SPLITS, "all"))
    check_known("target", target, TARGETS)
    check_limit(limit)
    plain = Options(
        seed=seed,
        batch_tokens=batch_tokens,
        top_heads=top_heads,
        top_neurons=top_neurons,
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
            decoder = without_dead(
                load_decoder(
                    model,
                    device=workers.local(device),
                    dtype=dtype,
                    device_map=device_map,
                    max_memory=max_memory,
                )
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
