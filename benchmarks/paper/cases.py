"""Setting: a model, how many cases, and the paper's prompts as this model reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.evaluation.comparison import environment
from prune_edit.explain import answers_with
from prune_edit.scoring import Options
from prune_edit.tasks import arithmetic
from prune_edit.tasks.prompts import Encoded, encode_all
from prune_edit.tasks.task import Example, Task

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_LEAST = 10  # % of right answers below which a loss of accuracy says nothing


@dataclass(frozen=True)
class Setting:
    """`cases` are those of each operation, at most."""

    decoder: Decoder
    name: str
    cases: int
    seed: int = 0
    draws: int = 3
    steps: int = 60
    recipe: Path = Path("recipe.json")
    recipe_steps: int = 600

    @cached_property
    def options(self) -> Options:
        return Options(seed=self.seed)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "layers": self.decoder.n_layers,
            "heads_a_layer": self.decoder.head_shape[1],
            "neurons_a_layer": self.decoder.neuron_shape[1],
            "cases_an_operation": self.cases,
            "environment": environment(self.decoder, self.seed),
        }

    def prompts(
        self, operation: str, digits: int, *, last: bool = False, limit: int | None = None
    ) -> list[Encoded]:
        """Cases of an operation from the test split, wordings mixed; `last`: `a+b=` alone."""
        task = arithmetic.load(operation, digits=(digits,))
        rows = task.examples
        if last:
            rows = tuple(each for each in rows if _last(each))
        chosen = Task(task.name, rows).sample("test", limit or self.cases)
        return encode_all(self.decoder.tokenizer, chosen, task.name, self.decoder.max_positions)

    def mixed(self) -> list[Encoded]:
        """The paper's data of table 1: four operations of two digits."""
        return list(chain.from_iterable(self.prompts(name, 2) for name in SIGNS))

    def right(self, prompts: list[Encoded], what: str) -> list[Encoded]:
        """Those that the model answers. Raises TaskError where it answers none."""
        found = answers_with(self.decoder, prompts, self.options, "answers").right
        rows = [row for row, right in zip(prompts, found.tolist(), strict=True) if right]
        if not rows:
            raise TaskError(
                f"{self.name} answers none of {len(prompts)} {what}, so nothing is to be taken "
                "apart; give a --model that does arithmetic, or more --cases"
            )
        return rows

    def small(self, operations: tuple[str, ...] = ("add", "sub")) -> list[Encoded]:
        """One-digit cases that the model answers: 1D+ and 1D-, of tables 5, 6 and 8."""
        every = chain.from_iterable(self.prompts(name, 1) for name in operations)
        return self.right(list(every), "one-digit sums and differences")

    def differences(self) -> list[Encoded]:
        """Two-digit differences that the model answers: 2D-, of GPT-J's tables."""
        return self.right(self.prompts("sub", 2), "two-digit differences")

    def with_cases(self, cases: int) -> Setting:
        return replace(self, cases=cases)


def percent(value: float) -> float:
    return round(100 * value, 2)


def decrease(before: float, after: float) -> float | None:
    """The share of an accuracy that is gone, in percent; None where there was next to none."""
    return percent(1 - after / before) if 100 * before >= _LEAST else None


def _last(example: Example) -> bool:
    return example.prompt.endswith("=") and example.prompt[0].isdecimal()
