"""`prune-edit score`: what every head and neuron is worth for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options

_FILE = "scores.safetensors"


@click.command("score")
@options.together(
    options.model,
    options.task,
    options.method,
    options.split,
    options.target,
    options.out("scores", f"Folder, or .safetensors file, to write (a folder gets {_FILE})."),
    options.running,
    options.overwrite,
    options.as_json,
)
def command(out: Path, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Score every head and neuron for a task."""
    target = out if out.suffix == ".safetensors" else out / _FILE
    options.check_file(target, overwrite)
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, _):
        scores = verbs.score(**settings, progress=progress)
        scores.save(target)
    if as_json:
        options.echo_json({**scores.metadata, "digest": scores.digest, "out": str(target)})
        return
    (layers, heads), neurons = scores.heads.shape, scores.neurons.shape[1]
    render.line(
        f"scored {layers} layers of {heads} heads and {neurons} neurons by "
        f"{settings['method']}; written to {target}"
    )
