"""`prune-edit score`: what every head and neuron is worth for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prune_edit.cli import is_main, options

_FILE = "scores.safetensors"

_top_heads = options.option(
    "--top-heads",
    default=1,
    type=click.IntRange(min=1),
    metavar="K",
    help="Heads that cna and cna-cases ablate together, each example its own.",
)
_top_neurons = options.option(
    "--top-neurons",
    default=0,
    show_default=False,
    type=click.IntRange(min=0),
    metavar="K",
    help="Find the K neurons of highest score by importance or cna and score no others, at a "
    "fraction of the work. (plan ranks by size, and would keep some of negative score among all.)",
)
_adapter = options.option(
    "--adapter",
    metavar="DIR",
    help="LoRA adapter folder: cna and cna-cases compare the model tuned so with the model.",
)
_contrast = options.option(
    "--contrast",
    is_flag=True,
    help="cna and cna-cases compare each prompt with its example's contrast prompt.",
)
_norm = options.option(
    "--norm",
    default="frozen",
    type=click.Choice(("frozen", "true")),
    help="Final norm in neurons' importance: its scale frozen, or following each sum (slow).",
)
_ablation = options.option(
    "--ablation",
    default="zero",
    type=click.Choice(("zero", "mean")),
    help="What intervention puts in a unit's place: zero, or its mean over the prompts.",
)
_measure = options.option(
    "--measure",
    default="logprob",
    type=click.Choice(("logprob", "accuracy", "logodds")),
    help="What intervention (logprob, accuracy) or taylor (logprob, logodds) measures; by accuracy "
    "most units tie at 0, so use many prompts (--limit).",
)
_integrated_steps = options.option(
    "--integrated-steps",
    default=1,
    type=click.IntRange(min=1),
    metavar="N",
    help="Points of taylor's integrated gradients; 1 is the first order.",
)
_query_neurons = options.option(
    "--query-neurons",
    default=32,
    type=click.IntRange(min=1),
    metavar="N",
    help="Deep neurons that query and circuit trace back.",
)
_neurons = options.option(
    "--neurons/--no-neurons",
    default=None,
    help="Score neurons.  [default: by every method but intervention, which takes very long]",
)
_batch_tokens = options.option(
    "--batch-tokens",
    default=4096,
    type=click.IntRange(min=1),
    metavar="N",
    help="Padded tokens that run at once: what memory and speed depend on, not the scores.",
)
_show = options.option(
    "--show",
    is_flag=False,
    flag_value=10,
    default=0,
    show_default=False,
    type=click.IntRange(min=0),
    metavar="[N]",
    help="Show the N (10) top heads and neurons and the tokens they promote.",
)
_no_cache = options.option(
    "--no-cache", is_flag=True, help="Neither look for scores in the cache nor keep any."
)


@click.command("score")
@options.together(
    options.model,
    options.task,
    options.method,
    options.split,
    options.target,
    _top_heads,
    _adapter,
    _contrast,
    _norm,
    _ablation,
    _measure,
    _integrated_steps,
    _query_neurons,
    _neurons,
    _top_neurons,
    options.out("scores", f"Folder, or .safetensors file, to write (a folder gets {_FILE})."),
    options.running,
    _batch_tokens,
    options.device_map,
    options.max_memory,
    _show,
    _no_cache,
    options.overwrite,
    options.as_json,
)
def command(
    out: Path, show: int, no_cache: bool, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Score every head and neuron for a task.

    A killed run goes on where it was; `accelerate launch -m prune_edit score` shares the work.
    """
    target = out if out.suffix == ".safetensors" else out / _FILE
    options.check_scores(target, overwrite)
    from prune_edit import verbs
    from prune_edit.cli import render

    top: list[Any] = []
    with render.working() as (progress, note):
        scores = verbs.score(
            **settings,
            cache=not no_cache,
            launched=True,
            show=show,
            shown=top.append,
            progress=progress,
            note=note,
        )
        if is_main():
            scores.save(target)
    found = top[0].to_dict() if top else {}
    if as_json:
        named = {**scores.metadata, "digest": scores.digest, "out": str(target)}
        options.echo_json({**named, "top": found} if found else named)
        return
    if found:
        render.top_units(found, scores.metadata.get("unit", "score"))
    layers, heads = scores.heads.shape
    left_out = bool(scores.neurons.isnan().all())
    neurons = "no neurons" if left_out else f"{scores.neurons.shape[1]} neurons"
    render.line(
        f"scored {layers} layers of {heads} heads and {neurons} by {settings['method']}; "
        f"written to {target}"
    )
    if left_out and settings["neurons"] is None:
        render.line("neurons were left out; --neurons scores them too, very slowly")
