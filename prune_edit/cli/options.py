"""The options, declared once. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from prune_edit.errors import OutputExistsError
from prune_edit.planning import Budget, parse_layers
from prune_edit.recover.settings import LOSSES, MODULES, TuningSettings
from prune_edit.trust import trusting

_SCORES = "scores.safetensors"
Function = TypeVar("Function", bound=Callable[..., Any])

METHODS = (
    "cna",
    "circuit",
    "cna-cases",
    "importance",
    "intervention",
    "query",
    "taylor",
    "wanda",
    "flap",
    "activation",
    "magnitude",
    "random",
)
FORMATS = ("ragged", "uniform", "masked")
EXPORTS = ("gguf", "onnx")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
SELECTIONS = ("auto", "one-shot", "gradual", "greedy", "gates")
COSTS = ("parameters", "flops", "bytes", "latency")
KV_RULES = ("pad", "keep-groups", "equal", "duplicate")
RECOVERIES = ("auto", "none", "mean", "least-squares", "lora", "full")


def _budget(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """The budget as given, once it is known to be one: before any model is loaded."""
    if text is not None:
        Budget.parse(text, parameter.opts[0])
    return text


def named_tasks(
    ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> str | tuple[str, ...] | None:
    """The only name as it is, several together."""
    return names if len(names) > 1 else next(iter(names), None)


def _layers(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    return None if text is None else parse_layers(text, parameter.opts[0])


def _some_layers(ctx: click.Context, parameter: click.Parameter, text: str) -> str:
    """The layers as given, once they are known to be some."""
    parse_layers(text, parameter.opts[0])
    return text


def finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    """The number as given, unless it is none of finite size."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number of finite size")
    return value


def finite_if_given(
    ctx: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """As `finite`, where there is a number."""
    return None if value is None else finite(ctx, parameter, value)


def option(*names: str, **settings: Any) -> Callable[[Function], Function]:
    """click's, with the default shown."""
    settings.setdefault("show_default", settings.get("default") is not None)
    return click.option(*names, **settings)


def together(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Several options as one decorator, in the help's order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _trust(what: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Allow it, where it is given, as long as the command runs."""

    def allow(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            ctx.with_resource(trusting(**{what: True}))

    return allow


trust = together(
    option(
        "--allow-pickle",
        is_flag=True,
        expose_value=False,
        callback=_trust("pickle"),
        help="Read weights from .bin and .pt files, too, as tensors and nothing else.",
    ),
    option(
        "--trust-remote-code",
        is_flag=True,
        expose_value=False,
        callback=_trust("remote_code"),
        help="Run Python code that comes with the model.",
    ),
)


def _model(text: str) -> Callable[[Function], Function]:
    """`--model`, and what may be allowed of it."""
    return together(option("--model", metavar="DIR|HUB_ID", help=text), trust)


model = _model("Model to load.  [default: the bundled reference model]")
scored_model = _model("Model to load.  [default: the one that was scored]")
task = option(
    "--task",
    default=("arithmetic",),
    multiple=True,
    metavar="NAME|FILE",
    callback=named_tasks,
    help="Built-in task, a .jsonl file of objects with prompt and answer, a data set such as "
    "blimp:FILE, or lm-eval:TASK; may be repeated.",
)
task_of_origin = option(
    "--task",
    multiple=True,
    metavar="NAME|FILE",
    callback=named_tasks,
    help="Task to use; may be repeated.  [default: those that were scored]",
)
keep_heads = option(
    "--keep-heads",
    default="all",
    metavar="N|P%|all",
    callback=_budget,
    help="Attention heads that stay, over the whole model.",
)
keep_heads_or_knee = option(
    "--keep-heads",
    metavar="N|P%|all",
    callback=_budget,
    help="Attention heads that stay, over the whole model.  [default: without any budget, the knee "
    "of accuracy against size; else all]",
)
keep_neurons = option(
    "--keep-neurons",
    metavar="N|P%|all",
    callback=_budget,
    help="FFN neurons that stay.  [default: the fewest within --max-drop]",
)
neuron_layers = option(
    "--neuron-layers",
    default="all",
    metavar="LAYERS",
    callback=_some_layers,
    help="Layers whose neurons may go, such as 4-7 or 0,2,5-7; --keep-neurons is then of their "
    "neurons, and all others stay.",
)
keep_accuracy = option(
    "--keep-accuracy",
    metavar="P%",
    help="Instead of budgets: the smallest model that keeps P% of the dense model's accuracy on "
    "validation, tuned unless --recover says otherwise.",
)
budget = option(
    "--budget",
    metavar="P%",
    help="Instead of budgets for each: heads and neurons together keep P% of what attention and "
    "FFN projections cost, the prunable cost, and trade by score per cost.",
)
budget_of = option(
    "--budget-of",
    default="parameters",
    type=click.Choice(COSTS),
    help="What --budget counts: parameters, FLOPs per token, bytes, or the time that heads, "
    "neurons and blocks were measured to take on this machine.",
)
align = option(
    "--align",
    default=1,
    type=click.IntRange(min=1),
    metavar="N",
    help="Every FFN keeps a multiple of N neurons, or none, or all.",
)
kv = option(
    "--kv",
    default="pad",
    type=click.Choice(KV_RULES),
    help="Heads that share keys and values: remove them singly and pad short groups, or repeat "
    "keys and values instead (duplicate); keep and remove whole groups; or keep the groups of a "
    "layer equal in size.",
)
serve = option(
    "--serve",
    default="",
    show_default=False,
    type=click.Choice(("", "vllm")),
    metavar="[vllm]",
    help="Engine whose needs the plan keeps: vLLM wants a KV group in every layer.",
)
whole_blocks = option(
    "--whole-blocks/--no-whole-blocks",
    default=False,
    help="With --budget, drop a whole attention or FFN block where the answer, measured without "
    "it, loses less than its cost buys elsewhere.",
)
max_drop = option(
    "--max-drop",
    default=1.0,
    type=click.FloatRange(min=0, max=100),
    callback=finite,
    metavar="POINTS",
    help="Validation accuracy that may be lost, in points.",
)
method = option(
    "--score",
    "method",
    default="cna",
    type=click.Choice(METHODS),
    help="What ranks the units; cna-cases: neurons by the union of each example's own best.",
)
pruning_method = option(
    "--score",
    "method",
    default="auto",
    type=click.Choice(("auto", *METHODS)),
    help="What ranks the units; auto: circuit (heads by ablation, neurons by both sides), with "
    "--adapter cna.",
)
adapter = option(
    "--adapter",
    metavar="DIR",
    help="LoRA adapter folder: cna and cna-cases compare the model tuned so with the model, in one "
    "step.",
)
split = option(
    "--split",
    default="train",
    type=click.Choice(("train", "validation", "test", "all")),
    help="Examples to score.",
)
target = option(
    "--target",
    default="answer",
    type=click.Choice(("answer", "predicted")),
    help="Token to score: the task's answer, or the model's own prediction.",
)
form = option(
    "--format",
    "form",
    default="ragged",
    type=click.Choice(FORMATS),
    help="Each layer its own sizes (ragged), the same smaller ones in all, which stock code loads "
    "(uniform), or the original ones with zeros (masked).",
)
recover = option(
    "--recover",
    default="auto",
    type=click.Choice(RECOVERIES),
    help="What makes up for removed units: nothing, their mean, that and refitting what stays by "
    "least squares, or that and tuning with LoRA or in full; auto takes the first that is enough.",
)
select = option(
    "--select",
    default="auto",
    type=click.Choice(SELECTIONS),
    help="Remove units in one step, or gradually, scored again on the way, or search for those "
    "that stay: heads one by one and neurons by gates (greedy), or all by gates that are learned "
    "with frozen weights (gates); auto: gradually if what stays is refitted or tuned.",
)
select_walk = option(
    "--select",
    default="auto",
    type=click.Choice(("auto", "one-shot", "gradual")),
    help="Remove units in one step, or gradually, scored again on the way; auto: gradually if what "
    "stays is refitted or tuned.",
)
random = option(
    "--random",
    type=click.IntRange(min=0),
    metavar="N",
    help="Random choices of as many units, recovered alike, to measure beside it: each takes as "
    "long as the rest.  [default: 1 where nothing is tuned, else 0]",
)
recover_fixed = option(
    "--recover",
    default="mean",
    type=click.Choice(RECOVERIES),
    help="What makes up for removed units, as for prune.",
)
retain = option(
    "--retain",
    multiple=True,
    metavar="TASK",
    help="Task whose accuracy to watch, too; may be repeated.",
)
retain_guarded = option(
    "--retain",
    multiple=True,
    metavar="TASK",
    help="Task that the edit should leave alone, and whose accuracy to watch; may be repeated.",
)
retain_weighted = option(
    "--retain",
    multiple=True,
    metavar="TASK[=W]",
    help="Task whose accuracy to watch, too; with a weight, such as facts=0.5, it counts so much "
    "beside --task in scores, tuning and searches. May be repeated.",
)
limit = option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Examples used of each split, at most; tuning draws from all.  "
    "[default: 128 to score, 512 to validate, 1024 to test]",
)
seed = option(
    "--seed", default=0, type=click.IntRange(0, 2**32 - 1), metavar="S", help="Random seed."
)
device = option("--device", default="cpu", metavar="D", help="Where to run: cpu, cuda, cuda:1.")
dtype = option(
    "--dtype",
    default="float32",
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="Number format to load weights in.",
)
dtype_kept = option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="Number format to load and write weights in.  [default: float32; with --recover none, "
    "the checkpoint's own]",
)
device_map = option(
    "--device-map",
    type=click.Choice(("auto",)),
    help="auto: a model that does not fit into --max-memory stays on disk and is read a layer at "
    "a time.",
)
max_memory = option(
    "--max-memory",
    metavar="SIZE",
    help="Memory for weights and states, such as 8GiB; needs --device-map.  "
    "[default: what is free]",
)
overwrite = option("--overwrite", is_flag=True, help="Replace the output if it exists.")
as_json = option("--json", "as_json", is_flag=True, help="Print the result as JSON, only that.")
speed = option("--speed/--no-speed", default=True, help="Time prefill and decode.")


def out(default: str | None, text: str) -> Callable[[Function], Function]:
    """`--out` with a command's own default."""
    return option(
        "--out", default=default, type=click.Path(path_type=Path), metavar="PATH", help=text
    )


tuning = together(
    option(
        "--steps",
        type=click.IntRange(min=1),
        metavar="N",
        help="Steps of the final tuning, at most: it ends where validation is as good as the dense "
        "model's.  [default: 2400 in full (sweep: 700), 500 with LoRA]",
    ),
    option(
        "--patience",
        default=0,
        show_default=False,
        type=click.IntRange(min=0),
        metavar="N",
        help="End the final tuning after N checks on validation (20 in all) that bring nothing.  "
        "[default: none; the learning rate falls to the end, so the last steps matter]",
    ),
    option(
        "--loss",
        default="both",
        type=click.Choice(LOSSES),
        help="What tuning lowers: the answers' cross-entropy, the distance to the dense model's "
        "states beside it (both), or to its distribution and states, without labels (distil).",
    ),
    option(
        "--lora-layers",
        metavar="N|A-B,...",
        callback=_layers,
        help="Layers that --recover lora tunes, such as 9 or 0-3,7.  [default: all]",
    ),
    option(
        "--lora-modules",
        default="all",
        type=click.Choice(MODULES),
        help="Projections that --recover lora tunes.",
    ),
)
"""What tuning may be told; `tuning_of` makes it one value."""


def tuning_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The command's settings with those of tuning as one."""
    names = ("steps", "patience", "loss", "lora_layers", "lora_modules")
    own = {name: settings[name] for name in names}
    rest = {name: value for name, value in settings.items() if name not in names}
    return {**rest, "tuning": TuningSettings(**own)}


traded = together(budget, budget_of, align, kv, whole_blocks, serve)
"""What commands that choose units take beside budgets by count."""

running = together(limit, seed, device, dtype)
"""What every command that runs a model takes."""


# Output files; folders are the checkpoint store's.


def check_file(path: Path, overwrite: bool) -> None:
    """Raise OutputExistsError for a file that may not be replaced."""
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        remedy = "give another --out" if path.is_dir() else "give another --out, or --overwrite"
        raise OutputExistsError(f"{path} exists; {remedy}")


def check_scores(path: Path, overwrite: bool) -> None:
    """Raise OutputExistsError where scores may not be written.

    A folder of other things needs --overwrite and keeps them; only scores are ever replaced.
    """
    check_file(path, overwrite)
    folder = path.parent
    others = path.name == _SCORES and folder.is_dir() and any(folder.iterdir())
    if not os.path.lexists(path):
        if others and not overwrite:
            raise OutputExistsError(
                f"{folder} exists and is no scores folder (it has no {_SCORES}); give another "
                "--out, or --overwrite to put the scores beside what is there"
            )
    elif not _holds_scores(path):
        raise OutputExistsError(
            f"{path} exists and holds no scores, so --overwrite does not replace it; give another "
            "--out"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputExistsError(f"{folder} exists and is no folder; give another --out")


def _holds_scores(path: Path) -> bool:
    """Whether a file's safetensors header is that of scores; without importing torch."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 1 << 20)))
    except (OSError, ValueError):
        return False
    return isinstance(header, dict) and set(header) == {"__metadata__", "heads", "neurons"}


def json_text(value: dict[str, Any]) -> str:
    """A result as its file holds it."""
    return json.dumps(value, indent=1) + "\n"


def echo_json(value: dict[str, Any]) -> None:
    """Print a result as its file would hold it."""
    click.echo(json_text(value), nl=False)
