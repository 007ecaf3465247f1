"""A task's examples as one model's tokens, as many as each step of the flow is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prune_edit.decoder import Decoder
from prune_edit.tasks import CombinedTask, Example, Task
from prune_edit.tasks.combine import in_turn
from prune_edit.tasks.prompts import Encoded, encode_all

SCORING_EXAMPLES = 128
VALIDATION_EXAMPLES = 512
TEST_EXAMPLES = 1024


@dataclass(frozen=True)
class Samples:
    """One task's prompts for one model."""

    task: Task
    decoder: Decoder
    limit: int | None

    def encoded(self, split: str, default: int | None) -> list[Encoded]:
        """At most `--limit` or else `default` examples of a split, of each task, as tokens."""
        return self._rows(split, self.limit if self.limit is not None else default)

    def train(self) -> list[Encoded]:
        """All train examples by hash; tuning is bounded by its steps, not by --limit.

        The rounds score the first of them, the groups in the task's own proportions.
        """
        if isinstance(self.task, CombinedTask):
            return self._rows("train", None)
        return self._encoded(self.task.split("train"), self.task.name)

    def _rows(self, split: str, limit: int | None) -> list[Encoded]:
        """A sample as tokens; of several tasks, theirs in turn, with part and weight."""
        if not isinstance(self.task, CombinedTask):
            return self._encoded(self.task.sample(split, limit), self.task.name)
        return in_turn(
            [
                [replace(row, part=name, weight=weight) for row in self._encoded(some, name)]
                for name, weight, some in self.task.samples(split, limit)
            ]
        )

    def _encoded(self, examples: Sequence[Example], name: str) -> list[Encoded]:
        where = f"task {name!r}"
        return encode_all(self.decoder.tokenizer, examples, where, self.decoder.max_positions)
