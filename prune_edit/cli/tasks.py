"""`prune-edit tasks`: what is built in."""

from __future__ import annotations

import click


@click.command("tasks")
def command() -> None:
    """List the built-in tasks."""
    from prune_edit.cli import render
    from prune_edit.tasks import BUILT_IN

    render.tasks([load() for load in BUILT_IN.values()])
