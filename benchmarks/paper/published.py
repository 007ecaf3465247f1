"""The paper's figures (arXiv 2409.14144), by table: rows of named numbers, and how near is near.

Accuracies and decreases are in percent. Decreases are of the accuracy that was there, not points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA, GPTJ = "Llama-7B", "GPT-J"
NAMES = {LLAMA: ("llama-7b", "llama-7b-hf"), GPTJ: ("gpt-j-6b",)}  # folders, hub ids' last part
Rows = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Published:
    """A table of the paper: whose, what is in it, and the difference that still counts as equal."""

    model: str
    rows: Rows
    near: float | dict[str, float]  # by row where rows differ in kind

    def tolerance(self, row: str) -> float:
        return self.near[row] if isinstance(self.near, dict) else self.near


def _rows(columns: str, **rows: tuple[float, ...]) -> Rows:
    return {
        name.replace("_", " "): dict(zip(columns.split(), values, strict=True))
        for name, values in rows.items()
    }


def _operations(columns: str, *rows: tuple[float, ...]) -> Rows:
    return dict(
        zip(("all", "2D+", "2D-", "2D*", "2D/"), _rows(columns, **_lettered(rows)).values(),
            strict=True)
    )  # fmt: skip


def _lettered(rows: tuple[tuple[float, ...], ...]) -> dict[str, tuple[float, ...]]:
    return {f"r{i}": row for i, row in enumerate(rows)}


def _digits(sign: str, *lines: str) -> Rows:
    """`ori 88.9 17^22 47.6 ...` for one, two and three digits."""
    found: Rows = {}
    for digits, line in enumerate(lines, 1):
        words = line.split()
        found[f"{digits}D{sign}"] = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    return found


TOPS = "top99 top50 top30 top20 top10"
_SAMPLED = 4.0  # points: the sentences are drawn anew

PUBLISHED: dict[str, Published] = {
    "1": Published(LLAMA, _operations(
        "ori 17^22 15^9 14^19 15^23 16^1",
        (74.8, 53.4, 62.1, 62.7, 68.1, 68.7), (96.8, 42.9, 83.2, 92.5, 89.7, 91.6),
        (94.4, 72.3, 84.6, 93.2, 86.5, 79.1), (56.6, 50.5, 50.9, 51.3, 52.3, 56.9),
        (51.4, 48.2, 29.5, 13.8, 43.8, 47.1)), _SAMPLED),
    "2": Published(LLAMA, {
        "1D": {"+": 46.5, "-": 62.2, "*": 6.8, "/": 54.9},
        "2D": {"+": 58.4, "-": 52.6, "*": 11.2, "/": 71.8},
        "3D": {"+": 52.5, "-": 56.9, "*": 8.1, "/": 53.2}}, 2 * _SAMPLED),
    "3": Published(LLAMA, {
        "memorize": {"+": 59.2, "-": 49.8, "*": 11.6, "/": 63.6},
        "change-one": {"+": 57.1, "-": 65.5, "*": 11.3, "/": 75.2}}, 2 * _SAMPLED),
    "section-4.2": Published(LLAMA, {
        "probability of 8": {"ori": 0.3776, "17^22": 0.0616, "13^15": 0.1539, "14^19": 0.2145,
                             "15^9": 0.2403, "1^8": 0.2475}}, 0.002),
    "4": Published(LLAMA, {
        "change": {"28_3696": 0.6964, "25_7164": 0.2327, "29_10957": 0.1384, "19_5769": 0.1348},
        "importance": {"28_3696": 0.8229, "25_7164": 0.3097, "29_10957": 0.1464,
                       "19_5769": 0.2041},
        "importance without the head": {"28_3696": 0.1265, "25_7164": 0.0770, "29_10957": 0.0080,
                                        "19_5769": 0.0692},
        "coefficient": {"28_3696": 6.21, "25_7164": 8.44, "19_5769": 3.79},
        "coefficient without the head": {"28_3696": 0.95, "25_7164": 2.08, "19_5769": 1.28}},
        {"change": 0.005, "importance": 0.005, "importance without the head": 0.005,
         "coefficient": 0.05, "coefficient without the head": 0.05}),
    "5": Published(LLAMA, _rows(
        TOPS, mask=(100.0, 96.0, 89.5, 86.8, 68.4), keep=(3.9, 7.8, 13.2, 18.4, 38.2),
        coefficients=(49.1, 60.4, 67.2, 72.7, 77.1)), 2 * _SAMPLED),
    "6": Published(LLAMA, _rows(TOPS, coefficients=(15.8, 14.8, 12.5, 9.5, 4.4)), _SAMPLED),
    "8": Published(LLAMA, _rows(
        "M=1 M=2 M=3", neurons=(10426, 1953, 510), accuracy=(68.4, 53.9, 43.4)),
        {"neurons": 500, "accuracy": 2 * _SAMPLED}),
    "9": Published(LLAMA, {
        "28_3696": {"ori": 6.2, "9": 3.6, "15": 6.3, "16": 3.9, "19": 5.7, "20": 4.1},
        "25_7164": {"ori": 8.4, "9": 16.1, "15": 11.8, "16": 11.0, "19": 13.9, "20": 9.7},
        "19_5769": {"ori": 3.8, "9": 9.2, "15": 7.7, "16": 6.1, "19": 5.1, "20": 3.8}}, 3.0),
    "10": Published(LLAMA, {
        "layers 1-9": {"top50": 42, "top30": 49, "top20": 57, "top10": 59},
        "layers 10-16": {"top50": 29, "top30": 36, "top20": 44, "top10": 53},
        "layers 17-30": {"top50": 2, "top30": 11, "top20": 14, "top10": 28}}, 15.0),
    "figure-2": Published(LLAMA, {"accuracy": {"ori": 62.96, "layers 1-9": 90.0}}, _SAMPLED),
    "11": Published(LLAMA, {
        "accuracy": {"origin": 62.9, "LoRA": 89.3, "LoRA, pruned": 82.3, "LoRA, random": 17.1}},
        2 * _SAMPLED),
    "13": Published(LLAMA, {
        "origin": {"total": 1.26, "woman": 1.45, "man": 1.08},
        "edited": {"total": 0.81, "woman": 1.04, "man": 0.59}}, 0.15),
    "18": Published(GPTJ, _operations(
        "ori 7^0 13^9 0^11 15^6 14^14",
        (74.5, 63.6, 64.4, 65.0, 68.8, 70.8), (97.0, 95.0, 94.0, 98.0, 95.0, 97.0),
        (78.6, 63.6, 41.8, 63.6, 74.5, 80.0), (71.0, 54.0, 72.0, 53.0, 59.0, 72.0),
        (51.5, 42.0, 50.0, 45.6, 46.7, 34.4)), _SAMPLED),
    "19": Published(GPTJ, _rows(
        TOPS, mask=(58.4, 45.9, 33.4, 25.0, 25.0), keep=(37.5, 50.0, 54.1, 83.4, 95.9),
        coefficients=(17, 20, 21, 23, 29)), 2 * _SAMPLED),
    "20": Published(GPTJ, _rows(TOPS, coefficients=(1.9, 1.7, 1.6, 1.2, 1.9)), _SAMPLED),
    "21": Published(GPTJ, _rows(
        "M=1 M=2 M=3", neurons=(4272, 1228, 564), accuracy=(100.0, 83.4, 20.8)),
        {"neurons": 200, "accuracy": 2 * _SAMPLED}),
    "24": Published(LLAMA, _digits("+",
        "ori 88.9 17^22 47.6 15^23 82.8 6^20 84.1 13^15 84.1 14^19 84.1",
        "ori 94.5 17^22 39.3 15^9 86.0 13^2 87.9 6^20 88.6 12^16 89.2",
        "ori 96.1 17^22 46.4 8^10 82.7 15^23 83.5 12^16 85.2 15^9 87.2"), _SAMPLED),
    "25": Published(LLAMA, _digits("-",
        "ori 82.0 17^22 31.0 16^1 51.0 15^23 53.0 2^26 57.0 13^2 65.0",
        "ori 80.0 16^1 33.9 17^22 37.9 13^2 61.8 15^23 63.3 12^16 70.6",
        "ori 57.1 16^1 19.6 17^22 22.9 15^23 29.3 13^2 34.3 12^16 40.7"), _SAMPLED),
    "26": Published(LLAMA, _digits("*",
        "ori 93.0 3^5 85.4 20^18 86.7 6^24 87.3 17^22 89.2 0^30 89.2",
        "ori 56.9 15^9 49.3 14^19 50.1 17^22 50.5 20^18 50.5 3^5 51.6",
        "ori 32.8 3^5 25.9 15^9 29.7 14^19 30.3 13^19 31.1 2^14 31.1"), _SAMPLED),
    "27": Published(LLAMA, _digits("/",
        "ori 78.9 14^19 35.6 15^9 61.1 21^24 65.6 6^24 67.8 16^21 68.9",
        "ori 48.6 14^19 13.7 12^1 30.2 3^3 31.4 16^21 36.9 1^29 38.8",
        "ori 19.0 14^19 9.67 3^3 12.7 12^1 13.0 6^22 13.3 15^9 13.7"), _SAMPLED),
    "figure-1": Published(LLAMA, {
        "feature enhancing": {"12_4072": None, "11_2258": None},
        "feature transferring": {"layer 15": None},
        "feature predicting": {"17^22": None},
        "prediction enhancing": {"28_3696": None, "25_7164": None, "19_5769": None}}, 0.0),
}  # fmt: skip


def judged(table: str, name: str) -> str | None:
    """The paper's model that this one is, where the table is of it."""
    known = PUBLISHED[table].model
    return known if name.lower().rpartition("/")[2] in NAMES[known] else None


def as_json(table: str) -> dict[str, Any]:
    return {"model": PUBLISHED[table].model, "rows": PUBLISHED[table].rows}
