"""Decoder: one face for every model family, and the only door into a Hugging Face model.

B batch, T positions, L layers, H query heads, D hidden, E head_dim, N FFN width, V vocabulary.
Units are numbered as in the base model, also where a pruned model no longer has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune_edit.families import Family, family_of
from prune_edit.layout import Layout, head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    def work(self) -> int:
        """Bytes that may be taken at once for what neurons do to the vocabulary.

        The same for the same machine, so that its sums are rounded alike.
        """
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory) // 16
        return 512 << 20

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

    def attention(self, layer: int) -> nn.Module:
        """The attention module, whose (first) output is A where nothing comes after it."""
        return self.layers[layer].get_submodule(self.family.attention)

    def ffn_norm(self, layer: int) -> nn.Module | None:
        """What reads the residual output, eq. 1's x + A; None where the FFN does not wait for A."""
        path = self.family.ffn_norm
        return None if path is None else self.layers[layer].get_submodule(path)

    def ffn_reader(self, layer: int) -> nn.Module:
        """What reads the stream for the FFN: its norm, or the FFN itself where it has none."""
        found = self._first(layer, self.family.ffn_reads)
        assert found is not None
        return found

    def attention_norm(self, layer: int) -> nn.Module | None:
        """The norm that attention reads the stream through, where there is one."""
        return self._first(layer, self.family.attention_norms)

    def attention_output_norm(self, layer: int) -> nn.Module | None:
        """The norm that attention's output passes on its way to the residual, if there is one."""
        path = self.family.attention_output_norm
        return None if path is None else self.layers[layer].get_submodule(path)

    def _first(self, layer: int, paths: Sequence[str]) -> nn.Module | None:
        there = dict(self.layers[layer].named_modules())
        return next((there[path] for path in paths if path in there), None)

    def ffn_output_norm(self, layer: int) -> nn.Module | None:
        """The norm that the FFN's output passes on its way to the residual, where there is one."""
        path = self.family.ffn_output_norm
        return None if path is None else self.layers[layer].get_submodule(path)

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

    def residual_values(self, layer: int) -> torch.Tensor:
        """What the layer's neurons add to the residual stream per effective coefficient, (n, D).

        Their values, through the linear part of the FFN's output norm where there is one; its
        divisor is in the effective coefficients (`Captured.effective`).
        """
        norm, values = self.ffn_output_norm(layer), self.values(layer)
        return values if norm is None else values.float() * self.norm_weight(norm)

    @property
    def unembedding(self) -> torch.Tensor:
        """(V, D), with the projection between final norm and unembedding (some OPT) folded in."""
        weight: torch.Tensor = self.module(self.family.unembedding).weight  # type: ignore[assignment]
        projection = self._final_projection
        weight = weight if projection is None else weight @ projection.weight
        return weight.detach()

    @property
    def _final_projection(self) -> Any:
        path = self.family.final_projection
        if path is None:
            return None
        parent, _, name = path.rpartition(".")
        return getattr(self.module(parent), name, None)

    @property
    def softcap(self) -> float | None:
        """The cap c of `c * tanh(logits / c)`, or None."""
        key = self.family.softcap_key
        return getattr(self.model.config, key, None) if key else None

    def final_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """States after the final norm, (B, T, D): the model without its unembedding."""
        states: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def unembed(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of final states (..., D): the model's own, bias and cap included."""
        logits: torch.Tensor = self.module(self.family.unembedding)(states)
        return self.cap(logits)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits from what the unembedding gives."""
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Final states of the last layer's output: the final norm and what may follow it."""
        normed: torch.Tensor = self.final_norm(states)
        projection = self._final_projection
        finished: torch.Tensor = normed if projection is None else projection(normed)
        return finished

    def frozen_norm(self, final: torch.Tensor) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
        """The final norm with its scale frozen at the states `final` (P, D).

        Returns the linear part, a function of (..., D) vectors that leaves out the division, and
        the divisors (P, 1). The norm of x is `linear(x) / divisor + norm_bias`.
        """
        weight = self.norm_weight(self.final_norm)
        divisor = self.norm_divisor(self.final_norm, final)
        if self.family.rms_norm:
            return (lambda x: x.float() * weight), divisor
        return (lambda x: (x.float() - x.float().mean(-1, keepdim=True)) * weight), divisor

    def norm_weight(self, norm: Any) -> torch.Tensor | float:
        """What a norm multiplies the normalised vector by, (D,); 1 for one without weights."""
        if norm.weight is None:
            return 1.0
        weight: torch.Tensor = norm.weight.detach().float()
        return weight + self.family.norm_offset

    def norm_divisor(self, norm: Any, inputs: torch.Tensor) -> torch.Tensor:
        """What a norm of the family's kind divides its inputs (..., D) by, (..., 1)."""
        inputs = inputs.float()
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
        if self.family.rms_norm:
            return (inputs.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        return (inputs.var(-1, keepdim=True, unbiased=False) + epsilon).sqrt()

    def norm_bias(self) -> torch.Tensor | None:
        """The final norm's bias (D,), where it has one."""
        bias = getattr(self.final_norm, "bias", None)
        return None if bias is None else bias.detach().float()

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (length, E) of the rotary positions from 0, float32.

        Only for families with a rotary module.
        """
        assert self.family.rotary is not None
        places = torch.arange(length, device=self.device)[None]
        like = torch.zeros(1, device=self.device)
        cosines, sines = self.module(self.family.rotary)(like, places)
        return cosines[0], sines[0]

    @property
    def rotary_kind(self) -> str | None:
        """How rotary angles are made, such as `default` or `yarn`; None where there are none."""
        path = self.family.rotary
        if path is None or path not in dict(self.model.named_modules()):
            return None
        kind = getattr(self.module(path), self.family.rotary_key, None)
        return None if kind is None else str(kind)

    @property
    def activation(self) -> str | None:
        """The name of the FFN's activation function."""
        name = getattr(self.model.config, self.family.activation_key, None)
        return None if name is None else str(name)

    def sights(self) -> list[int | None] | None:
        """Positions that each layer's attention sees, its own included, None for all.

        None altogether where the configuration does not tell.
        """
        config, family = self.model.config, self.family
        window = getattr(config, family.window_key, None)
        kinds = getattr(config, family.kinds_key, None)
        if kinds is None:
            known = window is None or family.all_sliding
            return [window] * self.n_layers if known else None
        table = {"full_attention": None, "sliding_attention": window}
        return [table[kind] for kind in kinds] if set(kinds) <= set(table) else None

    def logit_constant(self) -> torch.Tensor | None:
        """What every logit has whatever the state: the norm's and the unembedding's bias, (V,)."""
        shift = self.norm_bias()
        bias = getattr(self.module(self.family.unembedding), "bias", None)
        parts = [] if shift is None else [self.unembedding.float() @ shift]
        parts += [] if bias is None else [bias.detach().float()]
        return sum(parts) if parts else None  # type: ignore[return-value]

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Attention computed plainly meanwhile, so that its patterns can be seen."""
        usual = self.model.config._attn_implementation
        self._attend_by("eager")
        try:
            yield
        finally:
            self._attend_by(usual)

    def _attend_by(self, how: str) -> None:
        if self.model._can_set_attn_implementation():
            self.model.set_attn_implementation(how)
        else:  # Falcon asks the configuration each time, but refuses to be told
            self.model.config._attn_implementation = how

    def parameters_count(self) -> int:
        """Distinct parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def with_model(self, model: PreTrainedModel) -> Decoder:
        """The same tokenizer, origin and device with another model, in evaluation mode."""
        placed: Any = model  # the stubs of `to` want a model where it takes a device
        return Decoder(placed.to(self.device).eval(), self.tokenizer, self.source, self.digest)
