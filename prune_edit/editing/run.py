"""From a concept to its edit: units, what the guards hold, the search, chance beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing import writing
from prune_edit.editing.asked import Asked
from prune_edit.editing.bias import measure_bias
from prune_edit.editing.chance import random_biases
from prune_edit.editing.concept import Concept
from prune_edit.editing.edit import Edit, applied
from prune_edit.editing.find import concept_scores, guard_scores, head_scores
from prune_edit.editing.guard import Guards, Watched, guards_of
from prune_edit.editing.probe import Probe, probe_pairs
from prune_edit.editing.refuse import check_bias, check_can, check_chance, fitting
from prune_edit.editing.report import unit_rows
from prune_edit.editing.search import Search, SearchSettings
from prune_edit.editing.suppress import plain_edit, ranked
from prune_edit.scoring import Options
from prune_edit.tasks import Task

_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Scores:
    """Signed scores of the concept, (L, H) and (L, N), what the guards hold, and what is left."""

    heads: torch.Tensor
    neurons: torch.Tensor
    guard: torch.Tensor
    protected: torch.Tensor


@dataclass(frozen=True)
class Found:
    """An edit with what it was found on, and `report`, what can be said of it so far, as JSON."""

    edit: Edit
    concept: Concept
    probes: dict[str, Probe]
    report: dict[str, Any] = field(repr=False)


def find_edit(
    decoder: Decoder,
    asked: Asked,
    concept: Concept,
    tasks: Sequence[Task],
    options: Options,
    note: Callable[[str], None],
) -> Found:
    """The edit that is asked for; `tasks` are guarded. Nothing is written.

    Raises EditError where there is no bias to tell from chance or chance does as well, or weights
    cannot hold it; TaskError for a concept that the tokenizer or the model cannot do; BudgetError.
    """
    if asked.way in ("mean", "clamp"):
        writing.check_room(decoder)
    total = sum(map(len, decoder.layout.neurons))
    count = asked.count(total)
    concept = fitting(decoder, concept, asked.uneven, note)
    probes = {name: probe_pairs(decoder, pairs) for name, pairs in concept.shown.items()}
    validation = probe_pairs(decoder, concept.validation)
    check_can(decoder, probes["training"])
    check_bias(decoder, probes["training"], validation)
    guards = guards_of(decoder, tasks)
    scores = _scores(decoder, concept, guards, asked.kept, options)
    checks: list[dict[str, Any]] = []
    if asked.way == "search":
        settings = replace(
            asked.settings or SearchSettings(),
            reduce=asked.share,
            neurons=count,
            heads=asked.heads,
            weight=asked.guard_weight,
            seed=options.seed,
            shift=writing.has_room(decoder),
            protected=scores.protected,
        )
        search = Search(decoder, probes["training"], validation, guards, settings, options)
        edit = search.run()
        checks = [check.to_dict() for check in search.checks]
    else:
        weight = asked.guard_weight / 100
        some = ranked(scores.neurons, count, asked.way, scores.guard, weight, scores.protected)
        edit = plain_edit(decoder, some, asked.way, asked.scale, concept.train, options)
    left = check_chance(decoder, edit, validation, options.seed, options)
    if asked.way == "search" and left > 1 - asked.share + 1e-9:
        note(
            f"{1 - left:.0%} of the bias on validation pairs is gone, and not {asked.share:.0%}: "
            "give more --neurons or --heads, or a smaller --guard-weight"
        )
    report = {
        "suppress": asked.way,
        "reduce": asked.share if asked.way == "search" else None,
        "guard_weight": asked.guard_weight,
        "units": unit_rows(decoder, edit, scores.heads, scores.neurons),
        "of": {"heads": sum(map(len, decoder.layout.heads)), "neurons": total},
        "scores": _top_scores(scores),
        "search": checks,
        "random": random_biases(decoder, edit, probes, options.seed + 1, options),
        "curve": _curve(decoder, edit, validation, guards),
    }
    return Found(edit, concept, probes, report)


def _scores(
    decoder: Decoder, concept: Concept, guards: Guards, share: float, options: Options
) -> Scores:
    """What carries the concept, what carries the guards, and the neurons to leave alone."""
    few = {name: rows[:32] for name, rows in guards.train.items()}
    guard = guard_scores(decoder, concept.factual, few, options)
    present = torch.zeros(decoder.neuron_shape, dtype=torch.bool)
    for layer, units in enumerate(decoder.layout.neurons):
        present[layer, list(units)] = True
    count = int(share * int(present.sum()))
    order = guard.nan_to_num(-1.0).masked_fill(~present, -1.0).flatten().argsort(descending=True)
    protected = torch.zeros(guard.numel(), dtype=torch.bool)
    protected[order[:count]] = True
    return Scores(
        head_scores(decoder, concept.train, options),
        concept_scores(decoder, concept.train, options),
        guard.nan_to_num(0.0),
        protected.view(decoder.neuron_shape),
    )


@torch.no_grad()
def _curve(
    decoder: Decoder, edit: Edit, validation: Probe, guards: Guards
) -> list[dict[str, float]]:
    """Damage against reduction on validation, of the same edit done in part."""
    before = measure_bias(decoder, validation).size
    watched = Watched(decoder, guards.validation)
    rows = []
    for part in _PARTS:
        some = edit.part(part)
        with applied(decoder, some):
            left = measure_bias(decoder, validation).size / max(before, 1e-9)
        damage = watched.damage(partial(applied, decoder, some))
        rows.append({"part": part, "reduction": 1 - left, "damage": damage})
    return rows


def _top_scores(scores: Scores, count: int = 10) -> dict[str, list[dict[str, Any]]]:
    """The units that carry the bias most, and those that work against it most."""
    found = {}
    for name, sign, mark, values in (
        ("heads", 1, "^", scores.heads),
        ("heads_against", -1, "^", scores.heads),
        ("neurons", 1, "_", scores.neurons),
        ("neurons_against", -1, "_", scores.neurons),
    ):
        flat = (sign * values).nan_to_num(-torch.inf).flatten()
        width = values.shape[1]
        found[name] = [
            {
                "name": f"{at // width}{mark}{at % width}",
                "score": float(values.flatten()[at]),
                **(
                    {
                        "guard": float(scores.guard.flatten()[at]),
                        "protected": bool(scores.protected.flatten()[at]),
                    }
                    if mark == "_"
                    else {}
                ),
            }
            for at in flat.argsort(descending=True, stable=True)[:count].tolist()
        ]
    return found
