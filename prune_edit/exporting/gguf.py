"""Write a checkpoint folder as one GGUF file, which llama.cpp runs.

A ragged Llama goes as architecture `deci`, which has head counts and FFN widths a layer; every
other model as the uniform form of its own architecture. E head_dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prune_edit.arrange import place
from prune_edit.checkpoint.stock import Stock, stock_tensors, stocks
from prune_edit.checkpoint.store import open_tensors, read_config
from prune_edit.checkpoint.uniform import fit
from prune_edit.checkpoint.write import config_of
from prune_edit.errors import PlanError, PruneEditError, UnsupportedFamilyError
from prune_edit.exporting.gguf_archs import ARCHS, DECI, Arch, check, rotary_of
from prune_edit.exporting.gguf_tokenizer import Vocabulary, read_vocabulary
from prune_edit.families import Family, family_of
from prune_edit.layout import Layout, Order, hidden_size

TYPES = ("f32", "f16", "bf16", "q8_0")
_BLOCK = 32  # values of a q8_0 block, which lie in a row


@dataclass(frozen=True)
class _Sizes:
    """What the tensors hold, with query and KV heads and neurons that may differ by layer."""

    n_heads: int
    n_kv_heads: int
    slots: Order
    kv_heads: Order
    neurons: Order


def export_gguf(folder: str | Path, out: str | Path, kind: str = "f16") -> dict[str, Any]:
    """Write the model and tokenizer of `folder` to the file `out`; what was written, as JSON.

    `kind` is of matrices; norms and biases stay float32, and a matrix whose rows q8_0 cannot cut
    into blocks of 32 stays float16. Raises PruneEditError without the gguf package,
    UnsupportedFamilyError and PlanError for what llama.cpp cannot compute, ModelError, OSError.
    """
    gguf = _gguf()
    config, vocabulary = config_of(read_config(folder)).to_dict(), read_vocabulary(folder)
    family = family_of(str(config["model_type"]))
    layout = Layout.of_config(config)
    arch, stock, want = _target(config, family, layout)
    check(stock, arch, layout.n_layers)
    source = open_tensors(folder)
    writer = gguf.GGUFWriter(str(out), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch.name]])
    _metadata(writer, stock, arch, want, kind)
    _add_vocabulary(writer, vocabulary, int(stock.fields["vocab_size"]))
    stream = partial(_tensors, gguf, stock, arch, source, layout, want)
    types: dict[str, Any] = {}
    for name, tensor in stream():
        types[name] = _type_of(gguf, name, tensor, kind)
        data = _encoded(gguf, tensor, types[name])
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in stream():
        writer.write_tensor_data(_encoded(gguf, tensor, types[name]))
    writer.close()
    fallback = sorted(n for n, t in types.items() if kind == "q8_0" and t.name == "F16")
    return {
        "out": str(out),
        "architecture": gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch.name]],
        "type": kind,
        "tensors": len(types),
        "kept_in_f16": fallback,
        "bytes": Path(out).stat().st_size,
    }


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise PruneEditError(
            "GGUF needs the gguf package; pip install 'prune-edit[gguf]'"
        ) from None
    return gguf


def _target(config: Mapping[str, Any], family: Family, layout: Layout) -> tuple[Arch, Stock, Any]:
    """The architecture, its configuration, and what its tensors hold."""
    base = family.base_type
    if base not in ARCHS:
        raise UnsupportedFamilyError(
            f"GGUF is written for {', '.join(ARCHS)}, not for {base}; use --to onnx, or "
            "--format uniform and llama.cpp's own converter"
        )
    if base in ("llama", "mistral") and not _is_even(layout):
        return DECI, _llama(config, family), _deci(config, layout)
    stock, padded = fit(config, family, layout)
    return ARCHS[stock.family.model_type], stock, padded


def _is_even(layout: Layout) -> bool:
    sizes = {
        (len(slots), len(kv), len(neurons))
        for slots, kv, neurons in zip(layout.slots, layout.kv_heads, layout.neurons, strict=True)
    }
    return len(sizes) == 1 and all(all(size) for size in sizes)


def _llama(config: Mapping[str, Any], family: Family) -> Stock:
    """The model as a Llama, any of whose projections may have biases."""
    found = {stock.family.model_type: stock for stock in stocks(config, family)}
    if "llama" not in found:
        raise PlanError(
            "llama.cpp has no sliding attention of unequal layers; export --format uniform"
        )
    return found["llama"]


def _deci(config: Mapping[str, Any], layout: Layout) -> _Sizes:
    """The layout, with one head and neuron of zeros where `deci` would lose what is there.

    It reads the model's kind from layer 0's heads, and a block without units has no bias.
    """
    slots, kv_heads, neurons = (list(layout.slots), list(layout.kv_heads), list(layout.neurons))
    heads: list[tuple[int | None, ...]] = list(kv_heads)
    widths: list[tuple[int | None, ...]] = list(neurons)
    for layer in range(layout.n_layers):
        if not slots[layer] and (layer == 0 or config.get("attention_output_bias")):
            slots[layer], heads[layer] = (None,), (None,)
        if not widths[layer]:
            widths[layer] = (None,)
    return _Sizes(layout.n_heads, layout.n_kv_heads, tuple(slots), tuple(heads), tuple(widths))


def _metadata(writer: Any, stock: Stock, arch: Arch, want: Any, kind: str) -> None:
    fields = stock.fields
    heads, kv_heads = (list(map(len, each)) for each in (want.slots, want.kv_heads))
    widths = list(map(len, want.neurons))
    per_layer = arch is DECI
    writer.add_block_count(len(widths))
    writer.add_context_length(int(fields[stock.family.positions_key]))
    writer.add_embedding_length(hidden_size(fields))
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if per_layer else kv_heads[0])
    writer.add_feed_forward_length(widths if per_layer else widths[0])
    if stock.family.rms_norm:
        writer.add_layer_norm_rms_eps(float(fields["rms_norm_eps"]))
        writer.add_key_length(stock.head_dim)
        writer.add_value_length(stock.head_dim)
    else:
        names = ("layer_norm_epsilon", "layer_norm_eps")
        writer.add_layer_norm_eps(float(next(fields[name] for name in names if name in fields)))
    if fields.get("rope_parameters"):
        _rotary(writer, stock)
    if "use_parallel_residual" in fields:
        writer.add_parallel_residual(bool(fields["use_parallel_residual"]))
    if arch.kinds is not None:
        writer.add_sliding_window(int(fields["sliding_window"]))
    for name, method in arch.softcaps.items():
        if fields.get(name) is not None:
            getattr(writer, method)(float(fields[name]))
    import gguf

    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16",
                  "q8_0": "MOSTLY_Q8_0"}  # fmt: skip
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(int(fields["vocab_size"]))


def _rotary(writer: Any, stock: Stock) -> None:
    import gguf

    rope, *sliding = rotary_of(stock.fields)
    share = float(rope.get("partial_rotary_factor") or 1.0)
    writer.add_rope_dimension_count(int(stock.head_dim * share))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    for other in sliding:
        writer.add_rope_freq_base_swa(float(other.get("rope_theta", 10_000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, size: int) -> None:
    """The tokens, filled up to the rows of the embedding."""
    filler = [f"<unused{i}>" for i in range(size - len(vocabulary.tokens))]
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([*vocabulary.tokens, *filler])
    writer.add_token_types([*vocabulary.types, *[5] * len(filler)])  # 5: unused
    if vocabulary.scores:
        writer.add_token_scores([*vocabulary.scores, *[-1e9] * len(filler)])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors(
    gguf: Any,
    stock: Stock,
    arch: Arch,
    source: Mapping[str, torch.Tensor],
    have: Layout,
    want: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its name there, (out, in), one at a time."""
    family = stock.family
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name], have.n_layers)
    rope = stock.fields.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _frequency_factors(stock)
    tied = bool(stock.fields.get("tie_word_embeddings"))
    for name, tensor in stock_tensors(stock, source, have, want):
        where = place(family, name)
        if _is_absent(family, name, want):
            continue
        if tied and name.startswith(f"{family.unembedding}."):
            continue
        if where is not None and where.kind == "weight" and family.transposed:
            tensor = tensor.T
        if where is not None and arch.permuted and where.role.path in (family.queries, family.keys):
            tensor = _neighbours(tensor, stock.head_dim)
        if where is not None and family.grouped_qkv and where.role.path == family.queries:
            tensor = _ungrouped(tensor, len(want.kv_heads[0]), stock.head_dim)
        if arch.norm_offset and name.endswith("norm.weight"):
            tensor = tensor.float() + arch.norm_offset
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedFamilyError(f"llama.cpp's {arch.name.lower()} has no tensor {name}")
        yield found, tensor


def _is_absent(family: Family, name: str, want: Any) -> bool:
    """Whether a layer of unequal size has no attention, whose norm nothing reads then."""
    where = place(family, name)
    if where is not None:
        return where.role.part == "attention" and not want.slots[where.layer]
    norms = {
        f"{family.layers}.{layer}.{path}.weight"
        for layer, slots in enumerate(want.slots)
        for path in family.attention_norms
        if not slots
    }
    return name in norms


def _neighbours(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of every head in the order of neighbouring rotary pairs: 0, E/2, 1, E/2 + 1, ..."""
    heads: torch.Tensor = tensor.unflatten(0, (-1, 2, size // 2))
    return heads.transpose(1, 2).reshape(tensor.shape)


def _ungrouped(tensor: torch.Tensor, kv_heads: int, size: int) -> torch.Tensor:
    """Rows of a fused projection in llama.cpp's order: all queries, all keys, all values."""
    heads = tensor.reshape(kv_heads, -1, size, *tensor.shape[1:])  # (K, G + 2, E, ...)
    parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])


def _frequency_factors(stock: Stock) -> torch.Tensor:
    """What Llama 3's angles divide the plain ones by, (E / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config_of(stock.sized(1, 1, 1)), torch.device("cpu"))
    theta = float(stock.fields["rope_parameters"]["rope_theta"])
    plain = theta ** -(torch.arange(0, stock.head_dim, 2).float() / stock.head_dim)
    factors: torch.Tensor = plain / scaled
    return factors


def _type_of(gguf: Any, name: str, tensor: torch.Tensor, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or kind == "f32" or name.startswith("position_embd"):
        return types.F32
    if kind == "q8_0" and tensor.shape[-1] % _BLOCK:
        return types.F16
    return types[kind.upper()]


def _encoded(gguf: Any, tensor: torch.Tensor, kind: Any) -> Any:
    import numpy as np

    array = tensor.detach().cpu().float().contiguous().numpy()
    if kind.name == "F32":
        return array
    if kind.name == "F16":
        return array.astype(np.float16)
    return gguf.quants.quantize(array, kind)
