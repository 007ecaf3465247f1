"""Tune what stays: every kept weight in full, or LoRA with peft merged into them.

Both follow the dense model: beside the cross-entropy of the answers, the loss is the distance to
the dense model's states, after its layers and at the end, where answer tokens are predicted.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.hooks import answers_only, head_factors, scale
from prune_edit.recover.adapters import (
    Adapter,
    clear_adapters_pads,
    weights_digest,
    with_adapters,
)
from prune_edit.recover.draw import Draw
from prune_edit.recover.teacher import Teacher
from prune_edit.recover.watch import Watch, Watching
from prune_edit.scoring.options import Options
from prune_edit.tasks.prompts import Encoded, collate
from prune_edit.units import Units

KINDS = ("full", "lora")
FULL_LIMIT = 300_000_000  # parameters; tuning more in full takes more memory than people have

ADAPTER = "-adapter"  # behind a stage's name
SAVE_SECONDS = 20.0  # between the states that a killed run goes on from


@dataclass(frozen=True)
class Tuning:
    """How long and how hard to tune.

    `kind` is `full` (Muon for matrices, AdamW for the rest) or `lora` (AdamW, `rank`). After a
    warm-up the learning rate falls to `final_share` of itself; Muon's updates are scaled to AdamW's
    size, AdamW takes a quarter of the rate. `features` weighs the squared distance to the dense
    model's states, over their variance, after each matched layer, against the cross-entropy.

    `loss`: `both` of these; `cross-entropy`, of the answers alone; or `distil`, the divergence (KL)
    from the dense model's distribution where answers are predicted, and its states: no labels.
    LoRA goes on the `modules` (all, attention, ffn) of `layers` (None: all). Where it is `watched`,
    the best weights on validation are kept, and `patience` checks without gain (0: any number)
    end it.
    """

    steps: int
    kind: str = "full"
    batch: int = 128
    learning_rate: float | None = None  # of the kind: _RATES
    features: float = 64.0
    final_share: float = 0.02
    rank: int = 32
    warmup: int = 20
    parts: int = 2  # a step's examples go through in parts of like lengths
    loss: str = "both"
    layers: tuple[int, ...] | None = None
    modules: str = "all"
    watched: bool = False
    patience: int = 0


_RATES = {"full": 8e-3, "lora": 1e-2}
_PLAIN_SHARE = 0.25  # of the rate for embedding, norms and biases, which AdamW tunes


class Keeper(Protocol):
    """Where the state of a tuning under way is kept, so that a killed run goes on from it."""

    def save_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Keep tensors under a name, and what is to be said about them, whole or not at all."""

    def load_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """What was kept under a name."""


def tune(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    tuning: Tuning,
    options: Options,
    teacher: Teacher | None = None,
    what: str = "tuning",
    keeper: Keeper | None = None,
    stage: str = "tuning",
    watch: Watch | None = None,
) -> Decoder:
    """The model after tuning on the prompts' answers, on the same device; LoRA is merged.

    The loss is the mean cross-entropy of the answer tokens and, with a teacher (the dense model),
    the distance of the final states where they are predicted: a few tokens say little, a state says
    what the unembedding would need. Groups are drawn equally often, tasks by their weights. A
    `watched` tuning ends with the weights that were best on `watch`. Seeded; with a `keeper`, a
    killed run goes on from what is kept as `stage`, with the same numbers, and an adapter is kept
    as `stage`-adapter. Raises PlanError for a loss that needs the teacher where there is none, and
    for LoRA on projections that are all gone.
    """
    if tuning.steps <= 0:
        return decoder
    if tuning.loss == "distil" and teacher is None:
        raise PlanError("loss distil needs the dense model to learn from; give a teacher")
    before = decoder
    # Tuning changes the model in place; the caller's stays as it is.
    decoder = decoder.with_model(copy.deepcopy(decoder.model))
    if teacher is not None:
        teacher.expect(prompts)
    run = _Run(decoder, prompts, tuning, options, teacher, watch if tuning.watched else None)
    # Pads of grouped queries have no weights of their own; the gates keep tuning from waking them.
    with scale(decoder, Units(heads=torch.ones(decoder.head_shape))), torch.enable_grad():
        run.all_steps(what, keeper, stage)
    model, adapter = run.finish(keeper is not None, before)
    tuned = decoder.with_model(model)
    for parameter in tuned.model.parameters():
        parameter.requires_grad_(False)
    _clear_pads(tuned)
    if keeper is not None and adapter is not None:
        merged = weights_digest(tuned.model.state_dict())
        about = {"config": adapter.config, "base": adapter.base, "merged": merged}
        keeper.save_tensors(f"{stage}{ADAPTER}", adapter.tensors, about)
    return tuned


class _Run:
    """One tuning: parameters, optimizers, the draw of examples."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Encoded],
        tuning: Tuning,
        options: Options,
        teacher: Teacher | None,
        watch: Watch | None,
    ) -> None:
        self.decoder, self.tuning, self.options = decoder, tuning, options
        self.teacher = teacher
        self.watching = None
        if watch is not None:
            self.watching = Watching(watch, tuning.steps, tuning.patience)
        self.adapted = None
        if tuning.kind == "lora":
            self.adapted = with_adapters(
                decoder, tuning.rank, tuning.layers, tuning.modules, options.seed
            )
        if self.adapted is None:
            for parameter in decoder.model.parameters():
                parameter.requires_grad_(True)
        # No dropout: the seed decides the adapters' start and the draw, nothing else.
        decoder.model.eval()
        self.parameters = {
            name: parameter
            for name, parameter in decoder.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizers = _optimizers(decoder, self.parameters, tuning)
        self.draw = Draw(prompts, torch.Generator().manual_seed(options.seed))

    def all_steps(self, what: str, keeper: Keeper | None, stage: str) -> None:
        """Every step, or those that an earlier run left."""
        first = 0 if keeper is None else self._restore(keeper.load_tensors(stage))
        saved = time.monotonic()
        for step in range(self.tuning.steps):
            rows = self.draw.some(self.tuning.batch)
            if step < first:  # drawn again, so that the next are the same as without the break
                continue
            self._step(step, rows)
            stop = self._check(step + 1)
            self.options.progress(self._label(what), step + 1, self.tuning.steps)
            if stop:
                break
            if keeper is not None and time.monotonic() - saved > SAVE_SECONDS:
                keeper.save_tensors(stage, self._state(step + 1))
                saved = time.monotonic()
        if self.watching is not None:
            self.watching.take_best(self.parameters)

    def _check(self, done: int) -> bool:
        """Measure where that is due; whether tuning may stop."""
        watching = self.watching
        if watching is None or not watching.due(done):
            return False
        return watching.check(self.decoder, self.parameters, self.options)

    def _label(self, what: str) -> str:
        last = -1.0 if self.watching is None else self.watching.last
        return what if last < 0 else f"{what}, validation {last:.1%}"

    def _step(self, step: int, rows: list[Encoded]) -> None:
        rate = self.tuning.learning_rate or _RATES[self.tuning.kind]
        rate *= _schedule(step, self.tuning)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
        _accumulate(self.decoder, rows, self.tuning, self.teacher)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def finish(self, kept: bool, before: Decoder) -> tuple[Any, Adapter | None]:
        """The tuned model, adapters merged, and the adapter where it is to be kept."""
        if self.adapted is None:
            return self.decoder.model, None
        clear_adapters_pads(self.decoder)
        adapter = None
        if kept:
            adapter = Adapter.of(self.adapted, weights_digest(before.model.state_dict()))
        return self.adapted.merge_and_unload(), adapter

    def _state(self, step: int) -> dict[str, torch.Tensor]:
        found = {"step": torch.tensor(step)}
        found |= {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, state in optimizer.state_dict()["state"].items():
                found |= {f"state.{number}.{place}.{key}": value for key, value in state.items()}
        return found | (self.watching.state() if self.watching is not None else {})

    def _restore(self, found: dict[str, torch.Tensor] | None) -> int:
        """Take up what an earlier run kept; the steps it had done."""
        if found is None:
            return 0
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[f"weight.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            kept = optimizer.state_dict()
            for key, value in found.items():
                kind, _, rest = key.partition(".")
                if kind == "state" and rest.startswith(f"{number}."):
                    _, place, field = rest.split(".")
                    kept["state"].setdefault(int(place), {})[field] = value
            optimizer.load_state_dict(kept)
        if self.watching is not None:
            self.watching.restore(found, self.parameters)
        return int(found["step"])


def _optimizers(
    decoder: Decoder, parameters: dict[str, nn.Parameter], tuning: Tuning
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices in full tuning, AdamW for the rest."""
    inside = f"{decoder.family.layers}."
    matrices = [
        parameter
        for name, parameter in parameters.items()
        if tuning.kind == "full" and parameter.dim() == 2 and name.startswith(inside)
    ]
    others = [p for p in parameters.values() if all(p is not matrix for matrix in matrices)]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0))
    for optimizer in made:
        plain = tuning.kind == "full" and isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            group["share"] = _PLAIN_SHARE if plain else 1.0
    return made


def _accumulate(
    decoder: Decoder, rows: list[Encoded], tuning: Tuning, teacher: Teacher | None
) -> None:
    """Add the gradient of the loss over `rows`, in parts of like lengths to spare the padding."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    tokens = sum(len(row.answer) for row in rows)
    layers: tuple[int, ...] = ()
    wanted = weights = None
    distil = tuning.loss == "distil"
    if teacher is not None and (distil or (tuning.features and tuning.loss == "both")):
        layers, wanted = teacher.layers, teacher.states(rows)  # (A, S, D)
        spread = wanted.var((0, 2)).clamp(min=1e-8)
        weights = tuning.features / (spread * tokens * wanted.shape[-1])  # (S,)
    seen = 0
    size = math.ceil(len(rows) / tuning.parts)
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size]).to(decoder.device)
        with answers_only(decoder, batch, layers) as inner:
            final = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        logits = decoder.unembed(final).float()
        if distil and teacher is not None and wanted is not None:
            dense = teacher.log_probs(wanted[seen : seen + len(final), -1])
            own = logits.log_softmax(-1)
            loss = functional.kl_div(own, dense, reduction="sum", log_target=True) / tokens
        else:
            loss = functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens
        if wanted is not None and weights is not None:
            states = torch.stack([*(inner[layer] for layer in layers), final], 1).float()
            off = states - wanted[seen : seen + len(states)]
            seen += len(states)
            loss = loss + (off.square().sum((0, 2)) * weights).sum()
        loss.backward()


def _schedule(step: int, tuning: Tuning) -> float:
    """Warm-up, then cosine down to the final share."""
    if step < tuning.warmup:
        return (step + 1) / tuning.warmup
    progress = (step - tuning.warmup) / max(1, tuning.steps - tuning.warmup)
    return tuning.final_share + (1 - tuning.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _clear_pads(decoder: Decoder) -> None:
    """Zero what merging left in the output columns of pads."""
    ones = Units(heads=torch.ones(decoder.head_shape))
    for layer in range(decoder.n_layers):
        projection = decoder.attention_output(layer)
        factors = head_factors(decoder, ones, layer)
        if projection is not None and factors is not None:
            decoder.output_weight(projection).mul_(factors.to(decoder.device)[:, None])
