"""What stands beside a checkpoint and is about it: verdicts, sweeps, explanations, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_edit.checkpoint.manifest import sha256
from prune_edit.checkpoint.safety import inside, read_json
from prune_edit.errors import GateError, PruneEditError
from prune_edit.planning import Plan
from prune_edit.report.markdown import markdown

GATE, FRONTIER = "gate.json", "frontier.json"
MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
_LIMIT = 4_000_000  # bytes of a picture
_MOST = 12  # pictures of a folder
_NEIGHBOURS = 200  # folders looked into


def gates_beside(
    folder: Path, digest: str, gate: Path | None, images: dict[str, Path]
) -> list[dict[str, Any]]:
    """Verdicts on the weights of this `digest`; the given one alone where there is one.

    Raises GateError where that is no verdict, or one on other weights.
    """
    if gate is not None:
        path = gate / GATE if gate.is_dir() else gate
        found = _verdict(path)
        if found is None:
            raise GateError(f"{path} is no gate.json of this version; give one with --gate")
        if found["model"]["digest"] != digest:
            raise GateError(
                f"{path} judged {found['model']['name']} ({found['model']['digest'][:12]}), not "
                f"{folder} ({digest[:12]}); run the gate again"
            )
        return [_named(path, found, images)]
    verdicts = ((path, _verdict(path)) for path in _candidates(folder, GATE))
    return [
        _named(path, found, images)
        for path, found in verdicts
        if found is not None and digest and found["model"]["digest"] == digest
    ]


def _named(path: Path, found: dict[str, Any], images: dict[str, Path]) -> dict[str, Any]:
    return {
        "folder": path.resolve().parent.name,
        **found,
        "pictures": pictures(path.parent, images),
    }


def _verdict(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(inside(path.parent, path.name))
        markdown(found)  # whatever a page shows of it is there
        return {**found, "model": {"digest": "", **found["model"]}}
    except (PruneEditError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def frontiers_beside(
    folder: Path, base_digest: str, images: dict[str, Path]
) -> list[dict[str, Any]]:
    """Sweeps of the base model, each point with its plan's digest."""
    found = []
    for path in _candidates(folder, FRONTIER) if base_digest else ():
        try:
            content = read_json(inside(path.parent, path.name))
            points = []
            for point in content["points"]:
                plan = Plan.load(inside(path.parent, str(point["plan"])))
                if plan.model_digest != base_digest:
                    raise KeyError("model_digest")
                shown = {key: point[key] for key in ("heads", "neurons", "accuracy", "parameters")}
                points.append(
                    {**{key: shown[key] + 0 for key in shown}, "plan_digest": plan.digest}
                )
            about = {key: str(content[key]) for key in ("task", "method", "recover")}
        except (PruneEditError, OSError, KeyError, TypeError, AttributeError):
            continue
        name = path.resolve().parent.name
        found.append(
            {"folder": name, **about, "points": points, "pictures": pictures(path.parent, images)}
        )
    return found


def explanations_beside(folder: Path, digest: str) -> list[dict[str, Any]]:
    """Explanations of the weights of this `digest`, in the folder and beside it: of what."""
    home = folder.resolve()
    found = []
    for path in sorted({*home.glob("*.json"), *home.parent.glob("*.json")}) if digest else ():
        try:
            if path.stat().st_size > _LIMIT:
                continue
            content = read_json(inside(path.parent, path.name))
            if content["about"]["model_digest"] != digest:
                continue
            asked = content.get("question")
            found.append(
                {
                    "file": path.name,
                    "kind": str(content["kind"]),
                    "of": str(asked["prompt"] if asked else content["task"]),
                    "answer": str(asked["answer"]) if asked else None,
                    "probability": asked["probability"] + 0.0 if asked else None,
                }
            )
        except (PruneEditError, OSError, KeyError, TypeError, AttributeError):
            continue
    return found


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    """Files of this name in the folder, in its folders, and in those beside it."""
    home = folder.resolve()
    try:
        around = [home, *_folders(home), *(path for path in _folders(home.parent) if path != home)]
    except OSError:
        around = [home]
    for place in around[:_NEIGHBOURS]:
        if (place / name).is_file():
            yield place / name


def _folders(path: Path) -> list[Path]:
    return sorted(
        each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")
    )


def pictures(folder: Path, images: dict[str, Path]) -> list[dict[str, Any]]:
    """PNG and SVG files of a folder, the SVG where there are both; none that is huge or a link.

    Puts where they are into `images`, by digest.
    """
    found: dict[str, Path] = {}
    for suffix in MEDIA:
        for path in sorted(folder.glob(f"*{suffix}")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= _LIMIT:
                found.setdefault(path.stem, path)
    rows = []
    for _, path in sorted(found.items())[:_MOST]:
        size, digest = sha256(path)
        rows.append({"name": path.name, "bytes": size, "sha256": digest})
        images[digest] = path
    return rows
