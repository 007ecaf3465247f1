"""Write an edit into a checkpoint's weights.

Tensors are read from the source folder and stay in its number format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_edit.arrange import Canonical, tensor_name
from prune_edit.checkpoint.slim import output_biases
from prune_edit.checkpoint.stock import stocks
from prune_edit.checkpoint.store import open_tensors
from prune_edit.decoder import Decoder
from prune_edit.editing.edit import Change, Edit
from prune_edit.editing.raw import packed
from prune_edit.errors import EditError, PlanError


class EditedTensors(Mapping[str, torch.Tensor]):
    """A model's tensors with the edit's changes, each made when it is asked for."""

    def __init__(self, decoder: Decoder, source: Mapping[str, torch.Tensor], edit: Edit) -> None:
        self._decoder = decoder
        self._source = Canonical(decoder.family, source)
        self._edit = edit
        self.places = places(decoder, edit)
        self._biases = self._shifts() if edit.constants is not None else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._biases:
            like = self._source[f"{self._decoder.family.final_norm}.weight"]
            found = self._source[name] if name in self._source else torch.zeros_like(like)
            return (found.double() + self._biases[name]).to(found.dtype)
        tensor = self._source[name]
        if name in self.places:
            tensor = tensor.clone()
            for change, part in self.places[name]:
                columns = _columns(self._decoder, tensor)[part]
                columns.copy_((columns.double() * change.factor).to(tensor.dtype))
            if not tensor.isfinite().all():
                raise EditError(
                    f"the edit takes {name} beyond what {str(tensor.dtype).removeprefix('torch.')} "
                    "can hold; give a smaller --scale"
                )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._source, *self._biases}))

    def __len__(self) -> int:
        return len({*self._source, *self._biases})

    def __contains__(self, name: object) -> bool:
        return name in self._source or name in self._biases

    def originals(self) -> dict[str, list[dict[str, Any]]]:
        """Of every changed column its bytes as they were, by tensor, and biases as they were."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, some in self.places.items():
            columns = _columns(self._decoder, self._source[name])
            found[name] = [
                {"first": part.start, "last": part.stop, "bytes": packed(columns[part])}
                for _, part in some
            ]
        for name in self._biases:
            if name in self._source:
                found[name] = [{"bytes": packed(self._source[name])}]
        return found

    def _shifts(self) -> dict[str, torch.Tensor]:
        """The output bias that every layer's constants add up to, (D,) float64, by name."""
        decoder, constants = self._decoder, self._edit.constants
        assert constants is not None
        biased = output_biases(decoder.model.config.to_dict(), decoder.family)[1]
        found = {}
        for layer in range(decoder.n_layers):
            name = tensor_name(decoder.family, layer, decoder.family.ffn_output, "bias")
            weight = tensor_name(decoder.family, layer, decoder.family.ffn_output, "weight")
            own = constants[layer][decoder.neuron_slots[layer]].double()
            if own.any():
                columns = _columns(decoder, self._source[weight]).double()
                found[name] = own @ columns.to(own.device)
            elif not biased:
                like = self._source[f"{decoder.family.final_norm}.weight"]
                found[name] = torch.zeros(like.shape, dtype=torch.float64)
        return found


def places(decoder: Decoder, edit: Edit) -> dict[str, list[tuple[Change, slice]]]:
    """By tensor, the changes with the rows of its (in, D) form that they concern."""
    found: dict[str, list[tuple[Change, slice]]] = {}
    family, size = decoder.family, decoder.head_dim
    for change in edit.changes:
        head = change.kind == "head"
        slots = (decoder.head_slots if head else decoder.neuron_slots)[change.layer].tolist()
        at = slots.index(change.unit)
        part = slice(at * size, (at + 1) * size) if head else slice(at, at + 1)
        path = family.attention_output if head else family.ffn_output
        name = tensor_name(family, change.layer, path, "weight")
        found.setdefault(name, []).append((change, part))
    return found


def _columns(decoder: Decoder, weight: torch.Tensor) -> torch.Tensor:
    """A projection's weight as (in, D), sharing its memory."""
    return weight if decoder.family.transposed else weight.T


def source_tensors(decoder: Decoder) -> Mapping[str, torch.Tensor]:
    """The model's tensors as its folder has them, or as they were loaded."""
    if Path(decoder.source).is_dir():
        return open_tensors(decoder.source)
    return {name: each.cpu() for name, each in decoder.model.state_dict().items()}


def written_config(decoder: Decoder, edit: Edit) -> dict[str, Any]:
    """The configuration of the edited model, before a format's own fields.

    Raises EditError where the edit moves neurons and the architecture has no output bias.
    """
    config: dict[str, Any] = decoder.model.config.to_dict()
    if edit.constants is not None:
        check_room(decoder)
        config["ffn_output_bias"] = True
    return config


def has_room(decoder: Decoder) -> bool:
    """Whether constants can be written: the FFN has an output bias, or a stock form could."""
    family = decoder.family
    if family.model_type != family.base_type:
        return True
    try:
        stocks({**decoder.model.config.to_dict(), "ffn_output_bias": True}, family)
    except PlanError:
        return False
    return True


def check_room(decoder: Decoder) -> None:
    """Raise EditError where constants cannot be written."""
    if not has_room(decoder):
        raise EditError(
            f"a {decoder.family.base_type} has no output biases, so its weights cannot hold what "
            "moves neurons (mean, clamp); take --suppress search, zero, scale or amplify, or edit "
            "the pruned model, whose format has room"
        )
