"""The same changes to units that chance chose: what an edit must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit, applied
from prune_edit.editing.probe import Probe
from prune_edit.running import Running

DRAWS = 20


def random_edit(decoder: Decoder, edit: Edit, generator: torch.Generator) -> Edit:
    """As many heads and neurons, drawn from all that are there, changed as the edit changes its."""
    changes: list[Change] = []
    for kind, kept in (("head", decoder.layout.heads), ("neuron", decoder.layout.neurons)):
        there = [(layer, unit) for layer, units in enumerate(kept) for unit in units]
        some = edit.of(kind)
        drawn = torch.randperm(len(there), generator=generator)[: len(some)].tolist()
        changes += [
            replace(change, layer=there[at][0], unit=there[at][1])
            for change, at in zip(some, drawn, strict=True)
        ]
    return replace(edit, changes=tuple(changes))


@torch.no_grad()
def random_gaps(
    decoder: Decoder, edit: Edit, probes: Mapping[str, Probe], seed: int, options: Running
) -> dict[str, torch.Tensor]:
    """Each view's gaps after the edit of random units instead, a row a draw, (20, P) float64."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in probes}
    for draw in range(DRAWS):
        with applied(decoder, random_edit(decoder, edit, generator)):
            for name, probe in probes.items():
                found[name].append(probe.gaps(decoder).double())
        options.progress("random units", draw + 1, DRAWS)
    return {name: torch.stack(rows) for name, rows in found.items()}


def random_biases(
    decoder: Decoder, edit: Edit, probes: Mapping[str, Probe], seed: int, options: Running
) -> dict[str, list[float]]:
    """Each view's bias after the edit of random units instead, a value a draw."""
    found = random_gaps(decoder, edit, probes, seed, options)
    return {name: gaps.mean(1).tolist() for name, gaps in found.items()}
