"""What a method may be told, and the model's own predictions as targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.running import Running, best_tokens
from prune_edit.scoring.statistics import Moments
from prune_edit.tasks.prompts import Encoded, batches


def alone(found: torch.Tensor) -> torch.Tensor:
    """What one process finds is the whole."""
    return found


@dataclass(frozen=True)
class Options(Running):
    """What a method may be told; each reads what concerns it. Raises PlanError.

    neurons         False leaves the neurons' scores NaN, where only heads are asked for
    ablation        `intervention`: an ablated unit gives `zero`, or its `mean` over the prompts
    measure         `intervention`: nats of the answer's `logprob`, or `accuracy`, the share of
                    examples whose whole answer is the arg-max; `taylor`: `logprob` or `logodds`
    norm            `importance`, `cna`: the final norm's divisor is that of the real final state
                    (`frozen`, as in the authors' code), or follows each sum (`true`)
    top_neurons     `importance`, `cna`: only so many, the best, have a score; 0 for all
    top_heads       `cna`: how many heads the other model lacks, each example its own
    adapted         `cna`: the other model, instead: this one tuned (`adapter.load_adapter`)
    contrast        `cna`: other prompts, one for each, instead of another model
    query_neurons   `query`: how many of the most important neurons are traced back
    integrated_steps  `taylor`: points on the path from ablated to real; 1 is the first order
    means           `intervention` by mean: the means, where they are not those of the prompts
    share           which process of how many this is, where each does its share of the units
    gather          the sum over those processes of what each found
    """

    top_neurons: int = 0
    top_heads: int = 1
    neurons: bool = True
    ablation: str = "zero"
    measure: str = "logprob"
    norm: str = "frozen"
    contrast: tuple[Encoded, ...] = field(default=(), repr=False)
    adapted: Decoder | None = field(default=None, compare=False, repr=False)
    query_neurons: int = 32
    integrated_steps: int = 1
    means: Moments | None = field(default=None, compare=False, repr=False)
    share: tuple[int, int] = (0, 1)
    gather: Callable[[torch.Tensor], torch.Tensor] = field(default=alone, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise PlanError(f"{name} {value!r} is unknown; give {' or '.join(known)}")
        for name in ("batch_tokens", "top_heads", "query_neurons", "integrated_steps"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} {getattr(self, name)} is too small; give at least 1")
        if self.top_neurons < 0:
            raise PlanError(f"top_neurons {self.top_neurons} is too small; give at least 0")
        if self.adapted is not None and self.contrast:
            raise PlanError(
                "an adapted model and contrast prompts are two contrasts; give one of them"
            )


_CHOICES = {
    "ablation": ("zero", "mean"),
    "measure": ("logprob", "accuracy", "logodds"),
    "norm": ("frozen", "true"),
}


@torch.no_grad()
def predicted_targets(
    decoder: Decoder, prompts: Sequence[Encoded], options: Options
) -> list[Encoded]:
    """The same prompts with the model's own next token as the answer (`--target predicted`)."""
    fronts = [replace(row, ids=(*row.ids[: row.start], 0)) for row in prompts]
    found: list[Encoded] = []
    for rows, batch in batches(fronts, options.batch_tokens):
        batch = batch.to(decoder.device)
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        tokens = best_tokens(decoder, states).tolist()
        for i, token in zip(rows, tokens, strict=True):
            found.append(replace(fronts[i], ids=(*fronts[i].ids[:-1], token)))
    order = {id(row.example): i for i, row in enumerate(prompts)}
    return sorted(found, key=lambda row: order[id(row.example)])
