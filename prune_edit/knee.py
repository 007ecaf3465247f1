"""The knee: where a shrinking model begins to lose more than it gains, without a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.evaluation.cost import count_parameters
from prune_edit.frontier import knee_of, walk
from prune_edit.planning import Budget
from prune_edit.recovery import Recovery

BUDGETS = ("75%", "50%", "25%", "10%", "5%")  # of the heads
_BRIEF = 150  # steps of tuning with which a point shows what it is worth


@dataclass(frozen=True)
class Step:
    """A model on the way down: its heads, parameters and percent right on validation."""

    heads: int
    parameters: int
    accuracy: float


def find_knee(recovery: Recovery) -> tuple[int, dict[str, Any]]:
    """How many heads the knee has, and what was measured to find it, as JSON; says so in a note.

    Every point is recovered as asked, tuned briefly where it is tuned.
    """
    recovery.strongest()
    full = recovery.in_rounds().schedule
    brief = min(_BRIEF, full.final_tuning.steps)
    search = replace(
        recovery,
        schedule=replace(full, final_tuning=replace(full.final_tuning, steps=brief)),
        workspace=recovery.workspace.within("knee"),
        tuning=replace(recovery.tuning, steps=None),  # the schedule has it
    )
    total = sum(map(len, recovery.dense.layout.heads))
    neurons = sum(map(len, recovery.dense.layout.neurons))
    asked = [Budget.parse(text, "knee").of(total, "knee") for text in BUDGETS]
    counts = sorted({max(recovery.rules.fewest_heads, count) for count in asked}, reverse=True)
    steps = [_step(recovery, recovery.dense)]
    steps += [_step(recovery, small) for _, _, small in walk(search, counts, [neurons])]
    knee = steps[knee_of([(step.parameters, step.accuracy) for step in steps])]
    recovery.note(_said(steps, knee, total))
    return knee.heads, {"knee": knee.heads, "steps": [asdict(step) for step in steps]}


def _step(recovery: Recovery, decoder: Decoder) -> Step:
    heads = sum(map(len, decoder.layout.heads))
    return Step(heads, count_parameters(decoder), recovery.accuracy(decoder))


def _said(steps: Sequence[Step], knee: Step, total: int) -> str:
    """The points in one line, and which is the knee."""
    points = ", ".join(f"{step.heads}: {step.accuracy:.1f} %" for step in steps)
    return (
        f"no budget given, so the knee is taken: {knee.heads} of {total} heads (on validation, "
        f"before the last recovery: {points})"
    )
