"""Remove units from a model in memory, replacing them by zero or by their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_edit.checkpoint.compensation import Compensation
from prune_edit.checkpoint.slim import slim_config, slim_tensors
from prune_edit.checkpoint.write import build_model
from prune_edit.decoder import Decoder
from prune_edit.layout import Kept
from prune_edit.running import Running
from prune_edit.scoring.statistics import moments
from prune_edit.streamed import resident
from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Encoded


def shrink(
    decoder: Decoder,
    heads: Kept,
    neurons: Kept,
    prompts: Sequence[Encoded] | None,
    options: Running,
) -> Decoder:
    """The model with only these units, physically smaller; unit numbers stay the base model's.

    With `prompts`, a removed unit is replaced by its mean over their tokens: the heads first, then
    the neurons by their means in the model without those heads. Without, by zero.
    """
    have = decoder.layout
    if prompts is not None and heads != have.heads and neurons != have.neurons:
        decoder = shrink(decoder, heads, have.neurons, prompts, options)
    if (heads, neurons) == (decoder.layout.heads, decoder.layout.neurons):
        return decoder
    compensation = None
    if prompts is not None:
        compensation = mean_compensation(decoder, heads, neurons, prompts, options)
    return _resized(decoder, heads, neurons, compensation)


def hollow(decoder: Decoder, heads: Kept) -> Decoder:
    """The model with only these heads, and biases of zero where the others may leave a constant."""
    nothing = (None,) * decoder.n_layers
    return _resized(decoder, heads, decoder.layout.neurons, Compensation(nothing, nothing))


def without_dead(decoder: Decoder) -> Decoder:
    """A masked or uniform checkpoint's model without the units that are zero in it.

    So that a pruned model's budgets count what it still has, whatever its format. A uniform one's
    units are numbered by their places in it. Any other model is left as it is.
    """
    block = getattr(decoder.model.config, "prune_edit", None) or {}
    names = {"masked": ("heads", "neurons"), "uniform": ("alive_heads", "alive_neurons")}
    if block.get("format") not in names or not decoder.layout.full:
        return decoder
    heads, neurons = (tuple(map(tuple, block[name])) for name in names[block["format"]])
    if (heads, neurons) == (decoder.layout.heads, decoder.layout.neurons):
        return decoder
    return _resized(decoder, heads, neurons, None)


def _resized(
    decoder: Decoder, heads: Kept, neurons: Kept, compensation: Compensation | None
) -> Decoder:
    have = decoder.layout
    want = have.keep(heads, neurons)
    config = decoder.model.config.to_dict()
    fields = slim_config(
        config,
        decoder.family,
        have,
        want,
        output_bias=compensation is not None,
        provenance={},
    )
    state = decoder.model.state_dict()
    tensors = dict(slim_tensors(decoder.family, state, have, want, compensation))
    return decoder.with_model(build_model(fields, tensors))


@torch.no_grad()
def mean_compensation(
    decoder: Decoder, heads: Kept, neurons: Kept, prompts: Sequence[Encoded], options: Running
) -> Compensation:
    """What the units outside `heads` and `neurons` add on average: (D,) per layer and block.

    The mean is over all tokens of the prompts, padding left out; of several tasks, the mean of
    theirs by weight.
    """
    seen = [
        (share, moments(decoder, rows, options, "means")) for _, share, rows in by_part(prompts)
    ]
    attention: list[torch.Tensor | None] = []
    ffn: list[torch.Tensor | None] = []
    for layer in range(decoder.n_layers):
        head_kept = _among(decoder.head_slots[layer], heads[layer])
        head_kept = head_kept.repeat_interleave(decoder.head_dim)
        neuron_kept = _among(decoder.neuron_slots[layer], neurons[layer])
        for made, part, projection, kept in (
            (attention, "heads", decoder.attention_output(layer), head_kept),
            (ffn, "neurons", decoder.ffn_output(layer), neuron_kept),
        ):
            if projection is None or bool(kept.all()):
                made.append(None)
                continue
            mean = torch.stack([share * each.mean(part, layer) for share, each in seen]).sum(0)
            gone = ~kept.to(mean.device)
            with resident(decoder, layer):
                weight = decoder.output_weight(projection).detach().double().cpu()
            made.append((mean[gone] @ weight[gone]).float())
    return Compensation(tuple(attention), tuple(ffn))


def _among(slots: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Which physical slots hold a kept unit."""
    return torch.isin(slots, torch.tensor(list(kept), dtype=torch.long))
