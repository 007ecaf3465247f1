"""`prune-edit explain`: why a model says what it says, as a page, as JSON, and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import options
from prune_edit.textfile import write_text

_LORA = "lora"


@click.command("explain")
@click.argument("prompt", metavar="[PROMPT|lora]", required=False)
@options.together(
    options.model,
    click.option(
        "--task",
        multiple=True,
        metavar="NAME|FILE",
        callback=options.named_tasks,
        help="Explain a task instead of a prompt, as for score; may be repeated.  "
        "[default: arithmetic, without a prompt]",
    ),
    click.option(
        "--answer",
        metavar="TEXT",
        help="Answer to explain; what the model says instead, where it says something else.  "
        "[default: what it says]",
    ),
    click.option(
        "--token",
        type=click.IntRange(min=1),
        metavar="N",
        help="Which token of --answer, where it has several, the first being 1.",
    ),
    click.option(
        "--adapter",
        metavar="DIR",
        help="LoRA adapter folder: explain what it changed, over PROMPT, or (PROMPT lora) --task.",
    ),
    click.option(
        "--verify",
        is_flag=True,
        help="Cut every edge of the prompt's chain, and show what that did beside its static "
        "score.",
    ),
    click.option(
        "--top",
        default=10,
        type=click.IntRange(min=1),
        metavar="N",
        show_default=True,
        help="Neurons listed.",
    ),
    options.out(
        None,
        "HTML page to write, its JSON and a picture of the heads beside it; or a .json file alone.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Test prompts of the task, at most.  [default: 64]",
    ),
    options.seed,
    options.device,
    options.dtype,
    options.overwrite,
    options.as_json,
)
def command(
    prompt: str | None,
    adapter: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Explain what a model says after PROMPT, how it does a task, or what LoRA changed."""
    if prompt == _LORA:
        if adapter is None:
            raise click.UsageError("explain lora needs --adapter DIR")
        prompt = None
    files = [] if out is None else _files(out)
    from prune_edit import plots

    drawn = out is not None and out.suffix == ".html" and plots.available()
    pictures = plots.files(out.parent, f"{out.stem}-heads") if out is not None and drawn else []
    for file in (*files, *pictures):
        options.check_file(file, overwrite)
    from prune_edit import verbs
    from prune_edit.cli import explained, render

    with render.working() as (progress, note):
        whole = verbs.explain(
            prompt=prompt, adapter=adapter, **settings, progress=progress, note=note
        )
    found = whole.to_dict()
    for file in files:
        html = file.suffix == ".html"
        write_text(file, whole.to_html() if html else options.json_text(found))
    if pictures and "heads" in found:
        maps = [(each["group"], each["log_prob_drops"]) for each in found["heads"]["maps"]]
        folder, name = pictures[0].parent, pictures[0].stem
        files += plots.draw_heat_maps(maps, "log probability lost (nats)", folder, name)
    if as_json:
        options.echo_json(found)
        return
    explained.show(found)
    if files:
        render.line(f"written to {', '.join(map(str, files))}")


def _files(out: Path) -> list[Path]:
    """The JSON and, but for a .json alone, the page; the page last, when all is there."""
    if out.suffix == ".json":
        return [out]
    if out.suffix != ".html":
        raise click.UsageError(f"--out {out} is neither .html nor .json")
    return [out.with_suffix(".json"), out]
