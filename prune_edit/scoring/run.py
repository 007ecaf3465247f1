"""One scoring from prompts to numbers: found in the cache, continued, or made, in shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch

from prune_edit import __version__
from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, PlanError, TaskError
from prune_edit.scoring import METHODS, MOMENTS, Scores, additive, predicted_targets
from prune_edit.scoring.cache import entry_of
from prune_edit.scoring.combine import combined
from prune_edit.scoring.offload import check_streamed, score_streamed, shard_size
from prune_edit.scoring.options import Options
from prune_edit.scoring.parallel import Workers, run_shards, sum_shards
from prune_edit.scoring.shards import Part, Score, shards_of
from prune_edit.scoring.statistics import Moments
from prune_edit.streamed import StreamedDecoder
from prune_edit.tasks.combine import CombinedTask, by_part
from prune_edit.tasks.prompts import Encoded, encode_all
from prune_edit.tasks.task import Task

_MEASURES = {"intervention": ("logprob", "accuracy"), "taylor": ("logprob", "logodds")}
_READ_BY = {
    "ablation": ("intervention",),
    "measure": ("intervention", "taylor"),
    "norm": ("cna", "circuit", "cna-cases", "importance", "query"),
    "top_neurons": ("cna", "importance"),
    "top_heads": ("cna", "circuit", "cna-cases"),
    "adapter": ("cna", "cna-cases"),
    "contrast": ("cna", "cna-cases"),
    "integrated_steps": ("taylor",),
    "query_neurons": ("circuit", "query"),
}
"""Which methods a setting concerns; those that are not named here concern all."""


def check_settings(method: str, options: Options, **more: object) -> None:
    """Raise PlanError for a setting, changed from its default, that the method does not read.

    `more` are those that become options only once a model is there: `adapter` and `contrast`.
    """
    stock = {field.name: field.default for field in fields(Options)}
    given = {name: value for name, value in more.items() if value}
    given |= {name: v for name, v in vars(options).items() if name in _READ_BY and v != stock[name]}
    for name, value in given.items():
        if method not in _READ_BY[name]:
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            able = " or ".join(_READ_BY[name])
            raise PlanError(f"{flag} means nothing to --score {method}; it is for {able}")
    measures = _MEASURES.get(method, ())
    if measures and options.measure not in measures:
        raise PlanError(
            f"--measure {options.measure} means nothing to --score {method}; give "
            f"{' or '.join(measures)}"
        )
    if (
        len(contrasts := [name for name in ("adapter", "contrast", "top_heads") if name in given])
        > 1
    ):
        one, other = (f"--{name.replace('_', '-')}" for name in contrasts[:2])
        raise PlanError(f"{one} and {other} are two contrasts; give one of them")


def unit_of(method: str, options: Options) -> str:
    """What a method's scores are in: nats of log probability, share of examples, or neither."""
    if method == "intervention" and options.measure == "accuracy":
        return "share"
    return "nats" if method in ("cna", "importance", "intervention", "taylor") else "score"


def settings_of(method: str, options: Options) -> dict[str, str]:
    """The settings that are not the defaults and decide the method's scores, for the metadata."""
    found = {}
    for field in fields(Options):
        value = getattr(options, field.name)
        if method in _READ_BY.get(field.name, ()) and value != field.default:
            found[field.name] = "task" if field.name == "contrast" else str(value)
    if options.adapted is not None:
        found["adapted_digest"] = options.adapted.digest
    return found


def contrast_prompts(
    decoder: Decoder, prompts: Sequence[Encoded], name: str
) -> tuple[Encoded, ...]:
    """Each prompt's contrast with the same answer, in their order.

    Raises TaskError for an example without one.
    """
    examples = []
    for row in prompts:
        if row.example.contrast is None:
            raise TaskError(
                f"task {name!r}: the example with prompt {row.example.prompt!r} has no contrast; "
                'give every example one ("contrast": "..."), or leave out --contrast'
            )
        examples.append(replace(row.example, prompt=row.example.contrast))
    where = f"contrasts of task {name!r}"
    return tuple(encode_all(decoder.tokenizer, examples, where, decoder.max_positions))


def same_answers(contrast: Sequence[Encoded], prompts: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """The contrasts with the answers of the prompts, which may be the model's own."""
    return tuple(
        replace(other, ids=(*other.ids[: other.start], *row.answer))
        for other, row in zip(contrast, prompts, strict=True)
    )


def run_scoring(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    method: str,
    options: Options,
    workers: Workers,
    cached: bool,
    note: Callable[[str], None],
) -> Part:
    """Heads (L, H) and neurons (L, N) of a method, by all processes. Notes what it did not do."""
    size = None
    if isinstance(decoder, StreamedDecoder):
        check_streamed(method, options)
        size = workers.from_main(lambda: shard_size(decoder, prompts, workers.count))
        note(f"{decoder.source} does not fit into memory: its layers are read from disk")
    engine = "streamed" if size else "whole"
    entry = entry_of(decoder, prompts, method, options, engine=engine) if cached else None
    if entry is not None:
        found = workers.from_main(entry.load_scores)
        if found is not None:
            note(
                f"found finished scores in the cache ({entry.key[:16]}); --no-cache makes them anew"
            )
            return found
        sums = workers.from_main(entry.load_sums)
        if sums is not None:
            hidden = decoder.unembedding.shape[1]
            count = len(shards_of(prompts, options, sums.size, hidden))
            note(f"going on from {sums.done} of {count} finished shards of an earlier run")
    if method == "intervention" and options.ablation == "mean" and options.means is None:
        seen = sum_shards(decoder, prompts, MOMENTS, options, workers)
        options = replace(options, means=Moments.of(seen.tensors))
    score = _score_of(method)
    how = additive(method, options, score) or score
    part = run_shards(decoder, prompts, how, options, workers, entry, size)
    _check_finite(decoder, part, method, options)
    if not options.neurons:  # where both kinds come at once, they are left out afterwards
        part = part[0], torch.full_like(part[1], torch.nan)
    if entry is not None and workers.main:
        entry.save_scores(part)
    return part


def _check_finite(decoder: Decoder, part: Part, method: str, options: Options) -> None:
    """Raise ModelError for a unit that is there and has no finite score.

    Elsewhere NaN says that a unit is absent; here a weight is broken or a number has overflown.
    """
    there = decoder.layout.heads, decoder.layout.neurons
    whole = options.neurons and not options.top_neurons
    for kind, scores, units in zip(("head", "neuron"), part, there, strict=True):
        for layer, own in enumerate(units if kind == "head" or whole else ()):
            bad = (~scores[layer, list(own)].isfinite()).nonzero()[:, 0]
            if len(bad):
                unit = own[int(bad[0])]
                raise ModelError(
                    f"{kind} {unit} of layer {layer} of {decoder.source} scores "
                    f"{float(scores[layer, unit])} by {method}: the model's weights or states are "
                    "not finite; check the checkpoint, or give --dtype float32"
                )


def _score_of(method: str) -> Score:
    """The method, or its way to a model whose layers are on disk."""

    def score(decoder: Decoder, prompts: Sequence[Encoded], options: Options) -> Part:
        if isinstance(decoder, StreamedDecoder):
            return score_streamed(decoder, prompts, method, options)
        return METHODS[method](decoder, prompts, options)

    return score


def score_task(
    decoder: Decoder,
    task: Task,
    prompts: Sequence[Encoded],
    method: str,
    target: str,
    options: Options,
    split: str = "train",
    workers: Workers | None = None,
    cache: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Scores:
    """A method's scores for a task's prompts, with what they were made from in the metadata.

    Of several tasks, the mean of each one's by weight. Raises PlanError for `top_neurons` of them.
    """
    workers = workers or Workers()
    if isinstance(task, CombinedTask):
        return _score_tasks(
            decoder, task, prompts, method, target, options, split, workers, cache, note
        )
    if target == "predicted":
        prompts = workers.here(lambda: predicted_targets(decoder, prompts, options))
        if options.contrast:
            options = replace(options, contrast=same_answers(options.contrast, prompts))
    heads, neurons = run_scoring(decoder, prompts, method, options, workers, cache, note)
    return Scores(
        heads,
        neurons,
        {
            "method": method,
            "unit": unit_of(method, options),
            **settings_of(method, options),
            "task": task.name,
            "task_source": task.source or task.name,
            "task_digest": task.digest,
            "model": decoder.source,
            "model_digest": decoder.digest,
            "target": target,
            "split": split,
            "examples": str(len(prompts)),
            "seed": str(options.seed),
            "version": __version__,
        },
    )


def _score_tasks(
    decoder: Decoder,
    task: CombinedTask,
    prompts: Sequence[Encoded],
    method: str,
    target: str,
    options: Options,
    split: str,
    workers: Workers,
    cache: bool,
    note: Callable[[str], None],
) -> Scores:
    """Each task's scores, as alone, and what they are together."""
    if options.top_neurons:
        raise PlanError(
            "--top-neurons finds the best of one task, and several tasks have different ones; "
            "give one --task, or leave it out"
        )
    tasks = {part.name: part for part, _ in task.parts}
    contrasts = {id(row): other for row, other in zip(prompts, options.contrast, strict=False)}
    parts = []
    for name, share, rows in by_part(prompts):
        own = replace(options, contrast=tuple(contrasts[id(row)] for row in rows if contrasts))
        label = f"{name}: "
        own = replace(own, progress=lambda what, *n, _as=label: options.progress(_as + what, *n))
        parts.append(
            (
                share,
                score_task(
                    decoder, tasks[name], rows, method, target, own, split, workers, cache, note
                ),
            )
        )
    named = {"task": task.name, "task_source": task.source, "task_digest": task.digest}
    return combined(parts, named)
