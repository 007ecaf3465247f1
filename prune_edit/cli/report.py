"""`prune-edit report`: everything known of a checkpoint on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@options.together(
    click.option(
        "--gate",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="gate.json, or its folder, to show.  [default: those in DIR and beside it that judged "
        "these weights]",
    ),
    options.out(None, "HTML file to write.  [default: DIR/report.html, linked by DIR's README.md]"),
    options.overwrite,
    options.as_json,
)
def command(folder: Path, as_json: bool, **settings: Any) -> None:
    """Show everything known of the model in DIR on one HTML page.

    Plan, figures, pictures, origin, edits, verdict and manifest; nothing is measured.
    """
    from prune_edit import verbs
    from prune_edit.cli import render
    from prune_edit.cli.report_view import known

    with render.working():
        found = verbs.report(folder, **settings)
    if as_json:
        options.echo_json(found)
        return
    known(found)
    render.line(f"written to {found['page']}")
