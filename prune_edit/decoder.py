"""Decoder: one face for every model family, and the only door into a Hugging Face model.

B batch, T positions, L layers, H query heads, D hidden, E head_dim, N FFN width, V vocabulary.
Units are numbered as in the base model, also where a pruned model no longer has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune_edit.checkpoint.layout import Layout, head_dim
from prune_edit.checkpoint.store import model_digest
from prune_edit.errors import ModelError
from prune_edit.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_MODEL = Path(__file__).parent / "reference_model"


@dataclass(frozen=True)
class Decoder:
    """A causal language model, its tokenizer, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str = ""
    digest: str = ""

    @cached_property
    def family(self) -> Family:
        """The row of the table of families."""
        return family_of(self.model.config.model_type)

    @cached_property
    def layout(self) -> Layout:
        """Which of the base model's units are there."""
        return Layout.of_config(self.model.config)

    @property
    def n_layers(self) -> int:
        """L."""
        return self.layout.n_layers

    @property
    def head_shape(self) -> tuple[int, int]:
        """(L, H) of the base model."""
        return self.layout.n_layers, self.layout.n_heads

    @property
    def neuron_shape(self) -> tuple[int, int]:
        """(L, N) of the base model."""
        return self.layout.n_layers, self.layout.n_neurons

    @cached_property
    def head_dim(self) -> int:
        """E."""
        return head_dim(self.model.config.to_dict(), self.family)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def max_positions(self) -> int | None:
        """The longest input, or None where the configuration sets no limit."""
        return getattr(self.model.config, self.family.positions_key, None)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The L decoder layers."""
        return list(self.module(self.family.layers).children())

    def module(self, path: str) -> nn.Module:
        """A module of the model by path."""
        return self.model.get_submodule(path)

    def attention_output(self, layer: int) -> nn.Module | None:
        """The projection that reads the layer's heads, (B, T, slots * E); None without heads."""
        if not self.layout.slots[layer]:
            return None
        return self.layers[layer].get_submodule(self.family.attention_output)

    def ffn_output(self, layer: int) -> nn.Module | None:
        """The projection that reads the coefficients, (B, T, n); None without neurons."""
        if not self.layout.neurons[layer]:
            return None
        return self.layers[layer].get_submodule(self.family.ffn_output)

    def ffn_norm(self, layer: int) -> nn.Module:
        """The norm whose input is the residual output, eq. 1's x + A."""
        return self.layers[layer].get_submodule(self.family.ffn_norm)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        return self.module(self.family.final_norm)

    @cached_property
    def head_slots(self) -> list[torch.Tensor]:
        """Per layer, the base index of every physical head slot; -1 for a pad."""
        return [
            torch.tensor([-1 if slot is None else slot for slot in slots], dtype=torch.long)
            for slots in self.layout.slots
        ]

    @cached_property
    def neuron_slots(self) -> list[torch.Tensor]:
        """Per layer, the base index of every physical neuron."""
        return [torch.tensor(kept, dtype=torch.long) for kept in self.layout.neurons]

    def output_weight(self, projection: nn.Module) -> torch.Tensor:
        """A projection's weight as (in, D)."""
        weight: torch.Tensor = projection.weight  # type: ignore[assignment]
        return weight if self.family.transposed else weight.T

    def values(self, layer: int) -> torch.Tensor:
        """The value (fc2) vectors of the layer's neurons, (n, D)."""
        projection = self.ffn_output(layer)
        assert projection is not None
        return self.output_weight(projection).detach()

    @property
    def unembedding(self) -> torch.Tensor:
        """(V, D)."""
        weight: torch.Tensor = self.module(self.family.unembedding).weight  # type: ignore[assignment]
        return weight.detach()

    def final_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """States after the final norm, (B, T, D): the model without its unembedding."""
        states: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def unembed(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of normed states (..., D)."""
        logits: torch.Tensor = self.module(self.family.unembedding)(states)
        return logits

    def frozen_norm(self, final: torch.Tensor) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
        """The final norm with its scale frozen at the states `final` (P, D).

        Returns the linear part, a function of (..., D) vectors that leaves out the division, and
        the divisors (P, 1). The norm of x is `linear(x) / divisor + bias`, a bias that cancels
        wherever two logits of one position are compared at equal shifts.
        """
        norm: Any = self.final_norm
        weight = norm.weight.detach().float()
        final = final.float()
        if self.family.rms_norm:
            epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
            divisor = (final.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
            return (lambda x: x.float() * weight), divisor
        divisor = (final.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        return (lambda x: (x.float() - x.float().mean(-1, keepdim=True)) * weight), divisor

    def norm_bias(self) -> torch.Tensor | None:
        """The final norm's bias (D,), where it has one."""
        bias = getattr(self.final_norm, "bias", None)
        return None if bias is None else bias.detach().float()

    def parameters_count(self) -> int:
        """Distinct parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def with_model(self, model: PreTrainedModel) -> Decoder:
        """The same tokenizer, origin and device with another model, in evaluation mode."""
        placed: Any = model  # the stubs of `to` want a model where it takes a device
        return Decoder(placed.to(self.device).eval(), self.tokenizer, self.source, self.digest)


def load_decoder(
    source: str | Path | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> Decoder:
    """Load a folder or hub id; without one, the bundled reference model.

    Raises ModelError, UnsupportedFamilyError for an architecture without a row, and
    UnsafeCheckpointError where the only weights are pickles.
    """
    place = str(REFERENCE_MODEL if source is None else source)
    if _looks_like_a_path(place):
        digest = model_digest(Path(place))
        return Decoder(*_from_pretrained(place, device, dtype), place, digest)
    model, tokenizer = _from_pretrained(place, device, dtype)
    # A hub model is what its commit says it is.
    commit = str(getattr(model.config, "_commit_hash", "") or "")
    return Decoder(model, tokenizer, place, f"{place}@{commit}")


def _looks_like_a_path(place: str) -> bool:
    return place.startswith((".", "/", "~")) or place.count("/") != 1 or Path(place).exists()


def _from_pretrained(
    place: str, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from prune_edit.modeling import register

    register()
    _check_device(device)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"dtype {dtype!r} is unknown; give float32, bfloat16 or float16")
    with _one_line_errors(place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        family_of(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=kind,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        # Stock code initialises missing tensors at random and only logs.
        if report["missing_keys"] or report["mismatched_keys"]:
            lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ModelError(
                f"model {place}: weights do not fill the architecture (first: {lacking[0]}); "
                "get a whole copy of the checkpoint"
            )
        return model.to(device).eval(), tokenizer


def _check_device(device: str) -> None:
    """Raise ModelError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used: {first}; give --device cpu") from None


class _one_line_errors(AbstractContextManager["_one_line_errors"]):  # noqa: N801
    """Turn whatever the libraries raise while loading into one ModelError line."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise ModelError(
                f"model {self.place} cannot be loaded: {first.strip()}; give a folder with "
                "config.json, tokenizer files and safetensors weights, or a hub id"
            ) from error


@dataclass(frozen=True)
class Replay:
    """What a forward pass gave each layer, so that any layer and those after it can run again."""

    decoder: Decoder
    states: list[torch.Tensor]  # per layer, its input (B, T, D)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # the layer's other arguments

    def run(self, layer: int, copies: int) -> torch.Tensor:
        """Final normed states (B * copies, T, D) from `layer` on, every example `copies` times."""
        batch = self.states[layer].shape[0]

        def repeat(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch > 1:
                return value.repeat_interleave(copies, 0)
            if isinstance(value, tuple):
                return tuple(map(repeat, value))
            return value

        states = self.states[layer].repeat_interleave(copies, 0)
        for module, (args, kwargs) in zip(
            self.decoder.layers[layer:], self.calls[layer:], strict=True
        ):
            states = module(states, *map(repeat, args), **{k: repeat(v) for k, v in kwargs.items()})
            states = states[0] if isinstance(states, tuple) else states
        normed: torch.Tensor = self.decoder.final_norm(states)
        return normed


def record(decoder: Decoder, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Replay]:
    """Run the model once; its final states (B, T, D) and what is needed to replay it."""
    states: list[torch.Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        first = args[0] if args else rest.pop("hidden_states")
        states.append(first)
        calls.append((args[1:], rest))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers]
    try:
        final = decoder.final_states(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return final, Replay(decoder, states, calls)
