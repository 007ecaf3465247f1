"""Verb `edit`: lower a concept's bias, leave the rest alone, and show both; `undo` takes it off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_edit import __version__, plots
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import COMPANIONS, write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.editing import writing
from prune_edit.editing.bias import measure_bias, paired_test
from prune_edit.editing.chance import random_biases
from prune_edit.editing.concept import Concept, load_concept
from prune_edit.editing.edit import Edit, applied
from prune_edit.editing.find import concept_scores, guard_scores, head_scores
from prune_edit.editing.generation import generated
from prune_edit.editing.guard import Guards, guards_of
from prune_edit.editing.measure import Side, measure_side, plausible_texts
from prune_edit.editing.probe import UNEVEN, Probe, even_pairs, probe_pairs
from prune_edit.editing.report import dumbbell, edit_card, tests, unit_rows
from prune_edit.editing.report import save as save_report
from prune_edit.editing.search import Search, SearchSettings, damage_of
from prune_edit.editing.suppress import WAYS, plain_edit, ranked
from prune_edit.errors import BudgetError, EditError, TaskError
from prune_edit.loading import load_decoder
from prune_edit.recovery import Note
from prune_edit.scoring import Options, Progress, silent
from prune_edit.tasks import RETAINED, Task
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.common import base_name, check_known, ignore, probe, retained_tasks

PAPERS = 18
"""Neurons that the paper zeroes."""

_SHARE = 0.01  # of the neurons, fewer than which the search changes
_CHANCE = 0.05
_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Scores:
    """Signed scores of the concept, (L, H) and (L, N), what the guards hold, and what is left."""

    heads: torch.Tensor
    neurons: torch.Tensor
    guard: torch.Tensor
    protected: torch.Tensor


@claims_output
def edit(
    model: str | Path | None = None,
    *,
    concept: str = "gender",
    reduce: str = "90%",
    suppress: str | None = None,
    neurons: int | None = None,
    heads: int = 0,
    scale: float | None = None,
    guard_weight: float = 10.0,
    protect: str = "1%",
    uneven: str = "refuse",
    out: str | Path = "edited",
    retain: Sequence[str | Task] = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    settings: SearchSettings | None = None,
    progress: Progress = silent,
    note: Note = ignore,
) -> dict[str, Any]:
    """Lower a concept's bias with few units, write the checkpoint, show what that did.

    By default the least damaging edit is searched that takes `reduce` of the bias on validation
    pairs, with fewer than 1 % of the neurons; a `scale`, or another way to `suppress`, changes the
    `neurons` that CNA ranks first all alike (the paper: 18, zeroed). Guards are plain text, the
    factual side of the concept and the retained tasks: damage on them costs `guard_weight` a nat,
    and the neurons that carry most of them (`protect`) are left alone. Returns what `edit.json`
    holds. Raises EditError, and writes nothing, where there is no bias to tell from chance or
    chance does as well; TaskError for a concept that the tokenizer or the model cannot do.
    """
    out = Path(out)
    way = suppress or ("search" if scale is None else "scale")
    check_known("way to suppress", way, WAYS)
    check_known("rule for uneven pairs", uneven, UNEVEN)
    _check(way, scale, heads, reduce)
    share, kept = _share(reduce, "--reduce"), _share(protect, "--protect", least=0.0)
    check_output(out, overwrite)
    wanted = load_concept(concept)
    tasks = _tasks(wanted, retain, model is None)
    decoder = load_decoder(model, device=device, dtype=dtype)
    if way in ("mean", "clamp"):
        writing.check_room(decoder)
    options = Options(seed=seed, progress=progress, batch_tokens=16384)
    total = sum(map(len, decoder.layout.neurons))
    count = neurons or (max(1, int(_SHARE * total - 1e-9)) if way == "search" else PAPERS)
    if not 0 < count <= total:
        raise BudgetError(f"--neurons {count}: the model has {total}; give 1 to {total}")
    wanted = _fitting(decoder, wanted, uneven, note)
    probes = {name: probe_pairs(decoder, pairs) for name, pairs in wanted.shown.items()}
    validation = probe_pairs(decoder, wanted.validation)
    _check_can(decoder, probes["training"])
    _check_bias(decoder, probes["training"], validation)
    guards = guards_of(decoder, tasks)
    scores = _scores(decoder, wanted, guards, kept, options)
    checks: list[dict[str, Any]] = []
    if way == "search":
        asked = replace(
            settings or SearchSettings(),
            reduce=share,
            neurons=count,
            heads=heads,
            weight=guard_weight,
            seed=seed,
            shift=writing.has_room(decoder),
            protected=scores.protected,
        )
        search = Search(decoder, probes["training"], validation, guards, asked, options)
        found = search.run()
        checks = [check.to_dict() for check in search.checks]
    else:
        some = ranked(
            scores.neurons, count, way, scores.guard, guard_weight / 100, scores.protected
        )
        found = plain_edit(decoder, some, way, scale, wanted.train, options)
    left = _check_chance(decoder, found, validation, seed, options)
    if way == "search" and left > 1 - share + 1e-9:
        note(
            f"{1 - left:.0%} of the bias on validation pairs is gone, and not {share:.0%}: give "
            "more --neurons or --heads, or a smaller --guard-weight"
        )
    plausible = plausible_texts(decoder, wanted)
    before = measure_side(decoder, probes, plausible, tasks, options)
    report = {
        "concept": wanted.name,
        "model": base_name(decoder),
        "model_digest": decoder.digest,
        "version": __version__,
        "seed": seed,
        "suppress": way,
        "reduce": share if way == "search" else None,
        "guard_weight": guard_weight,
        "units": unit_rows(decoder, found, scores.heads, scores.neurons),
        "of": {"heads": sum(map(len, decoder.layout.heads)), "neurons": total},
        "scores": _top_scores(scores),
        "search": checks,
        "before": before.to_dict(),
        "random": random_biases(decoder, found, probes, seed + 1, options),
        "curve": _curve(decoder, found, validation, guards),
    }
    with replacing(out, overwrite) as folder:
        _write(folder, decoder, found, report)
        edited = load_decoder(folder, device=device, dtype=dtype)
        after = measure_side(edited, probes, plausible, tasks, options)
        report |= {
            "after": after.to_dict(),
            "tests": tests(probes, before, after),
            "answers": dumbbell(_all(probes), _of_all(before), _of_all(after)),
            "generation": {
                name: generated(each, wanted, seed, options)
                for name, each in (("before", decoder), ("after", edited))
            },
        }
        save_report(report, folder)
        (folder / "README.md").write_text(edit_card(report), encoding="utf-8")
        if plots.available():
            plots.draw_edit(report, folder)
        else:
            note(plots.MISSING)
    return report


def undo(
    edited: str | Path, out: str | Path = "restored", *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the model that `edited` was made from, to the byte, into `out`.

    Returns the names of the restored files. Raises EditError where `edits.json` is missing or the
    weights have changed since.
    """
    edited, out = Path(edited), Path(out)
    check_output(out, overwrite)
    record = writing.load_edits(edited)
    with replacing(out, overwrite) as folder:
        writing.restore(edited, folder, record["restore"])
        for path in sorted({path for kind in COMPANIONS for path in edited.glob(kind)}):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    restored = record["restore"]
    return {"out": str(out), "restored": sorted({*restored["files"], *restored["weights"]})}


# Before anything is measured


def _check(way: str, scale: float | None, heads: int, reduce: str) -> None:
    """Raise EditError for settings that do not go together."""
    if scale is not None and way not in ("scale", "amplify"):
        raise EditError(f"--scale {scale:g} is for --suppress scale or amplify, not {way}")
    if way != "search" and (heads or reduce != "90%"):
        what = f"--heads {heads}" if heads else f"--reduce {reduce}"
        raise EditError(f"{what} is for --suppress search, not {way}; leave out one of them")


def _share(text: str, flag: str, least: float = 1e-9) -> float:
    """Read `90%`. Raises BudgetError, naming `flag`."""
    value = text.strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not least <= share <= 1:
        raise BudgetError(f"{flag} {text!r} is not a share; give one such as 50%")
    return share


def _tasks(concept: Concept, retain: Sequence[str | Task], bundled: bool) -> list[Task]:
    """The factual side of gender, and the tasks to retain: of the bundled model all its own."""
    own: list[str | Task] = [factual_gender()] if concept.factual else []
    named = list(retain)
    if not named and bundled:
        named = ["arithmetic", *(name for name in RETAINED if name != "factual-gender")]
    return retained_tasks([*own, *named])


def _fitting(decoder: Decoder, concept: Concept, uneven: str, note: Note) -> Concept:
    """The concept with the pairs that the tokenizer suits. Raises TaskError, also if few do."""
    where = f"concept {concept.name!r}"
    splits = {
        name: even_pairs(decoder, getattr(concept, name), uneven, where)
        for name in ("train", "validation", "held_out")
    }
    views = {}
    for name, pairs in concept.views.items():
        try:
            some = even_pairs(decoder, pairs, "drop" if uneven == "refuse" else uneven, where)
        except TaskError as error:  # words that the model does not have
            note(f"{name} are left out: {error}")
            continue
        if some:
            views[name] = some
    dropped = sum(len(getattr(concept, name)) - len(pairs) for name, pairs in splits.items())
    if dropped:
        note(f"{dropped} pairs are left out, whose tokens do not stand at the same places")
    for name, pairs in splits.items():
        if len(pairs) < 2:
            raise TaskError(
                f"{where}: the tokenizer leaves {len(pairs)} {name.replace('_', '-')} pairs of "
                f"{len(getattr(concept, name))}; reword them, or take them with --uneven keep"
            )
    return replace(
        concept,
        train=splits["train"],
        validation=splits["validation"],
        held_out=splits["held_out"],
        views=views,
    )


@torch.no_grad()
def _check_can(decoder: Decoder, train: Probe) -> None:
    """Raise EditError for a model that finds the answers no likelier than any token."""
    _, levels = train.both(decoder)
    tokens = float(train.texts.weights[1].sum()) / len(train.pairs)  # of an answer
    per_token = float(levels.mean()) / tokens
    chance = -float(torch.tensor(float(decoder.unembedding.shape[0])).log())
    if per_token <= chance:
        raise EditError(
            f"the model cannot do this: its answers have {per_token:.2f} nats a token, and "
            f"{chance:.2f} would be chance; a bias among answers that it never gives means nothing"
        )


@torch.no_grad()
def _check_bias(decoder: Decoder, *probes: Probe) -> None:
    """Raise EditError where there is no bias to tell from chance."""
    pairs = [pair for each in probes for pair in each.pairs]
    gaps = torch.cat([each.gaps(decoder) for each in probes]).tolist()
    mean, p = sum(gaps) / len(gaps), paired_test(pairs, gaps)
    if p > _CHANCE or mean <= 0:
        raise EditError(
            f"the contrast is too weak: {mean:+.3f} nats over {len(gaps)} pairs, p = {p:.2f} by "
            "sign flips; an edit would remove noise"
        )


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


# After the edit is found


@torch.no_grad()
def _check_chance(
    decoder: Decoder, found: Edit, validation: Probe, seed: int, options: Options
) -> float:
    """The share of the bias that is left on validation pairs.

    Raises EditError where the edit changes nothing, or as many random units do as much.
    """
    if not found.changes:
        raise EditError("the search found no edit that lowers the bias; nothing was written")
    before = measure_bias(decoder, validation, options)
    with applied(decoder, found):
        after = measure_bias(decoder, validation, options)
    drawn = random_biases(decoder, found, {"validation": validation}, seed, options)["validation"]
    least = min(map(abs, drawn))
    if abs(after.value) >= min(least, abs(before.value)):
        raise EditError(
            f"this edit does no more than chance: bias on validation pairs {before.value:.3f} -> "
            f"{after.value:.3f} nats, with {len(drawn)} random choices of as many units "
            f"{min(drawn):.3f} to {max(drawn):.3f}; nothing was written"
        )
    return after.size / max(before.size, 1e-9)


@torch.no_grad()
def _curve(
    decoder: Decoder, found: Edit, validation: Probe, guards: Guards
) -> list[dict[str, float]]:
    """Damage against reduction on validation, of the same edit done in part."""
    before = measure_bias(decoder, validation).size
    rows = []
    for part in _PARTS:
        some = found.part(part)
        with applied(decoder, some):
            left = measure_bias(decoder, validation).size / max(before, 1e-9)
        damage = damage_of(decoder, some, guards)
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


_SHOWN = "all the paper's pairs"


def _all(probes: Mapping[str, Probe]) -> Probe:
    return probes.get(_SHOWN, next(iter(probes.values())))


def _of_all(side: Side) -> Any:
    return side.views.get(_SHOWN, next(iter(side.views.values())))


def _write(folder: Path, decoder: Decoder, found: Edit, report: Mapping[str, Any]) -> None:
    """Write the edited weights and `edits.json`, and verify them by reading back."""
    tensors = writing.EditedTensors(decoder, writing.source_tensors(decoder), found)
    record = {
        "schema": writing.SCHEMA_VERSION,
        "version": __version__,
        "concept": report["concept"],
        "model": base_name(decoder),
        "model_digest": decoder.digest,
        **found.to_dict(),
        "restore": writing.restorable(decoder, tensors),
    }
    source = Path(decoder.source)
    write_checkpoint(
        folder,
        "masked" if decoder.layout.full else "ragged",
        decoder.family,
        writing.written_config(decoder, found),
        tensors,
        decoder.layout,
        source_folder=source if source.is_dir() else None,
        provenance={
            "tool_version": __version__,
            "base_model": base_name(decoder),
            "base_digest": decoder.digest,
            "concept": report["concept"],
            "edited_units": [change.name for change in found.changes],
        },
    )
    if not source.is_dir():
        decoder.tokenizer.save_pretrained(folder)
    text = json.dumps(record, indent=1) + "\n"
    (folder / writing.EDITS).write_text(text, encoding="utf-8")
    kind = tensors[f"{decoder.family.final_norm}.weight"].dtype
    same = kind == decoder.model.dtype
    plain = decoder if same else load_decoder(source, dtype=str(kind).removeprefix("torch."))
    with applied(plain, found):
        verify(folder, plain.model, probe(plain))
