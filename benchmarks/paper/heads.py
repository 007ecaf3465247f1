"""Tables 1, 2, 3, 18 and 24 to 27: what single heads do for each operation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from cases import SIGNS, Setting, decrease, percent
from found import Found

from prune_edit import plots
from prune_edit.explain import HeadMap, answers_with, carry_rows, explain_heads, token_rows
from prune_edit.tasks.prompts import Encoded
from prune_edit.units import Units

_TOP = 5


def by_operation(setting: Setting, table: str, folder: Path | None) -> Found:
    """Tables 1 and 18: accuracy without each of the five heads that cost most."""
    maps = explain_heads(setting.decoder, setting.mixed(), setting.options)
    every = maps.of()
    tops = every.best(_TOP, by="accuracy")
    rows = {"all": _accuracies(every, tops)}
    for operation, sign in SIGNS.items():
        rows[f"2D{sign}"] = _accuracies(maps.of(operation), tops)
    drops = [x for row in every.accuracy_drops for x in row if x is not None]
    least, most = sum(x >= 0.1 for x in drops), sum(x < 0.02 for x in drops)
    if folder is not None and plots.available():
        panels = [
            (name, [[float("nan") if x is None else 100 * x for x in row]
                    for row in maps.of(group).accuracy_drops])
            for name, group in (("all", "all"), *((f"2D{SIGNS[o]}", o) for o in SIGNS))
        ]  # fmt: skip
        plots.draw_heat_maps(panels, "accuracy lost (points)", folder, f"table-{table}")
    return Found(
        table, "accuracy without single heads, two-digit operations", rows,
        notes=(f"{least} of {len(drops)} heads cost 10 points or more, {most} less than 2; in the "
               "paper 3 and 976 of 1,024.",) if table == "1" else (),
    )  # fmt: skip


def _accuracies(found: HeadMap, heads: list[tuple[int, int]]) -> dict[str, float | None]:
    cells: dict[str, float | None] = {"ori": percent(found.accuracy)}
    for layer, head in heads:
        drop = found.accuracy_drops[layer][head]
        cells[f"{layer}^{head}"] = percent(found.accuracy - (drop or 0.0))
    return cells


def by_digits(setting: Setting, table: str, folder: Path | None) -> Found:
    """Tables 24 to 27: the top five heads of an operation, one to three digits, `a+b=` alone."""
    operation = list(SIGNS)[int(table) - 24]
    rows, counts = {}, []
    for digits in (1, 2, 3):
        prompts = setting.prompts(operation, digits, last=True)
        counts.append(len(prompts))
        found = explain_heads(setting.decoder, prompts, setting.options).of()
        name = f"{digits}D{SIGNS[operation]}"
        rows[name] = _accuracies(found, found.best(_TOP, by="accuracy"))
    return Found(
        table, f"accuracy without single heads, `a{SIGNS[operation]}b=` of one to three digits",
        rows, notes=(f"{_and(counts)} cases.", *_cannot(rows)),
    )  # fmt: skip


def _and(counts: list[int]) -> str:
    return f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"


def _cannot(rows: dict[str, dict[str, float | None]]) -> tuple[str, ...]:
    unable = [name for name, cells in rows.items() if (cells["ori"] or 0.0) < 10]
    said = f"The model cannot do {', '.join(unable)}, so its rows say nothing of heads."
    return (said,) if unable else ()


def _top(setting: Setting, operation: str) -> tuple[int, int]:
    """The head of an operation: the one that costs two-digit sums most accuracy."""
    prompts = setting.prompts(operation, 2, last=True)
    return explain_heads(setting.decoder, prompts, setting.options).of().best(1, by="accuracy")[0]


def _without(setting: Setting, prompts: list[Encoded], head: tuple[int, int]) -> float:
    """Accuracy without a head."""
    shape = setting.decoder.head_shape
    flat = torch.tensor([head[0] * shape[1] + head[1]])
    gone = Units.without_heads(shape, flat)
    return answers_with(setting.decoder, prompts, setting.options, "heads", lambda _: gone).accuracy


def _decrease(setting: Setting, prompts: list[Encoded], head: tuple[int, int]) -> float | None:
    if not prompts:
        return None
    whole = answers_with(setting.decoder, prompts, setting.options, "answers").accuracy
    return decrease(whole, _without(setting, prompts, head))


def tops_by_digits(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 2: what each operation's own head takes of accuracy with one, two, three digits."""
    heads = {operation: _top(setting, operation) for operation in SIGNS}
    rows = {
        f"{digits}D": {
            SIGNS[operation]: _decrease(
                setting, setting.prompts(operation, digits, last=True), heads[operation]
            )
            for operation in SIGNS
        }
        for digits in (1, 2, 3)
    }
    empty = any(value is None for cells in rows.values() for value in cells.values())
    return Found(
        table, "decrease of accuracy without each operation's top head", rows,
        notes=(f"Heads: {_named(heads)}; in the paper 17^22 (+, -), 20^18 (*), 14^19 (/).",
               *(("Empty: the model has no such accuracy to lose.",) if empty else ())),
        extra={"heads": {SIGNS[key]: list(head) for key, head in heads.items()}},
    )  # fmt: skip


def _named(heads: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{layer}^{head} ({SIGNS[key]})" for key, (layer, head) in heads.items())


def by_carry(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 3: the same for answer tokens that are memorised and those that need a carry."""
    heads = {operation: _top(setting, operation) for operation in SIGNS}
    rows: dict[str, dict[str, float | None]] = {"memorize": {}, "change-one": {}}
    counts = {}
    for operation, sign in SIGNS.items():
        for kind, some in _kinds(setting, operation).items():
            rows[kind][sign] = _decrease(setting, some, heads[operation])
            counts[f"{kind}, {sign}"] = len(some)
    return Found(
        table, "decrease of accuracy on memorised digits and on those with a carry", rows,
        notes=(f"Two-digit prompts of all wordings in digits; heads: {_named(heads)}. A case is "
               "an answer token. For * and / the paper takes the last token for memorised and the "
               "others for change-one; empty where answers have one token.",),
        extra={"cases": counts},
    )  # fmt: skip


def _kinds(setting: Setting, operation: str) -> dict[str, list[Encoded]]:
    """Answer tokens by kind."""
    # Half of the wordings are in words, and have no digits to tell apart.
    prompts = setting.with_cases(2 * setting.cases).prompts(operation, 2)
    found: dict[str, list[Encoded]] = {"memorize": [], "change-one": []}
    if operation in ("add", "sub"):
        for row in carry_rows(setting.decoder, prompts):
            found[row.example.group.partition(", ")[2]].append(row)
        return found
    tokenizer = setting.decoder.tokenizer
    for prompt in prompts:
        rows = token_rows([prompt])
        texts = [str(tokenizer.decode([row.answer[0]])).strip() for row in rows]
        rows = [row for row, text in zip(rows, texts, strict=True) if text.isdecimal()]
        for place, row in enumerate(rows):
            kind = "memorize" if place == len(rows) - 1 else "change-one"
            found[kind].append(replace(row, example=replace(row.example, group=kind)))
    return found
