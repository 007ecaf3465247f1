"""Teacher: the dense model's states, which tuning leads the pruned model back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.decoder import Decoder
from prune_edit.hooks import answers_only
from prune_edit.tasks.prompts import Encoded, collate

_TEACHER_BATCH = 16  # examples of like lengths a pass
_CACHED_NUMBERS = 1 << 27  # of a teacher's states: 512 MB


class Teacher:
    """The dense model's states where answer tokens are predicted, each computed once.

    Those in the residual stream after some layers, and the final ones: a model that lost most of
    its heads goes astray long before the end, and the end alone does not tell it where.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers = matched_layers(decoder.n_layers)
        self._found: dict[Encoded, torch.Tensor] = {}
        self._groups: dict[Encoded, list[Encoded]] = {}

    def expect(self, rows: Sequence[Encoded]) -> None:
        """Fix which rows run together, of those that will be asked for and fit into memory.

        A state's last bits depend on what shares its batch. So that a run that was killed goes on
        with the same numbers, that must not depend on what was asked for before.
        """
        if self._groups:
            return
        order = sorted(dict.fromkeys(rows), key=lambda row: (len(row.ids), row.ids, row.start))
        each = (len(self.layers) + 1) * self.decoder.unembedding.shape[1]
        room, kept = _CACHED_NUMBERS, 0
        while kept < len(order) and room >= len(order[kept].answer) * each:
            room -= len(order[kept].answer) * each
            kept += 1
        for start in range(0, kept, _TEACHER_BATCH):
            group = order[start : min(kept, start + _TEACHER_BATCH)]
            self._groups |= dict.fromkeys(group, group)

    @torch.no_grad()
    def states(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """(A, S, D) for the answer tokens of all rows in turn, on the decoder's device.

        S are `layers` and the final states.
        """
        passing = []
        for row in dict.fromkeys(rows):
            if row not in self._groups:
                passing.append(row)
            elif row not in self._found:
                self._found |= self._run(self._groups[row])
        passing.sort(key=lambda row: (len(row.ids), row.ids, row.start))
        known: dict[Encoded, torch.Tensor] = {}
        for start in range(0, len(passing), _TEACHER_BATCH):
            known |= self._run(passing[start : start + _TEACHER_BATCH])
        return torch.cat([self._found[row] if row in self._found else known[row] for row in rows])

    @torch.no_grad()
    def log_probs(self, finals: torch.Tensor) -> torch.Tensor:
        """The dense model's log probabilities (A, V) at its final states (A, D), float32."""
        logits = self.decoder.unembed(finals.to(self.decoder.model.dtype))
        return logits.float().log_softmax(-1)

    def _run(self, rows: list[Encoded]) -> dict[Encoded, torch.Tensor]:
        batch = collate(rows).to(self.decoder.device)
        with answers_only(self.decoder, batch, self.layers) as inner:
            final = self.decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        states = torch.stack([*(inner[layer] for layer in self.layers), final], 1).float()
        parts = states.split([len(row.answer) for row in rows])
        return {row: part.clone() for row, part in zip(rows, parts, strict=True)}


def matched_layers(count: int) -> tuple[int, ...]:
    """The layers of `count` whose results a tuned model is to match: at most six, evenly placed.

    Not those of the first quarter, where heads that were removed did their work at other positions.
    """
    first, most = count // 4, 6
    step = max(1.0, (count - first) / most)
    places = {count - 1 - round(i * step) for i in range(most)}
    return tuple(sorted(place for place in places if place >= first))
