"""`prune-edit apply`: the checkpoint that a plan describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("apply")
@click.argument("plan", type=click.Path(path_type=Path))
@options.together(
    options.model,
    options.task_of_origin,
    options.form,
    options.recover_fixed,
    options.tuning,
    options.max_drop,
    options.target,
    options.out("pruned", "Folder to write."),
    options.limit,
    options.seed,
    options.device,
    options.dtype_kept,
    options.device_map,
    options.max_memory,
    options.overwrite,
    options.as_json,
)
def command(plan: Path, model: str | None, form: str, as_json: bool, **settings: Any) -> None:
    """Write the checkpoint that PLAN (what `plan` wrote) describes."""
    from prune_edit.planning import Plan

    wanted = Plan.load(plan)
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, note):
        settings = options.tuning_of(settings) | {
            "format": form,
            "progress": progress,
            "note": note,
        }
        out = verbs.apply(model, wanted, settings.pop("out"), **settings)
    kept = {"kept_heads": wanted.kept_heads, "kept_neurons": wanted.kept_neurons}
    if as_json:
        options.echo_json({"out": str(out), "format": form, **kept})
        return
    render.heat_map(wanted)
    render.line(f"written to {out}")
