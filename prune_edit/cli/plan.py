"""`prune-edit plan`: which units stay at a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options
from prune_edit.textfile import write_text


@click.command("plan")
@click.argument("scores", type=click.Path(path_type=Path))
@options.together(
    options.keep_heads,
    options.keep_neurons,
    options.traded,
    options.neuron_layers,
    options.max_drop,
    options.scored_model,
    options.task_of_origin,
    options.out("plan.json", "File to write."),
    options.limit,
    options.device,
    options.dtype,
    options.overwrite,
    options.as_json,
)
def command(scores: Path, out: Path, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Choose the units that stay, from SCORES (what `score` wrote)."""
    options.check_file(out, overwrite)
    from prune_edit import verbs
    from prune_edit.cli import render
    from prune_edit.scoring.scores import Scores

    with render.working() as (progress, note):
        plan = verbs.plan(Scores.load(scores), **settings, progress=progress, note=note)
    write_text(out, plan.to_json())
    if as_json:
        click.echo(plan.to_json(), nl=False)
        return
    render.heat_map(plan)
    render.line(f"written to {out}")
