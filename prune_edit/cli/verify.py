"""`prune-edit verify`: whether a folder is what it claims to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("verify")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@options.together(
    click.option(
        "--against",
        metavar="BASE",
        help="Base model, to compare its digest and, where nothing was recovered, every tensor.",
    ),
    options.trust,
    click.option(
        "--public-key",
        type=click.Path(path_type=Path),
        metavar="PEM",
        help="Check the signature, model.sig, too (pip install 'prune-edit[sign]').",
    ),
    click.option(
        "--sign",
        "sign_with",
        type=click.Path(path_type=Path),
        metavar="PEM",
        help="Sign the folder with this private key where all checks hold.",
    ),
    options.as_json,
)
def command(folder: Path, as_json: bool, **settings: Any) -> None:
    """Check DIR against its manifest, its configuration, its plan and its base model."""
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working() as (progress, _):
        found = verbs.verify(folder, **settings, progress=progress)
    if as_json:
        options.echo_json(found)
    else:
        for check in found["checks"]:
            said = f": {check['said']}" if check["said"] else ""
            render.line(f"{'ok    ' if check['ok'] else 'FAILED'} {check['name']}{said}")
    if not found["ok"]:
        from prune_edit.errors import VerificationError

        raise VerificationError(f"{folder} is not what it claims; get it again from its maker")
