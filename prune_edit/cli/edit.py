"""`prune-edit edit`: lower a concept's bias and leave the rest alone; or take an edit off again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options

_SUPPRESS = ("search", "zero", "scale", "mean", "clamp", "amplify")


@click.command("edit")
@options.together(
    options.model,
    click.option(
        "--concept",
        default="gender",
        metavar="gender|gender-pronouns|FILE",
        show_default=True,
        help="Built-in concept, or a .jsonl file of objects with prompt, contrast and answer.",
    ),
    click.option(
        "--reduce",
        default="90%",
        metavar="P%",
        show_default=True,
        help="Share of the bias that the search is to take.",
    ),
    click.option(
        "--suppress",
        type=click.Choice(_SUPPRESS),
        help="A factor and a constant for each neuron, by a search for the least damage (search); "
        "or the same for all that CNA ranks first.  [default: search; scale with --scale]",
    ),
    click.option(
        "--neurons",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many neurons are changed, at most.  [default: less than 1 % of them to search, "
        "else 18]",
    ),
    click.option(
        "--heads",
        default=0,
        type=click.IntRange(min=0),
        metavar="N",
        show_default=True,
        help="How many heads the search may change, too.",
    ),
    click.option(
        "--scale",
        type=click.FLOAT,
        callback=options.finite_if_given,
        metavar="X",
        help="What neurons are multiplied by (--suppress scale, amplify); 0 is the paper's way.",
    ),
    click.option(
        "--guard-weight",
        default=10.0,
        type=click.FloatRange(min=0),
        callback=options.finite,
        metavar="W",
        show_default=True,
        help="What damage to the factual side, plain text and the retained tasks costs.",
    ),
    click.option(
        "--protect",
        default="1%",
        metavar="P%",
        show_default=True,
        help="Share of the neurons left alone, those that carry most of what is guarded.",
    ),
    click.option(
        "--uneven",
        default="refuse",
        type=click.Choice(("refuse", "drop", "keep")),
        show_default=True,
        help="What to do with pairs whose tokens do not stand at the same places, and answers that "
        "the tokenizer splits.",
    ),
    options.retain_guarded,
    click.option(
        "--undo",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Instead of editing: restore the model that DIR was edited from, to the byte.",
    ),
    options.out("edited", "Folder to write."),
    options.seed,
    options.device,
    options.dtype,
    options.overwrite,
    options.as_json,
)
def command(undo: Path | None, out: Path, as_json: bool, **settings: Any) -> None:
    """Lower a concept's bias with few neurons; show what changed."""
    from prune_edit import verbs
    from prune_edit.cli import render

    if undo is not None:
        restored = verbs.undo(undo, out, overwrite=settings["overwrite"])
        if as_json:
            options.echo_json(restored)
        else:
            render.line(f"restored to {out}: {', '.join(restored['restored'])}")
        return
    with render.working() as (progress, note):
        found = verbs.edit(**settings, out=out, progress=progress, note=note)
    if as_json:
        options.echo_json(found)
        return
    render.edit(found)
    render.line(f"written to {out}")
