"""Verb `edit`: lower a concept's bias, leave the rest alone, and show both; `undo` takes it off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_edit import __version__, plots
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import COMPANIONS, write_checkpoint
from prune_edit.decoder import Decoder
from prune_edit.editing import restoring, writing
from prune_edit.editing.asked import USUAL, Asked
from prune_edit.editing.card import edit_card
from prune_edit.editing.concept import Concept, load_concept
from prune_edit.editing.edit import Edit, applied
from prune_edit.editing.generation import generated
from prune_edit.editing.measure import measure_side, plausible_texts
from prune_edit.editing.probe import UNEVEN, Probe
from prune_edit.editing.report import all_of, dumbbell, save, tests
from prune_edit.editing.run import Found, find_edit
from prune_edit.editing.search import SearchSettings
from prune_edit.editing.suppress import WAYS
from prune_edit.lineage import block_of, descent
from prune_edit.loading import load_decoder
from prune_edit.recovery import Note
from prune_edit.scoring import Options, Progress, silent
from prune_edit.tasks import RETAINED, Task
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.common import base_name, check_known, ignore, probe, retained_tasks

EDIT_TOKENS = 16384
"""Of prompts, at once."""

PLAN = "plan.json"


@claims_output
def edit(
    model: str | Path | None = None,
    *,
    concept: str = "gender",
    reduce: str = USUAL,
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
    asked = Asked(
        concept, reduce, suppress, neurons, heads, scale, guard_weight, protect, uneven, settings
    )
    check_asked(asked)
    check_output(out, overwrite)
    wanted = load_concept(concept)
    tasks = guarded(wanted, retain, model is None)
    decoder = load_decoder(model, device=device, dtype=dtype)
    options = Options(seed=seed, progress=progress, batch_tokens=EDIT_TOKENS)
    found = find_edit(decoder, asked, wanted, tasks, options, note)
    with replacing(out, overwrite) as folder:
        return write_edited(folder, decoder, found, tasks, options, note)


def check_asked(asked: Asked) -> None:
    """Raise PruneEditError's branches for settings that are unknown or do not go together."""
    check_known("way to suppress", asked.way, WAYS)
    check_known("rule for uneven pairs", asked.uneven, UNEVEN)
    asked.check()


def guarded(concept: Concept, retain: Sequence[str | Task], bundled: bool) -> list[Task]:
    """The factual side of gender, and the tasks to retain: of the bundled model all its own."""
    named = list(retain)
    if not named and bundled:
        named = ["arithmetic", *RETAINED]
    factual = factual_gender()
    if concept.factual and not any(
        (each.name if isinstance(each, Task) else each) == factual.name for each in named
    ):
        named.insert(0, factual)
    return retained_tasks(named)


def write_edited(
    folder: Path,
    decoder: Decoder,
    found: Found,
    tasks: Sequence[Task],
    options: Options,
    note: Note = ignore,
) -> dict[str, Any]:
    """Write the edited model into `folder`, which exists, and measure it beside this one.

    Returns what `edit.json` holds. Raises EditError, VerificationError, OSError.
    """
    _write(folder, decoder, found.edit, found.concept.name)
    dtype = str(decoder.model.dtype).removeprefix("torch.")
    edited = load_decoder(folder, device=str(decoder.device), dtype=dtype)
    report = {
        "concept": found.concept.name,
        "model": base_name(decoder),
        "model_digest": decoder.digest,
        "version": __version__,
        "seed": options.seed,
        **found.report,
        **sides_report((decoder, edited), found.concept, found.probes, tasks, options),
    }
    (folder / "README.md").write_text(edit_card(report), encoding="utf-8")
    save_report(report, folder, note)
    return report


def sides_report(
    decoders: tuple[Decoder, Decoder],
    concept: Concept,
    probes: Mapping[str, Probe],
    tasks: Sequence[Task],
    options: Options,
) -> dict[str, Any]:
    """What `edit.json` holds of a model before and after, measured alike."""
    plausible = plausible_texts(decoders[0], concept)
    before, after = (measure_side(each, probes, plausible, tasks, options) for each in decoders)
    return {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "tests": tests(probes, before, after),
        "answers": dumbbell(all_of(probes), all_of(before.views), all_of(after.views)),
        "generation": {
            name: generated(each, concept, options.seed, options)
            for name, each in zip(("before", "after"), decoders, strict=True)
        },
    }


def save_report(report: Mapping[str, Any], folder: Path, note: Note = ignore) -> None:
    """Write `edit.json` and, where they can be drawn, its pictures."""
    save(report, folder)
    if plots.available():
        plots.draw_edit(report, folder)
    else:
        note(plots.MISSING)


def undo(
    edited: str | Path, out: str | Path = "restored", *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the model that `edited` was made from, to the byte, into `out`.

    Returns the names of the restored files. Raises EditError where `edits.json` is missing or the
    weights have changed since.
    """
    edited, out = Path(edited), Path(out)
    check_output(out, overwrite)
    record = restoring.load_edits(edited)
    with replacing(out, overwrite) as folder:
        restoring.restore(edited, folder, record["restore"])
        _accompany(edited, folder, (*COMPANIONS, PLAN))
    restored = record["restore"]
    return {"out": str(out), "restored": sorted({*restored["files"], *restored["weights"]})}


def _accompany(source: Path, folder: Path, kinds: Sequence[str]) -> None:
    for path in sorted({path for kind in kinds for path in source.glob(kind)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _write(folder: Path, decoder: Decoder, found: Edit, concept: str) -> None:
    """Write the edited weights and `edits.json`, and verify them by reading back."""
    tensors = writing.EditedTensors(decoder, writing.source_tensors(decoder), found)
    record = {
        "schema": restoring.SCHEMA_VERSION,
        "version": __version__,
        "concept": concept,
        "model": base_name(decoder),
        "model_digest": decoder.digest,
        **found.to_dict(),
        "restore": restoring.restorable(decoder, tensors),
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
            **descent(block_of(decoder), base_name(decoder), decoder.digest, "edited"),
            "concept": concept,
            "edited_units": [change.name for change in found.changes],
        },
    )
    if source.is_dir():
        _accompany(source, folder, (PLAN,))
    else:
        decoder.tokenizer.save_pretrained(folder)
    text = json.dumps(record, indent=1) + "\n"
    (folder / restoring.EDITS).write_text(text, encoding="utf-8")
    kind = tensors[f"{decoder.family.final_norm}.weight"].dtype
    same = kind == decoder.model.dtype
    plain = decoder if same else load_decoder(source, dtype=str(kind).removeprefix("torch."))
    with applied(plain, found):
        verify(folder, plain.model, probe(plain))
