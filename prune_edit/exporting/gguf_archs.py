"""Architectures of llama.cpp: what each is called there, and what it takes as given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prune_edit.checkpoint.stock import Stock
from prune_edit.errors import PlanError

_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_NEAR_GELU = (*_GELU, "gelu")  # llama.cpp's is the tanh form, from a table in half precision


@dataclass(frozen=True)
class Arch:
    """How llama.cpp names an architecture and what it takes as given.

    `needs` are settings that a configuration may not differ in; `wide_queries` is a number of
    layers by which llama.cpp tells the model that scales queries by D / H.
    """

    name: str
    permuted: bool = False  # rotary pairs are neighbours, and not E / 2 apart
    kinds: Callable[[int], bool] | None = None  # which layers slide; None: none may
    norm_offset: float = 0.0
    softcaps: dict[str, str] = field(default_factory=dict)  # configuration names -> writer methods
    activations: tuple[str, ...] = ("silu",)
    needs: tuple[tuple[str, Any], ...] = ()
    wide_queries: int = 0
    own_window: bool = False  # the configuration's window holds for every layer


_SOFTCAPS = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}
ARCHS = {
    "llama": Arch("LLAMA", permuted=True),
    "mistral": Arch("LLAMA", permuted=True, own_window=True),
    "qwen2": Arch("QWEN2"),
    "qwen3": Arch("QWEN3"),
    "smollm3": Arch("SMOLLM3", permuted=True),
    "phi3": Arch("PHI3", own_window=True),
    "olmo2": Arch("OLMO2"),
    "gemma2": Arch(
        "GEMMA2",
        kinds=lambda layer: layer % 2 == 0,
        norm_offset=1.0,
        softcaps=_SOFTCAPS,
        activations=("gelu_pytorch_tanh",),
        wide_queries=46,
    ),
    "gemma3_text": Arch(
        "GEMMA3",
        kinds=lambda layer: layer % 6 != 5,
        norm_offset=1.0,
        softcaps={"final_logit_softcapping": "add_final_logit_softcapping"},
        activations=("gelu_pytorch_tanh",),
        needs=(("attn_logit_softcapping", None),),
        wide_queries=62,
    ),
    "gpt2": Arch("GPT2", activations=_GELU[:2]),
    "gpt_neox": Arch("GPTNEOX", activations=_NEAR_GELU),
    "falcon": Arch(
        "FALCON",
        activations=_NEAR_GELU,
        needs=(("alibi", False), ("parallel_attn", True), ("bias", False)),
    ),
}
DECI = Arch("DECI", permuted=True)


def check(stock: Stock, arch: Arch, n_layers: int) -> None:
    """Raise PlanError for settings that llama.cpp's architecture does not have."""
    fields, said = stock.fields, f"llama.cpp's {arch.name.lower()}"
    for name, value in arch.needs:
        if fields.get(name, value) != value:
            raise PlanError(f"{said} has {name} {value}, the model {fields[name]}")
    _check_layers(fields, arch, n_layers, fields[stock.family.positions_key])
    for parameters in rotary_of(fields):
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or (kind == "llama3" and not arch.permuted):
            raise PlanError(f"{said} cannot be given rotary angles of type {kind!r}")
    scalar = fields.get("query_pre_attn_scalar", stock.head_dim)
    if scalar != stock.head_dim or n_layers == arch.wide_queries:
        raise PlanError(
            f"{said} scales queries by head_dim {stock.head_dim}, not by {scalar}"
            if scalar != stock.head_dim
            else f"{said} takes {n_layers} layers for a model that scales queries by its number of "
            "heads, which pruning changes"
        )
    names = ("hidden_activation", "activation_function", "hidden_act", "activation")
    found = next((fields[name] for name in names if fields.get(name)), arch.activations[0])
    if found not in arch.activations:
        raise PlanError(f"{said} has the activation {arch.activations[0]}, the model {found}")


def _check_layers(fields: Mapping[str, Any], arch: Arch, n_layers: int, positions: int) -> None:
    """Which layers slide, and which have no positions, is fixed there."""
    said, window = f"llama.cpp's {arch.name.lower()}", fields.get("sliding_window")
    kinds = fields.get("layer_types") or ["full_attention"] * n_layers
    if arch.own_window and window is not None:
        kinds = ["sliding_attention" if window < positions else "full_attention"] * n_layers
    for layer, kind in enumerate(kinds):
        if (kind == "sliding_attention") != (arch.kinds is not None and arch.kinds(layer)):
            raise PlanError(f"{said} has no {kind.replace('_', ' ')} in layer {layer}")
    for layer, rotates in enumerate(fields.get("no_rope_layers") or ()):
        if bool(rotates) != ((layer + 1) % 4 != 0):
            there = "rotates" if not rotates else "does not rotate"
            raise PlanError(
                f"{said} {there} queries and keys in layer {layer}, the model otherwise"
            )


def rotary_of(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How rotary angles are made: of all layers, or of full and then of sliding attention."""
    rope = fields.get("rope_parameters") or {}
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]
