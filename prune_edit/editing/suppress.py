"""Scale neurons in the weights: what the FFN output projection reads of them."""

from __future__ import annotations

import copy

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import BudgetError
from prune_edit.layout import Kept


@torch.no_grad()
def scale_neurons(decoder: Decoder, neurons: Kept, factor: float) -> Decoder:
    """A copy of the model with the neurons' value vectors multiplied by `factor`.

    Raises BudgetError where they leave the number format.
    """
    edited = decoder.with_model(copy.deepcopy(decoder.model))
    for layer, units in enumerate(neurons):
        projection = edited.ffn_output(layer)
        if projection is None or not units:
            continue
        slots = torch.isin(edited.neuron_slots[layer], torch.tensor(units))
        weight = edited.output_weight(projection)
        weight[slots.to(weight.device)] *= factor
        if not weight.isfinite().all():
            raise BudgetError(
                f"--scale {factor:g} takes weights of layer {layer} beyond what "
                f"{str(weight.dtype).removeprefix('torch.')} can hold; give a smaller one"
            )
    return edited
