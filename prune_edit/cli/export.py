"""`prune-edit export`: a checkpoint for another runtime."""

from __future__ import annotations

from pathlib import Path

import click

from prune_edit.cli import options


@click.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@options.together(
    options.option(
        "--to",
        required=True,
        type=click.Choice(options.EXPORTS),
        help="GGUF for llama.cpp, or an ONNX graph without cache.",
    ),
    options.option(
        "--type",
        "kind",
        default="f16",
        type=click.Choice(options.GGUF_TYPES),
        help="Number format of GGUF's matrices.",
    ),
    options.option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="GGUF file, or folder for ONNX, to write.",
    ),
    options.overwrite,
    options.as_json,
)
def command(folder: Path, to: str, kind: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write the model in DIR for another runtime."""
    from prune_edit import verbs
    from prune_edit.cli import render

    with render.working():
        found = verbs.export(folder, to, out, type=kind, overwrite=overwrite)
    if as_json:
        options.echo_json(found)
        return
    if fallback := found.get("kept_in_f16"):
        render.line(f"{len(fallback)} matrices stay f16: q8_0 needs rows of a multiple of 32")
    render.line(f"{found['bytes']:,} bytes written to {out}")
