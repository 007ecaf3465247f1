"""Draw: which examples a step of tuning sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Encoded


class Draw:
    """Examples of several tasks, each as often as its weight says; of one task, its groups in turn.

    After any number of draws, each task has had its share of them to within one for every other
    task (smooth weighted round robin).
    """

    def __init__(self, prompts: Sequence[Encoded], generator: torch.Generator) -> None:
        parts = by_part(prompts)
        self.shares = [share for _, share, _ in parts]
        self.turns = [_Groups(rows, generator) for _, _, rows in parts]
        self.owed = [0.0] * len(parts)

    def some(self, count: int) -> list[Encoded]:
        """The next `count` examples."""
        return [self.turns[self._whose()].next() for _ in range(count)]

    def _whose(self) -> int:
        """The task that is owed most; the first by name of those."""
        self.owed = [owed + share for owed, share in zip(self.owed, self.shares, strict=True)]
        # Rounded, so that equal shares stay equal in floats.
        whose = max(range(len(self.owed)), key=lambda i: (round(self.owed[i], 9), -i))
        self.owed[whose] -= 1.0
        return whose


class _Groups:
    """Examples without replacement, group after group, reshuffled when a group is used up."""

    def __init__(self, prompts: Sequence[Encoded], generator: torch.Generator) -> None:
        self.generator = generator
        groups: dict[str, list[Encoded]] = {}
        for row in prompts:
            groups.setdefault(row.example.group, []).append(row)
        self.groups = [groups[name] for name in sorted(groups)]
        self.queues: list[list[int]] = [[] for _ in self.groups]
        self.turn = 0

    def next(self) -> Encoded:
        """An example of the group whose turn it is."""
        group, queue = self.groups[self.turn], self.queues[self.turn]
        if not queue:
            queue += torch.randperm(len(group), generator=self.generator).tolist()
        self.turn = (self.turn + 1) % len(self.groups)
        return group[queue.pop()]
