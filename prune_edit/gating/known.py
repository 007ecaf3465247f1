"""The figures a rule may name: their units, what is ideal, what they are of."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from prune_edit.errors import GateError
from prune_edit.tasks.datasets import DATA_SETS, is_data_set

FACTUAL_TASK = "factual-gender"
LM_EVAL = "lm-eval"


@dataclass(frozen=True)
class Kind:
    """What is known of a figure before it is measured.

    `unit` is share, nats, perplexity, count, bytes, tokens/s, correlation or score. `source` says
    which code measures it; `of` what it needs to be of, in words, empty where nothing.
    """

    unit: str
    source: str
    ideal: float | None = None
    of: str = ""
    grouped: bool = False
    higher: bool | None = None  # whether more is better


PLAIN: dict[str, Kind] = {
    "accuracy": Kind("share", "task", of="a task", grouped=True, higher=True),
    "factual": Kind("share", "task", of="", grouped=True, higher=True),
    "bias": Kind("nats", "concept", 0.0, "a concept", grouped=True),
    "perplexity": Kind("perplexity", "perplexity", higher=False),
    "parameters": Kind("count", "cost", higher=False),
    "bytes": Kind("bytes", "cost", higher=False),
    "flops": Kind("count", "cost", higher=False),
    "prefill": Kind("tokens/s", "speed", higher=True),
    "decode": Kind("tokens/s", "speed", higher=True),
}


def kind_of(figure: str, of: str, where: str) -> Kind:
    """The Kind of a rule's figure. Raises GateError for one that is unknown, naming the nearest."""
    if of.partition(":")[0] == LM_EVAL and figure not in PLAIN:
        return Kind("score", "lm-eval", of="a task of lm-eval")
    published = _published(of) if is_data_set(of) else {}
    if figure in published:
        return published[figure]
    if figure not in PLAIN:
        known = [*published, *PLAIN] if is_data_set(of) else [*PLAIN, *_all_published()]
        near = difflib.get_close_matches(figure, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        if figure in known:
            hint = f'it is a data set\'s: give of = "{_home(figure)}:PATH"'
        raise GateError(f"{where}: unknown figure {figure!r}; {hint}")
    kind = PLAIN[figure]
    if kind.of and not of:
        raise GateError(f'{where}: {figure} is of {kind.of}; give of = "..."')
    if kind.source in ("cost",) and of:
        raise GateError(f"{where}: {figure} is the model's own; leave out of")
    return kind


def _published(of: str) -> dict[str, Kind]:
    from prune_edit.evaluation.published import FIGURES

    return {
        name: Kind(each.unit, "data set", each.ideal, grouped=True,
                   higher=True if each.ideal is None else None)
        for name, each in FIGURES.get(of.partition(":")[0], {}).items()
    }  # fmt: skip


def _all_published() -> list[str]:
    return list(dict.fromkeys(name for data in DATA_SETS for name in _published(data)))


def _home(figure: str) -> str:
    return next(data for data in DATA_SETS if figure in _published(data))
