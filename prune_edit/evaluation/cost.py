"""Cost: what a model takes to store and to run, counted and not timed.

E head_dim, V vocabulary, D hidden.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from prune_edit.checkpoint.store import INDEX, SINGLE
from prune_edit.decoder import Decoder

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def count_parameters(decoder: Decoder) -> int:
    """Distinct parameters: a tied embedding counts once, a zero in a masked model counts."""
    return decoder.parameters_count()


def flops_per_token(decoder: Decoder, context: int) -> int:
    """Floating-point operations to read one token with `context` tokens in sight, itself included.

    Two a multiply-add, over the projections that are there, attention scores and values, and the
    unembedding; norms, biases and activations are left out. A masked model's equal the dense one's.
    """
    # Two-dimensional parameters of a layer are its projections; norms and biases have one.
    projections = sum(
        parameter.numel()
        for layer in decoder.layers
        for parameter in layer.parameters()
        if parameter.dim() == 2
    )
    slots = sum(map(len, decoder.layout.slots))  # pads are computed, too
    attention = 2 * slots * decoder.head_dim * context  # scores, then values
    return 2 * (projections + attention + decoder.unembedding.numel())


def weight_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of a checkpoint's weight files on disk.

    With `dtype`, what they would be in that number format, so that models that were loaded alike
    are compared alike.
    """
    single = folder / SINGLE
    files = [single] if single.exists() else sorted(folder.glob(f"{single.stem}-*{single.suffix}"))
    total = sum(path.stat().st_size for path in files)
    if dtype is None:
        return total
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                kind = _DTYPES.get(stored.get_dtype())
                if kind is not None and kind.is_floating_point:
                    size = torch.Size(stored.get_shape()).numel()
                    total += size * (dtype.itemsize - kind.itemsize)
    return total


def weight_folder(source: str) -> Path | None:
    """Where a model's files are: the folder itself, or the hub's cache; None if in neither."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (SINGLE, INDEX):
        try:
            found = try_to_load_from_cache(source, name)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers in memory, shared ones once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
