"""`prune-edit eval`: measure a model, alone or beside another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options
from prune_edit.textfile import write_text


@click.command("eval")
@click.argument("model", metavar="MODEL")
@options.together(
    click.option("--against", metavar="MODEL", help="Dense model to compare with."),
    options.trust,
    options.task,
    options.retain,
    options.speed,
    options.out(None, "JSON file to write."),
    options.running,
    options.overwrite,
    options.as_json,
)
def command(model: str, out: Path | None, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Measure MODEL's accuracy, size and speed on a task's test split."""
    if out is not None:
        options.check_file(out, overwrite)
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, _):
        found = verbs.evaluate(model, **settings, progress=progress).to_dict()
    found = found if settings["against"] else {"task": _named(settings["task"]), **found}
    if out is not None:
        write_text(out, options.json_text(found))
    if as_json:
        options.echo_json(found)
        return
    render.comparison(found) if settings["against"] else render.evaluation(found)
    if out is not None:
        render.line(f"written to {out}")


def _named(task: str | tuple[str, ...]) -> str:
    from prune_edit.tasks import name_of

    return "+".join(sorted(map(name_of, [task] if isinstance(task, str) else task)))
