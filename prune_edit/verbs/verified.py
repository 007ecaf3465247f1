"""Verb `verify`: whether a checkpoint folder is what it claims to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prune_edit.checkpoint import manifest
from prune_edit.checkpoint.pieces import cut
from prune_edit.checkpoint.reading import model_digest, read_config
from prune_edit.checkpoint.signing import check_signature, sign
from prune_edit.checkpoint.source import open_source
from prune_edit.checkpoint.verify import check_shapes, verify_pieces
from prune_edit.errors import ModelError, PlanError, PruneEditError, VerificationError
from prune_edit.layout import Layout
from prune_edit.lineage import ancestors
from prune_edit.loading import local_folder
from prune_edit.planning import Plan
from prune_edit.running import Progress, silent
from prune_edit.verbs.cut import wanted


def verify(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    public_key: str | Path | None = None,
    sign_with: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check a folder against its manifest, its configuration, its plan and, if given, its base.

    Returns `ok`, `checks` (each with `name`, `ok` and what was `said`) and the `provenance` that it
    claims. With the base model of a checkpoint that nothing was recovered in, every tensor is
    compared with its slice. `sign_with` signs it where all checks hold. Raises ModelError where
    there is no folder or no manifest to check.
    """
    folder = Path(folder)
    config = read_config(folder)
    claimed = manifest.read_manifest(folder)
    checks = [
        _check("digests", lambda: _digests(folder, claimed)),
        _check("provenance", lambda: _provenance(folder, claimed)),
        _check("shapes", lambda: check_shapes(folder)),
        _check("plan", lambda: _plan(folder, config)),
    ]
    if against is not None:
        checks += _base(folder, config, claimed, against, progress)
    if public_key is not None:
        checks.append(_check("signature", lambda: check_signature(folder, Path(public_key))))
    ok = all(check["ok"] for check in checks)
    if sign_with is not None and ok:
        sign(folder, Path(sign_with))
        checks.append({"name": "signed", "ok": True, "said": ""})
    return {"ok": ok, "checks": checks, "provenance": claimed["provenance"]}


def _check(name: str, work: Callable[[], object]) -> dict[str, Any]:
    try:
        said = work()
    except PruneEditError as error:
        return {"name": name, "ok": False, "said": str(error)}
    return {"name": name, "ok": True, "said": said if isinstance(said, str) else ""}


def _digests(folder: Path, claimed: dict[str, Any]) -> str:
    if wrong := list(manifest.differences(folder, claimed)):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise VerificationError(wrong[0] + more)
    return f"{len(claimed['files'])} files"


def _provenance(folder: Path, claimed: dict[str, Any]) -> None:
    if claimed["provenance"] != manifest.provenance_of(folder):
        raise VerificationError("the manifest and config.json name other origins")


def _plan(folder: Path, config: dict[str, Any]) -> str:
    block = config.get("prune_edit")
    if not isinstance(block, dict):
        raise VerificationError("config.json has no prune_edit block: it names no plan")
    if not (folder / "plan.json").is_file():
        if "plan_digest" in block:
            raise VerificationError("plan.json is missing, and config.json has its digest")
        return "no plan: edited, not pruned"
    plan = Plan.load(folder / "plan.json")
    if plan.digest != block.get("plan_digest"):
        raise VerificationError("plan.json is not the plan that config.json has the digest of")
    if plan.model_digest and plan.model_digest not in _made_from(block):
        raise VerificationError("plan.json is of another base model than config.json")
    kept = {"heads": plan.heads, "neurons": plan.neurons}
    for name, units in kept.items():
        if [list(each) for each in units] != block.get(name):
            raise VerificationError(f"config.json keeps other {name} than plan.json")
    try:
        layout = Layout.of_config(config)
    except (ModelError, PlanError) as error:
        raise VerificationError(str(error)) from None
    sizes = (layout.n_heads, layout.n_neurons, layout.n_layers)
    if sizes != (plan.n_heads, plan.n_neurons, plan.n_layers):
        raise VerificationError("plan.json is of a model of another size")
    return f"{plan.kept_heads} heads, {plan.kept_neurons} neurons"


def _made_from(block: dict[str, Any]) -> list[str]:
    """Digests of the models whose plan it may hold: an edit leaves its parent's plan."""
    if block.get("act", "pruned") == "pruned":
        return [str(block.get("base_digest"))]
    return [each["digest"] for each in ancestors(block)]


def _base(
    folder: Path,
    config: dict[str, Any],
    claimed: dict[str, Any],
    against: str | Path,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    block = config.get("prune_edit") or {}
    place, commit = local_folder(against)

    digest = commit or model_digest(place)

    def base() -> None:
        earlier = {each["digest"] for each in ancestors(block)[:-1]}
        if digest not in {claimed["provenance"].get("base_digest"), *earlier}:
            raise VerificationError(f"{against} is not the base model that it claims")

    yield _check("base", base)
    pruned = block.get("act", "pruned") == "pruned" and digest == block.get("base_digest")
    if not pruned or block.get("recover") != "none" or not (folder / "plan.json").is_file():
        return

    def slices() -> str:
        kind = str(config.get("dtype") or "float32")
        source = open_source(place, kind)
        plan = Plan.load(folder / "plan.json")
        _, pieces = cut(source, wanted(plan, source), str(block.get("format")), {})
        verify_pieces(folder, source, pieces, progress)
        return f"{len(pieces)} tensors are the base model's slices"

    yield _check("slices", slices)
