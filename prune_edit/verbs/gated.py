"""Verb `gate`: judge a model by rules, beside the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path

from prune_edit import plots
from prune_edit.checkpoint.amend import check_open, put
from prune_edit.checkpoint.store import check_output, replacing
from prune_edit.errors import GateError, OutputWriteError
from prune_edit.evaluation.comparison import environment
from prune_edit.gating.bench import Bench
from prune_edit.gating.provenance import check_base, described
from prune_edit.gating.rules import Rules, load_rules
from prune_edit.gating.verdict import Verdict, judge
from prune_edit.loading import load_decoder
from prune_edit.recovery import Note
from prune_edit.report import FILES
from prune_edit.report.card import with_section
from prune_edit.scoring import Options, Progress, silent
from prune_edit.verbs.common import base_name, check_limit, ignore

GATE_FILE, CARD = "gate.json", "README.md"


def gate(
    model: str | Path,
    rules: str | Path | Rules,
    *,
    against: str | Path | None = None,
    out: str | Path | None = None,
    other_base: bool = False,
    record: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = ignore,
) -> Verdict:
    """Measure what the rules name and hold each bound against its interval's worst side.

    `against` is the base, which relative bounds need; `out` a folder for gate.json and the reports;
    `record` puts the verdict, block or pass, into the model folder's README.md. Raises GateError
    where the rules make no sense, the base is another model or a record would break a signature,
    ModelError, OutputExistsError.
    """
    check_limit(limit)
    if out is not None:
        check_output(out, overwrite, GATE_FILE)
    if record and not Path(model).is_dir():
        raise GateError(f"--record writes into the model's folder, and {model} is none")
    if record:
        check_open(Path(model))
    wanted = rules if isinstance(rules, Rules) else load_rules(rules)
    relative = [rule.name for rule in wanted.rules if rule.relative]
    if relative and against is None:
        raise GateError(f"rule {relative[0]!r} compares with a base; give one with --against")
    seed = wanted.seed if seed is None else seed
    judged = load_decoder(model, device=device, dtype=dtype)
    decoders = [judged]
    notes: list[str] = []
    if against is not None:
        base = load_decoder(against, device=device, dtype=dtype)
        notes = check_base(judged, base, other_base)
        decoders.append(base)
    for said in notes:
        note(said)
    bench = Bench(
        tuple(decoders),
        Options(seed=seed, progress=progress),
        wanted.limit if limit is None else limit,
    )
    verdict = Verdict(
        model=described(judged, base_name(judged)),
        base=described(decoders[1], base_name(decoders[1])) if against is not None else None,
        rules=judge(wanted.rules, bench),
        source=wanted.source,
        notes=tuple(notes),
        environment=environment(judged, seed),
    )
    if out is not None:
        write_reports(verdict, Path(out), overwrite)
        if not plots.available():
            note(plots.MISSING)
    if record:
        record_verdict(verdict, Path(model))
    return verdict


def write_reports(verdict: Verdict, out: Path, overwrite: bool = False) -> None:
    """gate.json and the reports into a folder, all or nothing. Raises OutputWriteError."""
    found = verdict.to_dict()
    with replacing(out, overwrite, GATE_FILE) as folder:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (folder / GATE_FILE).write_text(text, encoding="utf-8")
        for name, report in FILES.items():
            (folder / name).write_text(report(found), encoding="utf-8")
        if plots.available():
            plots.draw_gate(found, folder)


def record_verdict(verdict: Verdict, model: Path) -> None:
    """The verdict's section into the model card, whole or not at all. Raises OutputWriteError."""
    path = model / CARD
    try:
        card = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise OutputWriteError(f"{path} could not be read: {error}") from None
    put(model, {CARD: with_section(card, verdict.to_dict())})
