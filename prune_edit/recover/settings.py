"""What a user may ask of tuning: how long, by which loss, and where LoRA goes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prune_edit.errors import PlanError

if TYPE_CHECKING:
    from prune_edit.recover.gradual import Schedule

LOSSES = ("both", "cross-entropy", "distil")
MODULES = ("all", "attention", "ffn")
_TUNED = ("auto", "lora", "full")


@dataclass(frozen=True)
class TuningSettings:
    """Changes to the usual schedule; None is as ever.

    `steps` and `patience` (checks without gain after which tuning ends; 0: it runs to its end) are
    the final tuning's, `loss` is every tuning's, `lora_layers` and `lora_modules` every LoRA's.
    """

    steps: int | None = None
    patience: int = 0
    loss: str = "both"
    lora_layers: tuple[int, ...] | None = None
    lora_modules: str = "all"

    def check(self, recover: str) -> None:
        """Raise PlanError for a value that is none, or that this recovery does not read."""
        for flag, value, known in (
            ("--loss", self.loss, LOSSES),
            ("--lora-modules", self.lora_modules, MODULES),
        ):
            if value not in known:
                raise PlanError(f"{flag} {value!r} is unknown; give {', '.join(known)}")
        if (self.steps is not None and self.steps < 1) or self.patience < 0:
            raise PlanError(
                f"steps {self.steps} and patience {self.patience}: give at least 1 step, and a "
                "patience from 0 (none)"
            )
        lora = {"--lora-layers": self.lora_layers is not None}
        lora["--lora-modules"] = self.lora_modules != "all"
        tuned = {"--steps": self.steps is not None, "--patience": bool(self.patience)}
        tuned["--loss"] = self.loss != "both"
        for given, able in ((lora, ("lora",)), (tuned, _TUNED)):
            for flag in (flag for flag, is_given in given.items() if is_given):
                if recover not in able:
                    raise PlanError(
                        f"{flag} means nothing to --recover {recover}; give --recover "
                        f"{' or '.join(able)}"
                    )

    def check_layers(self, count: int) -> None:
        """Raise PlanError for a layer that a model of `count` layers does not have."""
        for layer in self.lora_layers or ():
            if layer >= count:
                raise PlanError(
                    f"--lora-layers {layer}: the model has layers 0 to {count - 1}; give some of "
                    "those"
                )

    def of(self, schedule: Schedule) -> Schedule:
        """The schedule with these settings."""
        own = {"loss": self.loss, "layers": self.lora_layers, "modules": self.lora_modules}
        stock = type(self)()
        if self == stock:
            return schedule
        rounds, final, neurons = (
            replace(tuning, **own)  # type: ignore[arg-type]
            for tuning in (schedule.round_tuning, schedule.final_tuning, schedule.neuron_tuning)
        )
        steps = final.steps if self.steps is None else self.steps
        final = replace(final, steps=steps, patience=self.patience)
        return replace(schedule, round_tuning=rounds, final_tuning=final, neuron_tuning=neurons)


PLAIN = TuningSettings()
"""The usual schedule as it is."""
