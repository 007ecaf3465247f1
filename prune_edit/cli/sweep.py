"""`prune-edit sweep`: the frontier of accuracy, size and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


def _budgets(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    if not found:
        raise click.BadParameter("give budgets with commas between, such as 50%,25%,12")
    return found


_heads = options.option(
    "--heads",
    default="50%,25%,10%,5%",
    metavar="N|P%|all,...",
    callback=_budgets,
    help="Budgets of attention heads.",
)
_neurons = options.option(
    "--neurons",
    default="all",
    metavar="N|P%|all,...",
    callback=_budgets,
    help="Budgets of FFN neurons, each with every budget of heads.",
)
_random = options.option(
    "--random",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Random selections beside every point, recovered alike: each takes as long as the rest.",
)


@click.command("sweep")
@options.together(
    options.model,
    options.task,
    _heads,
    _neurons,
    options.pruning_method,
    options.recover,
    options.select_walk,
    options.tuning,
    options.retain_weighted,
    _random,
    options.out("frontier", "Folder for frontier.json, plans and pictures."),
    options.running,
    options.speed,
    options.overwrite,
    options.as_json,
)
def command(method: str, out: Path, as_json: bool, **settings: Any) -> None:
    """Draw the frontier of accuracy, size and speed, with a plan for each point.

    Here --recover auto tunes every point.
    """
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, note):
        found = verbs.sweep(
            **options.tuning_of(settings), score=method, out=out, progress=progress, note=note
        ).to_dict()
    if as_json:
        options.echo_json(found)
        return
    render.frontier(found)
    render.line(f"written to {out}; prune-edit apply {out}/{_example(found)} makes a checkpoint")


def _example(found: dict[str, Any]) -> str:
    knee: str = found["knee"]["plan"] or found["points"][-1]["plan"]
    return knee
