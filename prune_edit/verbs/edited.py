"""Verb `edit`: suppress a concept's neurons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_edit import __version__
from prune_edit.checkpoint.locking import claims_output
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.checkpoint.verify import verify
from prune_edit.checkpoint.write import write_checkpoint
from prune_edit.editing.concept import load_concept
from prune_edit.editing.find import concept_scores
from prune_edit.editing.report import edit_card, measure_side, random_biases, top_neurons
from prune_edit.editing.report import save as save_edit
from prune_edit.editing.suppress import scale_neurons
from prune_edit.errors import BudgetError
from prune_edit.loading import load_decoder
from prune_edit.planning import keep_top
from prune_edit.recovery import Note
from prune_edit.scoring import (
    Options,
    Progress,
    silent,
)
from prune_edit.tasks import Task
from prune_edit.tasks.gender import factual_gender
from prune_edit.verbs.common import (
    base_name,
    ignore,
    probe,
    retained_tasks,
)


@claims_output
def edit(
    model: str | Path | None = None,
    *,
    concept: str = "gender",
    neurons: int = 18,
    scale: float = 0.0,
    out: str | Path = "edited",
    retain: Sequence[str | Task] = (),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = ignore,
) -> dict[str, Any]:
    """Scale the neurons that carry a concept, write the checkpoint, show what that did.

    Neurons are found on the concept's training pairs only (CNA input against input). Returns what
    `edit.json` holds: bias in nats before and after on training and held-out pairs, factual
    gender, retained tasks and perplexity beside it, and ten random choices of as many neurons.
    Raises TaskError, BudgetError for more neurons than there are.
    """
    out = Path(out)
    check_output(out, overwrite)
    wanted = load_concept(concept)
    tasks = retained_tasks([factual_gender(), *retain])
    decoder = load_decoder(model, device=device, dtype=dtype)
    options = Options(seed=seed, progress=progress)
    total = sum(map(len, decoder.layout.neurons))
    if not 0 < neurons <= total:
        raise BudgetError(f"--neurons {neurons}: the model has {total}; give 1 to {total}")
    scores = concept_scores(decoder, wanted.train, options)
    chosen = keep_top(scores, neurons)
    edited = scale_neurons(decoder, chosen, scale)
    before, after = (measure_side(side, wanted, tasks, options) for side in (decoder, edited))
    chance = random_biases(decoder, wanted, neurons, scale, seed, options)
    report = {
        "concept": wanted.name,
        "model": base_name(decoder),
        "model_digest": decoder.digest,
        "version": __version__,
        "seed": seed,
        "scale": scale,
        "neurons": top_neurons(scores, chosen),
        "of_neurons": total,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "random": {
            "train": [value for value, _ in chance],
            "held_out": [value for _, value in chance],
        },
    }
    if abs(after.train.value) >= min(abs(value) for value, _ in chance):
        note("a random choice of as many neurons lowers the bias as much: this edit proves nothing")
    format = "masked" if decoder.layout.full else "ragged"
    with replacing(out, overwrite) as folder:
        source = Path(decoder.source)
        write_checkpoint(
            folder,
            format,
            edited.family,
            edited.model.config.to_dict(),
            {name: tensor.cpu() for name, tensor in edited.model.state_dict().items()},
            edited.layout,
            source_folder=source if source.is_dir() else None,
            provenance={
                "tool_version": __version__,
                "base_model": base_name(decoder),
                "base_digest": decoder.digest,
                "concept": wanted.name,
                "edited_neurons": [list(units) for units in chosen],
                "scale": scale,
            },
        )
        if not source.is_dir():
            decoder.tokenizer.save_pretrained(folder)
        save_edit(report, folder)
        (folder / "README.md").write_text(edit_card(report), encoding="utf-8")
        verify(folder, edited.model, probe(edited))
    return report
