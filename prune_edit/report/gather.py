"""Everything known of a checkpoint folder, as one JSON value; nothing is measured, no model loaded.

Any folder with a config.json: pruned in any format, edited, or a model from elsewhere. A file that
is damaged, or not ours, is left out with a note that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prune_edit.checkpoint import manifest
from prune_edit.checkpoint.reading import model_digest, read_config, read_headers, weight_files
from prune_edit.checkpoint.safety import inside, read_json
from prune_edit.editing.card import edit_section
from prune_edit.errors import ModelError, PruneEditError
from prune_edit.layout import Layout, hidden_size
from prune_edit.planning import Plan
from prune_edit.report.beside import explanations_beside, frontiers_beside, gates_beside, pictures
from prune_edit.report.measures import compared

T = TypeVar("T")
SCHEMA = 1
PAGE, CARD = "report.html", "README.md"
_UNITS = ("heads", "neurons")  # of the prune_edit block; the plan's section has them


def gather(folder: Path, gate: Path | None = None) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the folder's files say, in the order of the page; and where its pictures are, by digest.

    `gate` is a gate.json or the folder that holds one; without it those in the folder and beside
    it are taken that judged these very weights. Raises ModelError for a folder that is no model's
    or a `gate` that is no verdict of this model's.
    """
    config = read_config(folder)
    notes: list[str] = []
    images: dict[str, Path] = {}
    block = config.get("prune_edit")
    block = block if isinstance(block, dict) else {}
    digest = _noted(notes, "weights", lambda: model_digest(folder))
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "name": folder.resolve().name,
        "kind": "",
        "model": {**_model(config), **(_noted(notes, "weights", lambda: _sizes(folder)) or {}),
                  "digest": digest},
        "provenance": {key: value for key, value in block.items() if key not in _UNITS},
        "plan": _noted(notes, "plan", lambda: _plan(folder, config)),
        "evaluation": _read(notes, folder, "evaluation.json", lambda each: list(compared(each))),
        "edit": _read(notes, folder, "edit.json", _shown),
        "gates": gates_beside(folder, digest or "", gate, images),
        "frontiers": frontiers_beside(folder, str(block.get("base_digest") or ""), images),
        "explanations": explanations_beside(folder, digest or ""),
        "pictures": pictures(folder, images),
        "manifest": _noted(notes, "manifest.json", lambda: _manifest(folder)),
        "notes": notes,
    }  # fmt: skip
    found["kind"] = _kind(found)
    notes += _lacking(found)
    return found, images


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the architecture."""
    known = ("model_type", "architectures", "num_hidden_layers", "vocab_size", "dtype")
    fields = {key: config[key] for key in known if config.get(key) is not None}
    fields.setdefault("num_hidden_layers", config.get("n_layer"))
    try:
        fields["hidden_size"] = hidden_size(config)
    except (KeyError, TypeError, ValueError):
        fields["hidden_size"] = None
    return fields


def _sizes(folder: Path) -> dict[str, Any]:
    """Parameters and bytes from the headers alone; only bytes of pickled weights."""
    files = weight_files(folder)
    sizes = {"bytes": sum(path.stat().st_size for path in files), "weight_files": len(files)}
    if any(path.suffix != ".safetensors" for path in files):
        return sizes
    tensors = read_headers(folder).values()
    return {"parameters": sum(math.prod(tensor.shape) for tensor in tensors), **sizes}


def _plan(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kept units a layer: the plan's, else the configuration's; None for a whole model."""
    if (folder / "plan.json").is_file():
        plan = Plan.load(inside(folder, "plan.json"))
        names = ("method", "task", "seed", "kv", "align", "budget", "serve", "model_digest")
        about = {name: getattr(plan, name) for name in names} | {"digest": plan.digest}
        heads, neurons, width = plan.heads, plan.neurons, (plan.n_heads, plan.n_neurons)
    elif config.get("prune_edit") or str(config.get("model_type")).startswith("pruned_"):
        layout = Layout.of_config(config)
        if layout.full:
            return None
        about = {}
        heads, neurons, width = layout.heads, layout.neurons, (layout.n_heads, layout.n_neurons)
    else:
        return None
    return {
        **about,
        "n_heads": width[0],
        "n_neurons": width[1],
        "kept_heads": sum(map(len, heads)),
        "of_heads": width[0] * len(heads),
        "kept_neurons": sum(map(len, neurons)),
        "of_neurons": width[1] * len(neurons),
        "layers": [
            {"heads": list(some), "neurons": len(others)}
            for some, others in zip(heads, neurons, strict=True)
        ],
    }


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Whether the files are as the manifest says; the report itself does not count."""
    if not (folder / manifest.NAME).exists():
        return None
    claimed = manifest.read_manifest(folder)
    wrong = [said for said in manifest.differences(folder, claimed) if not said.startswith(PAGE)]
    return {
        "files": sorted(name for name in claimed["files"] if name != PAGE),
        "ok": not wrong,
        "differences": wrong,
        "signed": (folder / manifest.SIGNATURE).is_file(),
    }


def _read(
    notes: list[str], folder: Path, name: str, show: Callable[[Any], object]
) -> dict[str, Any] | None:
    """A JSON file's content where `show` can make sense of it; None where it is not there."""
    if not (folder / name).exists():
        return None

    def read() -> dict[str, Any]:
        value = read_json(inside(folder, name))
        try:
            show(value)
            json.dumps(value, allow_nan=False)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ModelError(f"it is none of this version's ({error!r:.100})") from None
        return dict(value)

    return _noted(notes, name, read)


def _shown(report: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError where a page could not show an edit's report."""
    edit_section(report)
    for row in report["answers"]:
        row["before"] + row["after"] + 0.0, row["answer"].split(), row["group"].split()


def _noted(notes: list[str], name: str, work: Callable[[], T]) -> T | None:
    """What `work` finds, or a note of why it found nothing."""
    try:
        return work()
    except (PruneEditError, OSError) as error:
        said = f"{name}: {' '.join(str(error).split())}"
        if said not in notes:
            notes.append(said)
        return None


def _kind(found: Mapping[str, Any]) -> str:
    pruned, edited = found["plan"] is not None, bool(
        found["edit"] or found["provenance"].get("edited_units")
    )  # fmt: skip
    if pruned and edited:
        return "pruned and edited"
    return "pruned" if pruned else "edited" if edited else "model"


def _lacking(found: Mapping[str, Any]) -> Iterator[str]:
    """What a reader might look for in vain, and the command that brings it."""
    if found["kind"] == "model":
        yield "nothing in the folder says that prune-edit wrote it: this is all that it tells"
        return
    if found["evaluation"] is None and "pruned" in found["kind"]:
        yield "no evaluation.json: prune-edit eval DIR --against BASE --out DIR/evaluation.json"
    if found["edit"] is None and "edited" in found["kind"]:
        yield "no edit.json: what the edit did is not told"
    if not found["gates"]:
        yield "no verdict of these weights: prune-edit gate DIR --rules gate.toml --out DIR-gate"
