"""A task's examples as one model's tokens, as many as each step of the flow is given."""

from __future__ import annotations

from dataclasses import dataclass

from prune_edit.decoder import Decoder
from prune_edit.tasks import Task
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
        """At most `--limit` or else `default` examples of a split, as tokens."""
        chosen = self.task.sample(split, self.limit if self.limit is not None else default)
        name = f"task {self.task.name!r}"
        return encode_all(self.decoder.tokenizer, chosen, name, self.decoder.max_positions)

    def train(self) -> list[Encoded]:
        """All train examples by hash; tuning is bounded by its steps, not by --limit.

        The rounds score the first of them, the groups in the task's own proportions.
        """
        every = self.task.split("train")
        name = f"task {self.task.name!r}"
        return encode_all(self.decoder.tokenizer, every, name, self.decoder.max_positions)
