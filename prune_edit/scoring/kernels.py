"""The pieces of a lean forward pass: buffers, norms, rotary angles, the vocabulary's log sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from prune_edit.decoder import Decoder

_LOGITS = 4 << 20  # bytes of logits in a block on a CPU
_FAR = 60.0  # base-2 logits below this need no shift before they are summed


@dataclass
class Workspace:
    """Buffers that are used again: fresh memory costs more than the sums made in it."""

    like: torch.Tensor
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised tensor; what was taken under the same name before is void."""
        size = math.prod(shape)
        have = self.kept.get(name)
        if have is None or have.numel() < size:
            have = self.kept[name] = self.like.new_empty(size)
        return have[:size].view(shape)


def workspace(decoder: Decoder) -> Workspace:
    """An empty one, of the model's kind and place."""
    return Workspace(decoder.unembedding.new_empty(0))


def divisor(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One over the root mean square, (rows, 1)."""
    squares: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return squares.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


class Angles:
    """Rotary angles of a forest's rows."""

    def __init__(self, decoder: Decoder, depths: torch.Tensor) -> None:
        cosines, sines = decoder.rotary(int(depths.max()) + 1)
        self.size, places = decoder.head_dim, depths.flatten()
        dtype = decoder.model.dtype
        self.paired = dtype in (torch.float32, torch.float64)
        if self.paired:
            half = self.size // 2
            turns = torch.complex(cosines[:, :half].to(dtype), sines[:, :half].to(dtype))
            self.turns = turns[places]  # (R, E / 2)
        else:
            self.cosines, self.sines = (t.to(dtype)[places] for t in (cosines, sines))
        self.wide: dict[tuple[int, bool], torch.Tensor] = {}

    def rotate(self, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Turn (copies, R, heads * E) in place; `rows` says which rows they are, None all."""
        heads = x.shape[-1] // self.size
        if self.paired:
            key = heads, rows is None
            if key not in self.wide:
                turns = self.turns if rows is None else self.turns[rows]
                self.wide[key] = turns.repeat(1, heads)
            torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(self.wide[key])
            return
        cosines, sines = self.cosines[:, None], self.sines[:, None]
        if rows is not None:
            cosines, sines = cosines[rows], sines[rows]
        split = x.unflatten(-1, (heads, self.size))
        turned = torch.cat((-split[..., self.size // 2 :], split[..., : self.size // 2]), -1)
        split.mul_(cosines).add_(turned.mul_(sines))


def log_sum(states: torch.Tensor, weight: torch.Tensor, space: Workspace) -> torch.Tensor:
    """Log of the sum of the exponentials of the logits, (rows,).

    In base 2, whose exponential is the cheaper one, and without a shift where no logit is so
    large that it needs one.
    """
    rows = min(len(states), 512)
    step = max(64, _LOGITS // 4 // rows)
    states = states * math.log2(math.e)
    found = []
    for part in states.split(rows):
        sums: list[torch.Tensor] = []
        shift: torch.Tensor | None = None
        for some in weight.split(step):
            logits = torch.mm(part, some.T, out=space.take("logits", len(part), len(some)))
            if not sums and float((peak := logits.amax(-1, keepdim=True)).abs().max()) > _FAR:
                shift = peak
            if shift is not None:
                logits.sub_(shift)
            sums.append(logits.exp2_().sum(-1))
        total = torch.stack(sums).sum(0)
        if bool(((total > 2**-_FAR) & (total < 2**_FAR)).all()):
            base = total.log2_() if shift is None else total.log2_().add_(shift[:, 0])
            found.append(base.mul_(math.log(2)))
        else:  # the first logits were no measure of the others
            found.append((part @ weight.T).mul_(math.log(2)).logsumexp(-1))
    return torch.cat(found)
