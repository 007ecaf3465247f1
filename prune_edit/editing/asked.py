"""What a user asks of an edit, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from prune_edit.editing.search import SearchSettings
from prune_edit.errors import BudgetError, EditError

PAPERS = 18
"""Neurons that the paper zeroes."""

USUAL = "90%"
_SHARE = 0.01  # of the neurons, fewer than which the search changes


@dataclass(frozen=True)
class Asked:
    """One edit: the concept, how far, by which way and with how many units.

    `suppress` None is the search, or `scale` where that is given. `settings` are the search's.
    """

    concept: str = "gender"
    reduce: str = USUAL
    suppress: str | None = None
    neurons: int | None = None
    heads: int = 0
    scale: float | None = None
    guard_weight: float = 10.0
    protect: str = "1%"
    uneven: str = "refuse"
    settings: SearchSettings | None = None

    @property
    def way(self) -> str:
        """How units are suppressed."""
        return self.suppress or ("search" if self.scale is None else "scale")

    @property
    def share(self) -> float:
        """The share of the bias that should go. Raises BudgetError."""
        return _share(self.reduce, "--reduce")

    @property
    def kept(self) -> float:
        """The share of the neurons that are left alone. Raises BudgetError."""
        return _share(self.protect, "--protect", least=0.0)

    def check(self) -> None:
        """Raise EditError for settings that do not go together, BudgetError for no shares."""
        way, scale = self.way, self.scale
        if scale is not None and way not in ("scale", "amplify"):
            raise EditError(f"--scale {scale:g} is for --suppress scale or amplify, not {way}")
        if way != "search" and (self.heads or self.reduce != USUAL):
            what = f"--heads {self.heads}" if self.heads else f"--reduce {self.reduce}"
            raise EditError(f"{what} is for --suppress search, not {way}; leave out one of them")
        assert self.share and self.kept >= 0

    def count(self, total: int) -> int:
        """How many of so many neurons may change. Raises BudgetError."""
        usual = max(1, int(_SHARE * total - 1e-9)) if self.way == "search" else PAPERS
        count = usual if self.neurons is None else self.neurons
        if not 0 < count <= total:
            raise BudgetError(f"--neurons {count}: the model has {total}; give 1 to {total}")
        return count


def _share(text: str, flag: str, least: float = 1e-9) -> float:
    value = text.strip()
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not least <= share <= 1:
        raise BudgetError(f"{flag} {text!r} is not a share; give one such as 50%")
    return share
