"""Cells of a page: numbers as JSON has them, tables, legends, tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from prune_edit.report.svg import rounded

Found = Mapping[str, Any]


def number(value: float | int | None, show: Callable[[Any], str]) -> str:
    """A number of the JSON, as it is in the markup and rounded for the eye."""
    return "-" if value is None else f'<data value="{value!r}">{escape(show(value))}</data>'


def count(value: int) -> str:
    """A whole number."""
    return f"{value:,}"


def short(value: float) -> str:
    """A number without a unit."""
    return rounded(value, 3)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells, which scrolls by itself where it is too wide."""
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def key(**kinds: str) -> str:
    """A legend: class to words."""
    parts = (f'<span><i class="{kind}"></i>{escape(said)}</span>' for kind, said in kinds.items())
    return f'<p class="key">{"".join(parts)}</p>'


def tokens(pairs: Sequence[Sequence[Any]], most: int = 6) -> str:
    """Tokens, likeliest first."""
    words = " ".join(f"<q>{escape(str(word).strip() or '␣')}</q>" for word, _ in pairs[:most])
    return f'<div class="words">{words}</div>'
