"""`prune-edit gate`: judge a model by rules, for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options


@click.command("gate")
@click.argument("model", metavar="MODEL")
@options.together(
    click.option(
        "--against",
        metavar="MODEL",
        help="The base that MODEL was made from; rules that compare need it.",
    ),
    click.option(
        "--rules",
        required=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of [[rule]] tables.",
    ),
    click.option(
        "--explain",
        is_flag=True,
        help="Say of every rule that failed by how much, and on which examples.",
    ),
    options.out(
        None, "Folder for gate.json, gate.xml (JUnit), gate.md, gate.sarif, gate.html and pictures."
    ),
    click.option(
        "--record",
        is_flag=True,
        help="Put the verdict, a block as well as a pass, into the model folder's README.md.",
    ),
    click.option(
        "--other-base",
        is_flag=True,
        help="Compare although --against is not what MODEL was made from.",
    ),
    options.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Examples of each test, at most.  [default: the rules', else 1024 of a task, all of a "
        "data set]",
    ),
    options.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        metavar="S",
        help="Seed of the resampling.  [default: the rules', else 0]",
    ),
    options.device,
    options.dtype,
    options.overwrite,
    options.as_json,
)
def command(model: str, out: Path | None, explain: bool, as_json: bool, **settings: Any) -> None:
    """Judge MODEL by rules over what is measured of it.

    Exits with 0 if it passed, 1 if a rule of level block failed, 2 if it could not be measured.
    """
    from prune_edit import verbs
    from prune_edit.cli import gate_view, render

    with render.working() as (progress, note), _no_verdict():
        verdict = verbs.gate(model, out=out, **settings, progress=progress, note=note)
    found = verdict.to_dict()
    if as_json:
        options.echo_json(found)
    else:
        gate_view.verdict(found, explain)
        if out is not None:
            render.line(f"written to {out}")
    click.get_current_context().exit(verdict.exit_code)


class _no_verdict:  # noqa: N801
    """Whatever keeps the gate from a verdict ends with 2: 1 is a model that was blocked."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from prune_edit.cli import debugging
        from prune_edit.errors import GateError, PruneEditError

        if not isinstance(error, Exception) or debugging():
            return
        said = str(error) if isinstance(error, PruneEditError) else (
            f"unexpected {type(error).__name__}: {error}; set PRUNE_EDIT_DEBUG=1 to see where, and "
            "please report it"
        )  # fmt: skip
        raise GateError(said) from error
