"""Small models, prompts and helpers that the tests of recovery share."""

from __future__ import annotations

from typing import Any

import torch
from pico_checkpoint import dense
from reference import Prompt

from prune_edit.decoder import Decoder
from prune_edit.evaluation.accuracy import answer_sums
from prune_edit.recover.gradual import Rounds, Schedule
from prune_edit.recover.shrink import shrink
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.tuning import Tuning
from prune_edit.scoring import Options
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.tasks.task import Example
from prune_edit.units import Units
from prune_edit.workspace import Workspace

NAMES = ("llama", "llama-gqa", "mistral", "gpt2")
OPTIONS = Options()
PROMPTS = (
    Prompt((3, 9, 27, 4, 12, 36, 2), 5),
    Prompt((5, 25, 8), 2),
    Prompt((7, 33, 14, 21, 39, 1, 30, 6, 18), 6),
    Prompt((11, 2, 19, 28), 3),
)
KEPT: dict[str, tuple[Any, Any]] = {
    "llama": (((), (1, 3), (0, 1, 2, 3), (2,)), ((0, 5, 11), (), tuple(range(12)), (7,))),
    "llama-gqa": (((0, 1, 2, 5), (), (3, 7)), ((1, 2), (3,), ())),  # layer 0 has pads
    "mistral": (((1,), (0, 2, 3)), ((0, 1, 2), (4, 9))),
    "gpt2": (((), (0, 2, 3), (1,)), ((0, 40, 127), (), (5, 6))),
}
PLAIN = Example("", "")
QUICK = Tuning(steps=8, batch=8, learning_rate=1e-2, rank=4, warmup=2)


def pico(name: str) -> Decoder:
    return Decoder(dense(name), None)  # type: ignore[arg-type]


def rows_of(*prompts: Prompt) -> list[Encoded]:
    return [
        Encoded(p.ids, p.start, Example(str(p.ids), "", group=str(i % 2)))
        for i, p in enumerate(prompts or PROMPTS)
    ]


def mask_of(shape: tuple[int, int], kept: Any) -> torch.Tensor:
    mask = torch.zeros(shape)
    for layer, units in enumerate(kept):
        mask[layer, list(units)] = 1
    return mask


def gates(decoder: Decoder, heads: Any, neurons: Any) -> Units:
    return Units(mask_of(decoder.head_shape, heads), mask_of(decoder.neuron_shape, neurons))


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    batch = collate(rows_of())
    out: torch.Tensor = decoder.model(**batch.inputs).logits
    return out[batch.attention_mask.bool()]


def state(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss(decoder: Decoder, rows: list[Encoded]) -> float:
    return -sum(answer_sums(decoder, rows, OPTIONS)) / len(rows)


SCHEDULE = Schedule(
    keep_share=0.6,
    round_tuning=Tuning(steps=2, batch=4, rank=2, warmup=1),
    final_tuning=Tuning(steps=3, batch=4, rank=2, warmup=1),
)


def rounds_of(
    decoder: Decoder,
    rows: list[Encoded],
    workspace: Workspace | None = None,
    method: str = "cna",
    schedule: Schedule = SCHEDULE,
    **more: Any,
) -> Rounds:
    work = workspace or Workspace()
    return Rounds(decoder, rows, method, OPTIONS, schedule, work, teacher=Teacher(decoder), **more)


def counts_of(decoder: Decoder) -> tuple[int, int]:
    return sum(map(len, decoder.layout.heads)), sum(map(len, decoder.layout.neurons))


def fewer(decoder: Decoder) -> Any:
    """What makes the model with some of its neurons, the others replaced by zero."""
    return lambda kept: shrink(decoder, decoder.layout.heads, kept, None, OPTIONS)
