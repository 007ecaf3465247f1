"""Figures of the model itself: text, size, speed; and what lm-evaluation-harness measures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from prune_edit.decoder import Decoder
from prune_edit.errors import GateError, TaskError
from prune_edit.evaluation.cost import (
    count_parameters,
    flops_per_token,
    weight_bytes,
    weight_folder,
)
from prune_edit.evaluation.perplexity import plain_texts, text_losses
from prune_edit.evaluation.resampling import Rows, exp_mean, mean
from prune_edit.evaluation.speed import Run, run_in_turns
from prune_edit.gating.bench import Bench, outcome
from prune_edit.gating.measured import Measured, exact, from_rows, of_times
from prune_edit.gating.rules import Rule
from prune_edit.tasks.datasets.files import read_text

_USUAL_BATCH = "batch 1"
_FLOPS_CONTEXT = 64


def perplexity_figure(bench: Bench, rule: Rule) -> Measured:
    """Perplexity of plain texts, the bundled stories or a file's lines. Raises TaskError."""
    if rule.of:
        lines = read_text(Path(rule.of), "text").split("\n")
        texts = [line.strip() for line in lines if line.strip()]
    else:
        texts = plain_texts()
    vocabularies = [decoder.tokenizer.get_vocab() for decoder in bench.decoders]
    if vocabularies[0] != vocabularies[-1]:
        raise TaskError(
            "perplexities of two vocabularies do not compare: a token is not the same text; use "
            "max without a base"
        )
    sides = [
        bench.once(("losses", rule.of, i), partial(text_losses, decoder, texts, bench.options))
        for i, decoder in enumerate(bench.decoders)
    ]
    if any(side is None for side in sides):
        raise TaskError(
            "perplexity: the tokenizer cannot write the texts; give a file of the model's own "
            "language with of"
        )
    used = [i for i, (_, tokens) in enumerate(sides[0]) if tokens]
    if len(used) < 2:
        raise TaskError("perplexity: an interval needs two texts at least, one a line")
    rows = [Rows.of([side[i] for i in used], exp_mean) for side in sides]
    outcomes = [outcome(texts[i], "", [side[i][0] / side[i][1] for side in sides]) for i in used]
    return from_rows(rows, bench.options.seed, None, outcomes)


def cost_figure(bench: Bench, rule: Rule) -> Measured:
    """What is counted: parameters, FLOPs, bytes. Raises GateError."""
    values = [_count(rule.figure, decoder, bench) for decoder in bench.decoders]
    return exact(values[0], values[1] if len(values) > 1 else None)


def _count(figure: str, decoder: Decoder, bench: Bench) -> int:
    if figure == "parameters":
        return count_parameters(decoder)
    if figure == "flops":
        positions = [each.max_positions or _FLOPS_CONTEXT for each in bench.decoders]
        return flops_per_token(decoder, min(_FLOPS_CONTEXT, *positions))
    folder = weight_folder(decoder.source)
    if folder is None:
        raise GateError(f"bytes: the weight files of {decoder.source} are not to be found")
    return weight_bytes(folder, decoder.model.dtype)


def speed_figure(bench: Bench, rule: Rule) -> Measured:
    """Tokens a second, model and base in turns. Raises GateError for no batch size."""
    name = rule.of or _USUAL_BATCH
    try:
        batch = int(name.removeprefix("batch "))
    except ValueError:
        batch = 0
    if batch < 1:
        raise GateError(f'{rule.figure}: of = {rule.of!r} is no batch size; give of = "batch 32"')
    runs: list[Run] = bench.once(("speed", batch), lambda: run_in_turns(bench.decoders, batch)[0])
    rows, prompt = runs[0].prompt.shape
    work = rows * prompt if rule.figure == "prefill" else rows
    times = [run.prefill if rule.figure == "prefill" else run.decode for run in runs]
    return of_times(times, work, bench.options.seed)


def lm_eval_figure(bench: Bench, rule: Rule) -> Measured:
    """A metric of the harness. Raises TaskError."""
    from prune_edit.evaluation import harness

    limit = bench.limit
    sides = [
        bench.once(("lm-eval", rule.of, i), partial(harness.scores, decoder, rule.of, limit))
        for i, decoder in enumerate(bench.decoders)
    ]
    tables = [side.of(rule.figure) for side in sides]
    rows = [Rows.of([(value, 1.0) for _, value in table], mean) for table in tables]
    share = all(value in (0.0, 1.0) for table in tables for _, value in table)
    rows = [replace(each, share=share) for each in rows]
    outcomes = [
        outcome(pair[0][0], "", [value for _, value in pair]) for pair in zip(*tables, strict=True)
    ]
    return from_rows(rows, bench.options.seed, None, outcomes)
