"""Tables 11 and 13: pruning and editing, the two applications."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import Setting, percent
from found import Found
from quality import paper_recipe

from prune_edit.editing.bias import Bias, measure_bias
from prune_edit.editing.chance import random_biases
from prune_edit.editing.concept import gender_pairs
from prune_edit.editing.edit import applied
from prune_edit.editing.find import concept_scores
from prune_edit.editing.probe import probe_pairs
from prune_edit.editing.suppress import plain_edit, ranked
from prune_edit.tasks import gender

_NEURONS = 18
_CHOICES = 6  # rows of the recipe: the paper's and five random ones


def pruning(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 11: 5 % of the deep neurons, LoRA on a shallow layer before and after."""
    out = Path(setting.recipe)
    found = paper_recipe.measure(out, setting.recipe_steps, _CHOICES, setting.decoder)
    rows = found["rows"]

    def mean(choice: str, recovery: str) -> float | None:
        every = [r["accuracy"] for r in rows if (r["choice"], r["recovery"]) == (choice, recovery)]
        return percent(sum(every) / len(every)) if every else None

    cells = {
        "origin": mean("all neurons", "none"),
        "LoRA": mean("all neurons", "lora"),
        "LoRA, pruned": mean("cna-cases", "lora"),
        "LoRA, random": mean("random", "lora"),
        "pruned, untuned": mean("cna-cases", "zero"),
        "random, untuned": mean("random", "zero"),
    }
    return Found(
        table, "pruning to 5 % of the deep neurons", {"accuracy": cells},
        notes=(f"{found['kept']} of {found['deep_neurons']:,} neurons of layers "
               f"{found['deep_layers'][0]} to {found['deep_layers'][-1]}, LoRA on layer "
               f"{found['chosen']['layer']}, {found['tuning']['steps']} steps; random is the mean "
               f"of five draws. From {out.name}.",),
        extra={"recipe": out.name},
    )  # fmt: skip


def editing(setting: Setting, table: str, folder: Path | None) -> Found:
    """Table 13: the 18 neurons that CNA finds on the first prompt, zeroed; bias on all eight."""
    decoder, options = setting.decoder, setting.options
    first = gender_pairs(gender.PROMPTS[:1], gender.PROFESSIONS)
    every = probe_pairs(decoder, gender_pairs(gender.PROMPTS, gender.PROFESSIONS))
    scores = concept_scores(decoder, first, options)
    nothing = torch.zeros_like(scores).nan_to_num(0.0)
    units = ranked(scores, _NEURONS, "zero", nothing, 0.0, nothing.bool())
    found = plain_edit(decoder, units, "zero", None, first, options)
    before = measure_bias(decoder, every, options)
    with applied(decoder, found):
        after = measure_bias(decoder, every, options)
    drawn = random_biases(decoder, found, {"all": every}, setting.seed, options)["all"]
    rows = {"origin": _cells(before), "edited": _cells(after)}
    names = ", ".join(change.name for change in found.changes)
    gone = 1 - after.value / before.value if before.value else 0.0
    return Found(
        table, "gender bias with 18 neurons zeroed", rows, unit="nats",
        notes=(f"{gone:.1%} of the bias is gone (the paper: 35.7 %); with as many random neurons "
               f"zeroed it is {min(drawn):.2f} to {max(drawn):.2f} nats.", f"Neurons: {names}."),
        extra={"random": drawn},
    )  # fmt: skip


def _cells(found: Bias) -> dict[str, float | None]:
    cells: dict[str, Any] = {"total": found.value, **found.groups}
    return {name: round(value, 3) for name, value in cells.items()}
