"""Context managers that watch and scale units; no hook survives them, also not after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.tasks.prompts import Batch
from prune_edit.units import Units

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""A layer's arguments beside its states."""
Places = tuple[torch.Tensor, torch.Tensor]
"""Rows and columns (A,) of positions in a batch."""


@dataclass
class Captured:
    """What the last forward pass inside `capture` showed, per layer; absent blocks have no entry.

    `heads` (B, T, slots * E) is the attention output projection's input, `coefficients` (B, T, n)
    the FFN's; `residual` (B, T, D) is x + A, what the FFN's output is added to; `final` (B, T, D)
    the final norm's input. Where a norm stands between the FFN's output and the residual stream,
    `divisors` (B, T, 1) is what it divided by. Captured `at` some positions, (A, ...) of them all.
    """

    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    coefficients: dict[int, torch.Tensor] = field(default_factory=dict)
    residual: dict[int, torch.Tensor] = field(default_factory=dict)
    divisors: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None

    def effective(self, layer: int) -> torch.Tensor:
        """Coefficients of `Decoder.residual_values`: the FFN's output norm divided out.

        The norm's scale is that of this pass's real FFN output, so that the neurons' shares sum to
        what the block adds to the stream.
        """
        coefficients = self.coefficients[layer]
        divisor = self.divisors.get(layer)
        return coefficients if divisor is None else coefficients.float() / divisor


@contextmanager
def capture(decoder: Decoder, at: Places | None = None, heads: bool = True) -> Iterator[Captured]:
    """Keep what passes the units' doors, after any scaling by an enclosing `scale`.

    `at` keeps some positions only; without `heads`, theirs are not kept.
    """
    seen = Captured()
    shape: list[int] = []  # (B, T) of the pass

    def kept(value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        if value.dim() == 2 and len(shape) == 2:  # OPT hands its FFN all tokens in a row
            value = value.unflatten(0, shape)
        return value if at is None else value[at]

    def entering(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            shape[:] = states.shape[:2]
            if decoder.ffn_norm(layer) is None:
                seen.residual[layer] = kept(states)

        return hook

    def into(store: dict[int, torch.Tensor], layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            store[layer] = kept(args[0])

        return hook

    def attended(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            added = output[0] if isinstance(output, tuple) else output
            seen.residual[layer] = seen.residual[layer] + kept(added)

        return hook

    def divided(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.divisors[layer] = decoder.norm_divisor(module, kept(args[0]))

        return hook

    def final(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.final = kept(args[0])

    with ExitStack() as stack:

        def on(module: nn.Module | None, hook: Any, **options: Any) -> None:
            if module is not None:
                handle = module.register_forward_pre_hook(hook, **options)
                stack.callback(handle.remove)

        for layer in range(decoder.n_layers):
            on(decoder.layers[layer], entering(layer), with_kwargs=True)
            if heads:
                on(decoder.attention_output(layer), into(seen.heads, layer))
            on(decoder.ffn_output(layer), into(seen.coefficients, layer))
            on(decoder.ffn_output_norm(layer), divided(layer))
            if (reads := decoder.ffn_norm(layer)) is not None:
                on(reads, into(seen.residual, layer))
            else:
                handle = decoder.attention(layer).register_forward_hook(attended(layer))
                stack.callback(handle.remove)
        on(decoder.final_norm, final)
        yield seen


class _EnoughError(Exception):
    """A layer has run as far as it had to."""


@contextmanager
def before_ffn(decoder: Decoder, layer: int) -> Iterator[None]:
    """Stop a layer before its FFN, most of its work, and leave this context then.

    Where the FFN does not wait for attention, it runs all the same.
    """

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _EnoughError

    reads = decoder.ffn_norm(layer)
    handle = None if reads is None else reads.register_forward_pre_hook(stop)
    try:
        yield
    except _EnoughError:
        pass
    finally:
        if handle is not None:
            handle.remove()


@dataclass(frozen=True)
class Pattern:
    """A layer's attention: `weights` (B, slots, T, T) over what its values read (B, T, D)."""

    weights: torch.Tensor
    read: torch.Tensor


def attention_pattern(decoder: Decoder, layer: int, states: torch.Tensor, call: Call) -> Pattern:
    """The patterns with which a layer reads `states` (B, T, D); `call` are its other arguments.

    They must be those of a pass inside `Decoder.eager`, whose masks are whole.
    """
    seen: dict[str, torch.Tensor] = {}

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["read"] = args[0]

    def attended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["weights"] = output[1]

    values = decoder.layers[layer].get_submodule(decoder.family.values)
    with ExitStack() as stack:
        stack.enter_context(decoder.eager())
        stack.callback(values.register_forward_pre_hook(read).remove)
        stack.callback(decoder.attention(layer).register_forward_hook(attended).remove)
        stack.enter_context(before_ffn(decoder, layer))
        args, kwargs = call
        decoder.layers[layer](states, *args, **kwargs)
    return Pattern(seen["weights"], seen["read"])


@contextmanager
def scale(decoder: Decoder, units: Units) -> Iterator[None]:
    """Multiply every head and neuron by its factor at all positions; pads always by zero."""

    def multiply(factors: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_per_example(args[0], factors, lambda x, by: x * by), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            for module, factors in (
                (decoder.attention_output(layer), head_factors(decoder, units, layer)),
                (decoder.ffn_output(layer), neuron_factors(decoder, units, layer)),
            ):
                if module is not None and factors is not None:
                    handle = module.register_forward_pre_hook(multiply(factors))
                    stack.callback(handle.remove)
        yield


@contextmanager
def shift(decoder: Decoder, constants: torch.Tensor) -> Iterator[None]:
    """Add to every neuron its constant, (L, N) or (B, L, N), at all positions; after `scale`."""

    def add(by: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_per_example(args[0], by, lambda x, constant: x + constant), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer in range(decoder.n_layers):
            module = decoder.ffn_output(layer)
            by = neuron_factors(decoder, Units(neurons=constants), layer)
            if module is not None and by is not None:
                handle = module.register_forward_pre_hook(add(by))
                stack.callback(handle.remove)
        yield


@contextmanager
def answers_only(
    decoder: Decoder, batch: Batch, layers: Sequence[int] = ()
) -> Iterator[dict[int, torch.Tensor]]:
    """Run the layers above the last that attends only where the batch's answers are predicted.

    Yields what these `layers` give there, (A, D) each, gradients and all, once the model has run.
    Final states are right at `batch.rows, batch.columns` and may be zero elsewhere: a layer without
    attention sees one position at a time, so the others are of no use to it. A model with heads in
    its last layer runs as ever.
    """
    attending = [index for index, slots in enumerate(decoder.layout.slots) if slots]
    first = attending[-1] + 1 if attending else 0
    places = batch.rows, batch.columns
    found: dict[int, torch.Tensor] = {}
    shape: list[torch.Size] = []

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        shape[:] = [states.shape]
        states = states[places][None]  # (1, A, D)
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    def widen(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.new_zeros(shape[0]).index_put(places, output[0])

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found[layer] = states[0] if layer >= first else states[places]

        return hook

    with ExitStack() as stack:
        if first < decoder.n_layers:
            entering = decoder.layers[first].register_forward_pre_hook(narrow, with_kwargs=True)
            stack.callback(entering.remove)
            stack.callback(decoder.final_norm.register_forward_hook(widen).remove)
        for layer in layers:
            stack.callback(decoder.layers[layer].register_forward_hook(keep(layer)).remove)
        yield found


@contextmanager
def blend(
    projection: nn.Module, factors: torch.Tensor, constant: torch.Tensor | float
) -> Iterator[None]:
    """Let a projection read `factors * x + (1 - factors) * constant` instead of its input x.

    `factors` (channels,) or (B, 1, channels), `constant` (channels,): with factors of 0, a unit is
    replaced by a constant such as its mean.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shift = ((1 - factors.to(args[0].device)) * constant).to(args[0])
        return (_per_example(args[0], factors, lambda x, by: x * by + shift), *args[1:])

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _per_example(
    values: torch.Tensor,
    factors: torch.Tensor,
    act: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`act` on a projection's input and factors that are (channels,) or (B, 1, channels)."""
    by = factors.to(values)
    if by.dim() > values.dim():  # a factor an example, and all tokens in a row (OPT)
        return act(values.unflatten(0, (len(by), -1)), by).flatten(0, 1)
    return act(values, by)


def head_factors(decoder: Decoder, units: Units, layer: int) -> torch.Tensor | None:
    """A layer's factors as its output projection meets them: (slots * E,) or (B, 1, ...)."""
    if units.heads is None:
        return None
    slots = decoder.head_slots[layer]
    factors = units.heads[..., layer, :][..., slots.clamp(min=0)]
    factors = torch.where(slots >= 0, factors, 0.0).repeat_interleave(decoder.head_dim, -1)
    return factors.unsqueeze(-2) if factors.dim() > 1 else factors


def neuron_factors(decoder: Decoder, units: Units, layer: int) -> torch.Tensor | None:
    """A layer's factors as the coefficients meet them: (n,) or (B, 1, n)."""
    if units.neurons is None:
        return None
    factors = units.neurons[..., layer, :][..., decoder.neuron_slots[layer]]
    return factors.unsqueeze(-2) if factors.dim() > 1 else factors
