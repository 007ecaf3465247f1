"""A plan's checkpoint without loading the model: what `apply` does where nothing is recovered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prune_edit import __version__
from prune_edit.checkpoint.card import model_card
from prune_edit.checkpoint.compensation import Compensation
from prune_edit.checkpoint.manifest import write_manifest
from prune_edit.checkpoint.pieces import cut
from prune_edit.checkpoint.readback import read_back
from prune_edit.checkpoint.source import Source, open_source
from prune_edit.checkpoint.stream import write_pieces
from prune_edit.checkpoint.verify import verify, verify_pieces
from prune_edit.checkpoint.write import write_companions
from prune_edit.errors import PlanError
from prune_edit.layout import Layout
from prune_edit.lineage import descent
from prune_edit.loading import load_decoder, local_folder
from prune_edit.planning import Plan
from prune_edit.recover.shrink import shrink, without_dead
from prune_edit.recovery import Note
from prune_edit.running import Progress
from prune_edit.scoring import Options
from prune_edit.verbs.common import name_of, probe

LIMIT = 2_000_000_000
"""Bytes of weights up to which all tensors and the logits are compared with the dense model's."""


def cut_plan(
    model: str | Path | None,
    plan: Plan,
    folder: Path,
    fmt: str,
    dtype: str | None,
    device: str,
    progress: Progress,
    note: Note,
    compensation: Compensation | None = None,
) -> None:
    """Write a plan's checkpoint into `folder`, tensor by tensor, and verify it likewise.

    Logits are compared as well where the dense model is small and nothing makes up for what is
    removed. Raises PlanError for a plan of another model, ModelError, VerificationError, OSError.
    """
    place, commit = local_folder(model)
    source = open_source(place, dtype)
    want = wanted(plan, source)
    before = source.config.get("prune_edit") or {}
    name = name_of(str(place) if commit is None else str(model))
    provenance = {
        "tool_version": __version__,
        **descent(before, name, commit or "", "pruned"),  # of a folder: known once it was read
        "task": plan.task,
        "method": plan.method,
        "recover": "none" if compensation is None else "mean",
        "format": fmt,
        "plan_digest": plan.digest,
    }
    if commit is not None:
        check_model(plan, commit, model)
    fields, pieces = cut(
        source,
        want,
        fmt,
        provenance,
        compensation,
        kv="duplicate" if plan.kv == "duplicate" else None,
    )
    written = write_pieces(folder, source, pieces, progress=progress)
    if commit is None:
        check_model(plan, written.digest, model)
        known = descent(before, name, written.digest, "pruned")
        provenance |= known
        fields["prune_edit"] |= known
    write_companions(folder, fmt, source.family, fields, place)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(model_card(None, plan, provenance), encoding="utf-8")
    large = source.bytes > LIMIT
    with ThreadPoolExecutor(1) as pool:  # one waits for the disk, the other for the processor
        reading = pool.submit(read_back, folder, written, progress)
        verify_pieces(folder, source, pieces, sample=large)
        entries = reading.result()
    if large:
        note(
            f"{source.bytes / 1e9:.1f} GB of weights: every byte was read back, but only rows of "
            "each tensor were compared with the dense model's, and no logits; `prune-edit verify "
            "--against` compares all"
        )
    elif compensation is None:
        _compare_logits(folder, place, plan, source, device)
    write_manifest(folder, entries)


def wanted(plan: Plan, source: Source) -> Layout:
    """What the plan keeps of a source. Raises PlanError where it is another model's."""
    asked = source.alive
    want = Layout(plan.n_heads, asked.n_kv_heads, plan.n_neurons, plan.heads, plan.neurons)
    want.check_within(source.alive)
    return want


def check_model(plan: Plan, digest: str, model: object) -> None:
    """Raise PlanError for a plan of another model."""
    if plan.model_digest and plan.model_digest != digest:
        raise PlanError(
            f"the plan is for another model than {model}; give the one that was scored with --model"
        )


def _compare_logits(folder: Path, place: Path, plan: Plan, source: Source, device: str) -> None:
    """Compare with the model that is cut in memory."""
    names: dict[str, Any] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    kind = source.kind(f"{source.family.final_norm}.weight")
    decoder = without_dead(load_decoder(place, device=device, dtype=names.get(kind, "float32")))
    small = shrink(decoder, plan.heads, plan.neurons, None, Options())
    verify(folder, small.model, probe(small))
