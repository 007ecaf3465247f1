"""Budget and Plan: which units stay. Knows scores and counts, and no model."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_edit.errors import BudgetError, PlanError
from prune_edit.layout import Kept

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
_RULES: dict[str, Any] = {"kv": "pad", "align": 1, "budget": "", "costs": None, "serve": ""}


@dataclass(frozen=True)
class Budget:
    """How many units stay, over the whole model: a count, a share, or all."""

    text: str
    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | int, flag: str) -> Budget:
        """Read `5%`, `12` or `all`; `flag` is named in the error. Raises BudgetError."""
        text = str(text)
        value = text.strip()
        if value.lower() == "all":
            return cls("all", share=1.0)
        try:
            if value.endswith("%"):
                share = float(value[:-1]) / 100
                if not 0 < share <= 1:
                    raise BudgetError(f"{flag} {text}: a share must be above 0% and at most 100%")
                return cls(value, share=share)
            count = int(value)
        except ValueError:
            raise BudgetError(
                f"{flag} {text!r} is not a budget; give a share such as 5%, a count such as 12, "
                "or all"
            ) from None
        if count <= 0:
            raise BudgetError(f"{flag} {text}: at least one unit must stay")
        return cls(value, count=count)

    def of(self, total: int, flag: str) -> int:
        """Units that stay of `total`; at least one. Raises BudgetError above `total`."""
        if self.count is not None:
            if self.count > total:
                raise BudgetError(
                    f"{flag} {self.text}: the model has only {total}; give at most that, or all"
                )
            return self.count
        # Rounded before flooring, so that 5 % of 160 is 8 and not the floor of 7.999....
        return max(1, math.floor(round((self.share or 0.0) * total, 6)))


@dataclass(frozen=True)
class Plan:
    """The kept heads and neurons of every layer, and where the choice came from.

    Indices are those of the base model, ascending; `n_heads` and `n_neurons` are its heads and
    FFN width a layer. `method` and `scores_digest` say what ranked them, `model_digest` for which
    model. `kv` and `align` are the rules that were kept, `budget` says what one budget over both
    was, such as `20% of latency`, `costs` what units cost where that was measured, and `serve` the
    engine whose needs were kept.
    """

    heads: Kept
    neurons: Kept
    n_heads: int
    n_neurons: int
    method: str = "none"
    task: str = ""
    task_source: str = ""
    task_digest: str = ""
    model_digest: str = ""
    scores_digest: str = ""
    seed: int = 0
    schema: int = SCHEMA_VERSION
    kv: str = "pad"
    align: int = 1
    budget: str = ""
    costs: dict[str, Any] | None = None
    serve: str = ""

    def __post_init__(self) -> None:
        for name, kept, width in (
            ("heads", self.heads, self.n_heads),
            ("neurons", self.neurons, self.n_neurons),
        ):
            for layer, units in enumerate(kept):
                if any(type(unit) is not int for unit in units):
                    raise PlanError(f"plan: {name} of layer {layer} are not whole numbers")
                if list(units) != sorted(set(units)):
                    raise PlanError(f"plan: {name} of layer {layer} are not ascending and distinct")
                if units and not 0 <= units[0] <= units[-1] < width:
                    wrong = units[0] if units[0] < 0 else units[-1]
                    raise PlanError(
                        f"plan: {name} of layer {layer} name unit {wrong}, "
                        f"but a layer of the base model has {width}"
                    )
        if len(self.heads) != len(self.neurons):
            raise PlanError(
                f"plan: heads are given for {len(self.heads)} layers, "
                f"neurons for {len(self.neurons)}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def n_layers(self) -> int:
        """Layers of the base model."""
        return len(self.heads)

    @property
    def kept_heads(self) -> int:
        """Heads kept over the whole model."""
        return sum(map(len, self.heads))

    @property
    def kept_neurons(self) -> int:
        """Neurons kept over the whole model."""
        return sum(map(len, self.neurons))

    def to_json(self) -> str:
        """The plan as JSON, keys in a fixed order, a final newline."""
        fields = asdict(self)
        layers = [
            {"heads": list(heads), "neurons": list(neurons)}
            for heads, neurons in zip(self.heads, self.neurons, strict=True)
        ]
        del fields["heads"], fields["neurons"]
        for name, usual in _RULES.items():  # a plan made without them reads as it always did
            if fields[name] == usual:
                del fields[name]
        return json.dumps({**fields, "layers": layers}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read `to_json`'s output; `source` names it in errors. Raises PlanError."""
        try:
            fields: dict[str, Any] = json.loads(text)
            layers = fields.pop("layers")
            if fields.get("schema") != SCHEMA_VERSION:
                raise PlanError(
                    f"{source}: plan schema {fields.get('schema')}, this version reads "
                    f"{SCHEMA_VERSION}; make the plan again"
                )
            heads = tuple(tuple(layer["heads"]) for layer in layers)
            neurons = tuple(tuple(layer["neurons"]) for layer in layers)
            return cls(heads=heads, neurons=neurons, **fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"{source} is not a plan.json: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises PlanError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from None
        return cls.from_json(text, str(path))


def keep_top(scores: torch.Tensor, count: int) -> Kept:
    """The `count` best units of (L, U) `scores`, ties by layer and index; NaN marks absent units.

    Raises BudgetError where fewer than `count` units are present.
    """
    layers, width = scores.shape
    flat = scores.flatten().tolist()
    present = [unit for unit, value in enumerate(flat) if not math.isnan(value)]
    if count > len(present):
        raise BudgetError(f"{count} units are to be kept, but the model has only {len(present)}")
    best = sorted(present, key=lambda unit: (-flat[unit], unit))[:count]
    return split_layers(best, layers, width)


def keep_neurons(scores: torch.Tensor, count: int) -> Kept:
    """The `count` neurons whose (L, N) `scores` are largest in size, whatever their sign.

    A neuron that lowers the answer takes part in finding it; removing it changes the model, too.
    Those of infinite score (`within_layers`) all stay, also where they are more.
    """
    return keep_top(scores.abs(), max(count, int(scores.isinf().sum())))


def parse_layers(text: str, flag: str, count: int | None = None) -> tuple[int, ...] | None:
    """Read `4-7`, `0,2,5-7`, or `all` (None): layers from 0 on, ascending.

    `count` is how many the model has, where that is known. Raises BudgetError, naming `flag`.
    """
    if text.strip().lower() == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise BudgetError(
                f"{flag} {text!r} names no layers; give some such as 4-7 or 0,2,5-7, or all"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise BudgetError(f"{flag} {text}: {low}-{high} goes down; give {high}-{low}")
        if count is not None and high >= count:
            raise BudgetError(
                f"{flag} {text}: the model has layers 0 to {count - 1}, and no layer {high}"
            )
        found |= set(range(low, high + 1))
    return tuple(sorted(found))


def within_layers(scores: torch.Tensor, layers: Sequence[int] | None) -> torch.Tensor:
    """The (L, N) `scores` with infinity in all other layers, whose neurons stay; None: as given."""
    if layers is None:
        return scores
    found = scores.clone()
    others = [layer for layer in range(len(scores)) if layer not in layers]
    found[others] = found[others].masked_fill(~found[others].isnan(), math.inf)
    return found


def neurons_that_stay(
    budget: Budget, per_layer: Sequence[int], layers: Sequence[int] | None, flag: str
) -> int:
    """How many neurons stay where the budget is one of `layers` alone and all others stay.

    `per_layer` are how many each layer has. Raises BudgetError.
    """
    inside = sum(n for layer, n in enumerate(per_layer) if layers is None or layer in layers)
    return budget.of(inside, flag) + sum(per_layer) - inside


def split_layers(units: Sequence[int], layers: int, width: int) -> Kept:
    """Flat unit numbers as ascending indices per layer."""
    kept: list[list[int]] = [[] for _ in range(layers)]
    for unit in sorted(units):
        kept[unit // width].append(unit % width)
    return tuple(map(tuple, kept))
