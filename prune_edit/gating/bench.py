"""The bench: a model and its base, and what of them has been measured already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.gating.measured import Outcome
from prune_edit.gating.rules import Rule
from prune_edit.running import Running


@dataclass
class Bench:
    """A model and its base, and what of them has been measured already."""

    decoders: tuple[Decoder, ...]  # the model, then its base if there is one
    options: Running
    limit: int | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> Decoder:
        """The model that is judged."""
        return self.decoders[0]

    @property
    def reference(self) -> Decoder:
        """The model that tasks are fitted to: the base, where there is one."""
        return self.decoders[-1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


def outcome(text: str, group: str, sides: Sequence[float]) -> Outcome:
    """What an example brings in the model and, where there is one, in its base."""
    base = float(sides[1]) if len(sides) > 1 else None
    return Outcome(text, group, float(sides[0]), base)


def check_group(rule: Rule, count: int, groups: Sequence[str]) -> None:
    """Raise TaskError where a group is unknown or too small for an interval."""
    if not count:
        raise TaskError(
            f"{rule.subject}: there is no such group; known are "
            + (", ".join(filter(None, groups)) or "none")
        )
    if count < 2:
        raise TaskError(
            f"{rule.subject}: one example says nothing of a group; give more examples, or leave "
            "out the rule"
        )
