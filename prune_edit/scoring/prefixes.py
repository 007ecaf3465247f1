"""Prompts that share a prefix share its states: packing them into windows of a common trie.

The state at a position depends on the tokens up to it and on nothing else, so equal prefixes need
one row. A window is a forest of such rows with a mask in which every row sees itself and those
before it in its prompt; its positions are its depths. Wide windows share more and pay more for
attention, which grows with the square of their width: `pack` takes the width that costs least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from prune_edit.tasks.prompts import Batch, Encoded

_NARROW = 24  # rows; narrower windows only cost calls


@dataclass(frozen=True)
class Question:
    """The tokens of an example that are read, and the places after which a target is asked."""

    read: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, row: Encoded) -> Question:
        """An encoded example's; its last token is only predicted."""
        return cls(row.ids[:-1], tuple(range(row.start - 1, len(row.ids) - 1)), row.answer)


def questions_of(batch: Batch) -> list[Question] | None:
    """A batch's examples without their padding; None where positions do not count the tokens."""
    real = batch.attention_mask.bool()
    places = batch.attention_mask.cumsum(1) - 1
    if not torch.equal(places[real], batch.position_ids[real]):
        return None
    reads = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, real, strict=True)]
    asked: list[list[tuple[int, int]]] = [[] for _ in reads]
    found = places[batch.rows, batch.columns].tolist()
    for row, place, target in zip(batch.rows.tolist(), found, batch.targets.tolist(), strict=True):
        asked[row].append((place, target))
    return [
        Question(read, tuple(p for p, _ in pairs), tuple(t for _, t in pairs))
        for read, pairs in zip(reads, asked, strict=True)
    ]


@dataclass(frozen=True)
class Forest:
    """n windows of W rows, R = n * W in a line; A rows are asked; P pairs of a row and a target.

    `tokens` and `depths` are (n, W), `visible` (n, W, W) says which rows a row sees, `asked` (A,)
    numbers rows in the line, ascending; `pairs` (P,) numbers asked rows, `targets` (P,) tokens,
    `owners` (P,) the examples. Rows that only fill a window up see themselves.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor
    asked: torch.Tensor
    pairs: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    nodes: int  # rows that are not there to fill up

    def to(self, device: torch.device) -> Forest:
        """The forest on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Forest(**moved, nodes=self.nodes)


@dataclass(frozen=True)
class Packing:
    """Which examples share which window, and how wide the windows are."""

    windows: list[list[int]]
    width: int

    @property
    def rows(self) -> int:
        """Rows in all windows."""
        return len(self.windows) * self.width

    def groups(self, most_rows: int) -> Iterator[list[list[int]]]:
        """Windows in even groups of at most `most_rows` rows, or of one window."""
        most = max(1, most_rows // self.width)
        count = -(-len(self.windows) // most)
        for i in range(count):
            start, stop = (len(self.windows) * k // count for k in (i, i + 1))
            yield self.windows[start:stop]


def pack(questions: Sequence[Question], row_cost: float, pair_cost: float, most: int) -> Packing:
    """The cheapest packing, where a row costs `row_cost` and a row's sight of another `pair_cost`.

    Any unit of cost will do. No window is wider than `most` rows, unless a prompt is.
    """
    order = sorted(range(len(questions)), key=lambda i: questions[i].read)
    reads = [questions[i].read for i in order]
    sizes = list(map(len, reads))
    shared = [0, *(_common(a, b) for a, b in pairwise(reads))]
    longest, total = max(sizes), sum(sizes) - sum(shared)
    most = max(longest, min(total, most))
    best: tuple[float, Packing] | None = None
    times = max(1, -(-_NARROW // longest))
    while True:
        width = min(longest * times, most)
        windows = _assign(sizes, shared, width)
        used = max(rows for rows, _ in windows)
        packing = Packing([[order[i] for i in members] for _, members in windows], used)
        cost = packing.rows * (row_cost + pair_cost * used)
        if best is None or cost < best[0]:
            best = cost, packing
        if width >= most or width * pair_cost > 4 * row_cost:
            return best[1]
        times = max(times + 1, times * 3 // 2)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _assign(sizes: list[int], shared: list[int], width: int) -> list[tuple[int, list[int]]]:
    """Windows of at most `width` rows: (rows, prompts), of prompts sorted by their tokens."""
    runs: list[tuple[int, list[int]]] = []
    for i, (size, common) in enumerate(zip(sizes, shared, strict=True)):
        if runs and runs[-1][0] + size - common <= width:
            rows, members = runs[-1]
            members.append(i)
            runs[-1] = rows + size - common, members
        else:
            runs.append((size, [i]))
    # First fit, largest first: runs that leave room stand side by side.
    windows: list[tuple[int, list[int]]] = []
    for rows, members in sorted(runs, key=lambda run: -run[0]):
        for k, (have, others) in enumerate(windows):
            if have + rows <= width:
                windows[k] = have + rows, others + members
                break
        else:
            windows.append((rows, members))
    return windows


def forest(questions: Sequence[Question], windows: Sequence[Sequence[int]], width: int) -> Forest:
    """The rows of some windows of a packing."""
    count = len(windows)
    tokens, depths = [0] * (count * width), [0] * (count * width)
    seen = [i * width + i % width for i in range(count * width)]  # cells of `visible`
    pairs: list[tuple[int, int, int]] = []
    nodes = 0
    for w, members in enumerate(windows):
        read: tuple[int, ...] = ()
        path: list[int] = []
        free = w * width
        for member in members:
            question = questions[member]
            common = _common(read, question.read)
            read, path = question.read, path[:common]
            for depth in range(common, len(read)):
                tokens[free], depths[free] = read[depth], depth
                seen += [free * width + row % width for row in path]
                path.append(free)
                free += 1
            pairs += (
                (path[place], target, member)
                for place, target in zip(question.places, question.targets, strict=True)
            )
        nodes += free - w * width
    visible = torch.zeros(count * width * width, dtype=torch.bool)
    visible[torch.tensor(seen)] = True
    rows, targets, owners = (torch.tensor(part) for part in zip(*pairs, strict=True))
    asked, numbers = rows.unique(return_inverse=True)
    return Forest(
        torch.tensor(tokens).view(count, width),
        torch.tensor(depths).view(count, width),
        visible.view(count, width, width),
        asked,
        numbers,
        targets,
        owners,
        nodes,
    )
