"""Tune what stays: LoRA with peft on every kept projection, merged into the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from prune_edit.decoder import Decoder
from prune_edit.families import Family
from prune_edit.hooks import head_factors, scale
from prune_edit.scoring.streaming import Options
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.units import Units

_TEACHER_BATCH = 32  # examples of like lengths a pass
_CACHED_NUMBERS = 1 << 26  # of a teacher's states: 256 MB


@dataclass(frozen=True)
class Tuning:
    """How long and how hard to tune."""

    steps: int
    batch: int = 128
    learning_rate: float = 1e-2
    features: float = 4.0  # weight of the distance to the dense model's final states
    final_share: float = 0.05  # of the learning rate, at the last step
    rank: int = 32
    warmup: int = 10
    parts: int = 4  # a step's examples go through in parts of like lengths


def tune(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    tuning: Tuning,
    options: Options,
    teacher: Teacher | None = None,
    what: str = "tuning",
) -> Decoder:
    """The model after LoRA tuning on the prompts' answers, adapters merged, on the same device.

    The loss is the cross-entropy of the answer tokens; with a teacher (the dense model), plus the
    mean squared distance of the final states where they are predicted, over the teacher's
    variance: a few tokens say little, a state says what the unembedding would need. Groups are
    drawn equally often. Seeded.
    """
    from peft import LoraConfig, get_peft_model

    if tuning.steps <= 0:
        return decoder
    # peft changes the model in place; the caller's stays as it is.
    decoder = decoder.with_model(copy.deepcopy(decoder.model))
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        config = LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.rank,
            target_modules=_projections(decoder),
            fan_in_fan_out=decoder.family.transposed,
        )
        adapted: Any = get_peft_model(decoder.model, config)
    adapted.eval()  # no dropout: the seed decides the adapters' start and the draw, nothing else
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=0.0)
    draw = _Draw(prompts, generator)
    # Pads of grouped queries have no weights of their own; the gates keep tuning from waking them.
    with scale(decoder, Units(heads=torch.ones(decoder.head_shape))):
        for step in range(tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * _schedule(step, tuning)
            _accumulate(decoder, draw.some(tuning.batch), tuning, teacher)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            options.progress(what, step + 1, tuning.steps)
    merged = decoder.with_model(adapted.merge_and_unload())
    for parameter in merged.model.parameters():
        parameter.requires_grad_(False)
    _clear_pads(merged)
    return merged


def _accumulate(
    decoder: Decoder, rows: list[Encoded], tuning: Tuning, teacher: Teacher | None
) -> None:
    """Add the gradient of the loss over `rows`, in parts of like lengths to spare the padding."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    tokens = sum(len(row.answer) for row in rows)
    wanted = teacher.states(rows) if teacher is not None and tuning.features else None
    weight = 0.0
    if wanted is not None:
        weight = tuning.features / float(wanted.var().clamp(min=1e-8)) / wanted.numel()
    seen = 0
    size = math.ceil(len(rows) / tuning.parts)
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size]).to(decoder.device)
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        logits = decoder.unembed(states).float()
        loss = functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens
        if wanted is not None:
            target = wanted[seen : seen + len(states)]
            seen += len(states)
            loss = loss + weight * functional.mse_loss(states.float(), target, reduction="sum")
        loss.backward()


class Teacher:
    """The dense model's final states where answer tokens are predicted, each computed once."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._found: dict[Encoded, torch.Tensor] = {}
        self._room = _CACHED_NUMBERS

    @torch.no_grad()
    def states(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """(A, D) for the answer tokens of all rows in turn, on the decoder's device."""
        known = {row: self._found[row] for row in rows if row in self._found}
        missing = [row for row in dict.fromkeys(rows) if row not in known]
        missing.sort(key=lambda row: len(row.ids))
        for start in range(0, len(missing), _TEACHER_BATCH):
            some = missing[start : start + _TEACHER_BATCH]
            batch = collate(some).to(self.decoder.device)
            states = self.decoder.final_states(**batch.inputs)[batch.rows, batch.columns].float()
            parts = states.split([len(row.answer) for row in some])
            for row, part in zip(some, parts, strict=True):
                known[row] = part
                if self._room >= part.numel():
                    self._found[row] = part.clone()
                    self._room -= part.numel()
        return torch.cat([known[row] for row in rows])


def _projections(decoder: Decoder) -> list[str]:
    """Full names of the projections that pruning touches and the model still has."""
    family: Family = decoder.family
    names = []
    for layer in range(decoder.n_layers):
        paths: set[str] = set()
        if decoder.attention_output(layer) is not None:
            paths |= {family.queries, family.keys, family.values, family.attention_output}
        if decoder.ffn_output(layer) is not None:
            paths |= {*family.ffn_inputs, family.ffn_output}
        names += [f"{family.layers}.{layer}.{path}" for path in sorted(paths)]
    return names


def _schedule(step: int, tuning: Tuning) -> float:
    """Warm-up, then cosine down to the final share."""
    if step < tuning.warmup:
        return (step + 1) / tuning.warmup
    progress = (step - tuning.warmup) / max(1, tuning.steps - tuning.warmup)
    return tuning.final_share + (1 - tuning.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class _Draw:
    """Examples without replacement, group after group, reshuffled when a group is used up."""

    def __init__(self, prompts: Sequence[Encoded], generator: torch.Generator) -> None:
        self.generator = generator
        groups: dict[str, list[Encoded]] = {}
        for row in prompts:
            groups.setdefault(row.example.group, []).append(row)
        self.groups = [groups[name] for name in sorted(groups)]
        self.queues: list[list[int]] = [[] for _ in self.groups]
        self.turn = 0

    def some(self, count: int) -> list[Encoded]:
        """The next `count` examples, the groups in turn."""
        picked = []
        for _ in range(count):
            group, queue = self.groups[self.turn], self.queues[self.turn]
            if not queue:
                queue += torch.randperm(len(group), generator=self.generator).tolist()
            picked.append(group[queue.pop()])
            self.turn = (self.turn + 1) % len(self.groups)
        return picked


@torch.no_grad()
def _clear_pads(decoder: Decoder) -> None:
    """Zero what merging left in the output columns of pads."""
    ones = Units(heads=torch.ones(decoder.head_shape))
    for layer in range(decoder.n_layers):
        projection = decoder.attention_output(layer)
        factors = head_factors(decoder, ones, layer)
        if projection is not None and factors is not None:
            decoder.output_weight(projection).mul_(factors.to(decoder.device)[:, None])
