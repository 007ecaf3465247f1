"""Found: a table as measured here, the paper's beside it, and whether both agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from published import PUBLISHED, Rows, as_json, judged


@dataclass(frozen=True)
class Found:
    """One table: rows of named numbers, and what a reader should know of them."""

    table: str
    title: str
    rows: Rows
    unit: str = "%"
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def verdict(self, model: str) -> list[dict[str, Any]] | None:
        """Every number of the paper beside ours, where the model is the paper's."""
        if judged(self.table, model) is None:
            return None
        published = PUBLISHED[self.table]
        return [
            {
                "row": row, "column": column, "paper": value, "ours": ours,
                "near": published.tolerance(row) if value is not None else None,
                "ok": column in self.rows.get(row, {}) if value is None
                else ours is not None and abs(ours - value) <= published.tolerance(row),
            }
            for row, cells in published.rows.items()
            for column, value in cells.items()
            for ours in (self.rows.get(row, {}).get(column),)
        ]  # fmt: skip

    def to_dict(self, model: str) -> dict[str, Any]:
        return {
            "table": self.table,
            "title": self.title,
            "unit": self.unit,
            "rows": self.rows,
            "paper": as_json(self.table),
            "judged": self.verdict(model),
            "notes": list(self.notes),
            **self.extra,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Found:
        """What a table's JSON says."""
        some = {key: fields[key] for key in ("table", "title", "rows", "unit")}
        return cls(**some, notes=tuple(fields["notes"]))

    def markdown(self, model: str) -> str:
        """Ours and the paper's, in one table where the columns are the same, else in two."""
        published = PUBLISHED[self.table]
        lines = [f"### {label(self.table)}: {self.title}", ""]
        ours, theirs = _columns(self.rows), _columns(published.rows)
        if set(theirs) <= set(ours):
            lines += _head(f"{self.unit}", ours)
            for row, cells in self.rows.items():
                lines.append(_line(row, cells, ours))
                if row in published.rows:
                    lines.append(_line(f"*{published.model}*", published.rows[row], ours))
        else:
            lines += _listed("here", self.rows, self.unit)
            lines += ["", *_listed(f"{published.model}, the paper", published.rows, self.unit)]
        found = self.verdict(model)
        if found is not None:
            bad = [each for each in found if not each["ok"]]
            lines += ["", f"**Judged**: {len(found) - len(bad)} of {len(found)} numbers agree."]
            lines += [
                f"- {each['row']}, {each['column']}: {_show(each['ours'])} for "
                f"{_show(each['paper'])}" for each in bad
            ]  # fmt: skip
        lines += ["", *(f"{note}\n" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


def label(table: str) -> str:
    """`Table 5`, `Figure 1`, `Section 4.2`."""
    return f"Table {table}" if table.isdecimal() else table.replace("-", " ").capitalize()


def file_of(table: str) -> str:
    """The name of a table's files, without their endings."""
    return f"table-{table}" if table.isdecimal() else table


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(column for cells in rows.values() for column in cells))


def _head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]


def _line(name: str, cells: dict[str, float | None], columns: list[str]) -> str:
    return f"| {name} | " + " | ".join(_show(cells.get(column)) for column in columns) + " |"


def _listed(first: str, rows: Rows, unit: str) -> list[str]:
    """A table; where rows have columns of their own, each cell is named."""
    columns = _columns(rows)
    first = f"{first} ({unit})" if unit else first
    if len(columns) <= max(map(len, rows.values())):
        return [*_head(first, columns),
                *(_line(row, cells, columns) for row, cells in rows.items())]  # fmt: skip
    most = max(map(len, rows.values()))
    lines = _head(first, [""] * most)
    for row, cells in rows.items():
        named = [f"{key} {_show(value)}".strip() for key, value in cells.items()]
        lines.append(f"| {row} | {' | '.join(named + [''] * (most - len(named)))} |")
    return lines


def _show(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value + 0.0:.3g}"
