"""`prune-edit edit`: find the neurons of a concept and scale them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("edit")
@options.together(
    options.model,
    click.option(
        "--concept",
        default="gender",
        metavar="gender|FILE",
        show_default=True,
        help="Built-in concept, or a .jsonl file of objects with prompt and contrast.",
    ),
    click.option(
        "--neurons",
        default=18,
        type=click.IntRange(min=1),
        metavar="N",
        show_default=True,
        help="How many of the concept's neurons to scale.",
    ),
    click.option(
        "--scale",
        default=0.0,
        type=click.FLOAT,
        callback=options.finite,
        metavar="X",
        show_default=True,
        help="What they are multiplied by.",
    ),
    options.retain,
    options.out("edited", "Folder to write."),
    options.seed,
    options.device,
    options.dtype,
    options.overwrite,
    options.as_json,
)
def command(out: Path, as_json: bool, **settings: Any) -> None:
    """Scale a concept's neurons; show what changed."""
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, note):
        found = verbs.edit(**settings, out=out, progress=progress, note=note)
    if as_json:
        options.echo_json(found)
        return
    render.edit(found)
    render.line(f"written to {out}")
