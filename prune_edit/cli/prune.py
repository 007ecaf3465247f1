"""`prune-edit prune`: from task to slim checkpoint to comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("prune")
@options.together(
    options.model,
    options.task,
    options.keep_heads_or_knee,
    options.keep_neurons,
    options.traded,
    options.neuron_layers,
    options.max_drop,
    options.keep_accuracy,
    options.pruning_method,
    options.adapter,
    options.target,
    options.form,
    options.recover,
    options.select,
    options.random,
    options.tuning,
    options.retain_weighted,
    click.option(
        "--edit",
        metavar="CONCEPT",
        help="First edit this concept's bias out, as `edit --concept` does.",
    ),
    click.option(
        "--reduce",
        default="90%",
        metavar="P%",
        show_default=True,
        help="Share of the bias that --edit is to take.",
    ),
    options.out("pruned", "Folder to write."),
    options.running,
    options.speed,
    options.overwrite,
    options.as_json,
)
def command(method: str, form: str, out: Path, as_json: bool, **settings: Any) -> None:
    """Prune a model for a task and compare it with the dense one."""
    from prune_edit import verbs
    from prune_edit.cli import render
    from prune_edit.planning import Plan

    with render.working() as (progress, note):
        found = verbs.prune(
            **options.tuning_of(settings),
            score=method,
            format=form,
            out=out,
            progress=progress,
            note=note,
        ).to_dict()
    if as_json:
        options.echo_json(found)
        return
    render.comparison(found)
    if "edit" in found:
        render.edited_bias(found["edit"])
    render.heat_map(Plan.load(out / "plan.json"))
    render.line(f"written to {out}")
