"""Models larger than memory: layers stay on disk, each is read when it is needed and let go after.

`load_decoder(device_map="auto", max_memory=...)` gives a StreamedDecoder where the weights do not
fit: embedding, final norm and unembedding in memory, every layer without weights until it is
`resident`. A layer that is called while it is not resident is read for that call alone, so that
anything that only runs the model works, slowly; what runs a layer on many batches keeps it resident
meanwhile (scoring/offload.py).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_edit.checkpoint.store import open_tensors, weight_files
from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError
from prune_edit.families import family_of
from prune_edit.hooks import Call

_SHARE = 0.8  # of the memory, that the weights of a model kept whole may take
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of `8GiB`, `500MB` or `1000000`. Raises ModelError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    factor = None if found is None else (_UNITS | _BINARY).get(found[2])
    if found is None or factor is None or (size := int(float(found[1]) * factor)) < 1:
        raise ModelError(f"--max-memory {text!r} is no size; give one such as 8GiB or 500MB")
    return size


def free_memory(device: str) -> int:
    """Bytes that are free on a device, this machine's for the CPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _group_limit()) // local_processes()


def local_processes() -> int:
    """Processes of this run that share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _available() -> int:
    """Bytes that programs can still have; what only caches files counts."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limit() -> int:
    """Bytes that a container leaves its processes; without one, more than there are."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            return max(1, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not here, or `max`
            continue
    return sys.maxsize


class LayerStore:
    """The layers' weights on disk; `loads` counts how often each layer was read."""

    def __init__(
        self, layers: list[nn.Module], paths: list[dict[str, str]], read: Callable[[str], Any]
    ) -> None:
        self.loads = [0] * len(layers)
        self._layers, self._paths, self._read = layers, paths, read
        self._users = [0] * len(layers)
        for number, layer in enumerate(layers):
            _replace_forward(layer, self._on_demand(number, layer.forward))

    def bytes_of(self, number: int) -> int:
        """What a layer takes in memory."""
        return sum(p.numel() * p.element_size() for p in self._layers[number].parameters())

    @property
    def residents(self) -> list[int]:
        """The layers in memory now."""
        return [number for number, users in enumerate(self._users) if users]

    @contextmanager
    def resident(self, number: int) -> Iterator[None]:
        """A layer in memory, read once however often it is called."""
        if not self._users[number]:
            self.loads[number] += 1
            for name, key in self._paths[number].items():
                _set(self._layers[number], name, self._read(key))
        self._users[number] += 1
        try:
            yield
        finally:
            self._users[number] -= 1
            if not self._users[number]:
                for name in self._paths[number]:
                    _set(self._layers[number], name, None)

    def _on_demand(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.resident(number):
                return forward(*args, **kwargs)

        return call


@dataclass(frozen=True)
class StreamedDecoder(Decoder):
    """A decoder whose layers are on disk; everything held at once fits into `max_memory` bytes."""

    store: LayerStore = field(default_factory=lambda: LayerStore([], [], str))
    max_memory: int = 0

    @property
    def work(self) -> int:
        """A part of the room: what one layer's neurons may take beside the states."""
        return min(super().work, self.room // 4)

    @property
    def room(self) -> int:
        """Bytes left for states beside what always stays and the largest layer."""
        layers = {id(p) for layer in self.layers for p in layer.parameters()}
        fixed = sum(
            p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in layers
        )
        return self.max_memory - fixed - max(map(self.store.bytes_of, range(self.n_layers)))


def resident(decoder: Decoder, layer: int) -> AbstractContextManager[None]:
    """A layer's weights in memory, whatever the decoder."""
    if isinstance(decoder, StreamedDecoder):
        return decoder.store.resident(layer)
    return nullcontext()


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What all weights take in memory once they are read."""
    from safetensors import safe_open

    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                total += int(torch.Size(shape).numel()) * dtype.itemsize
    return total


def fits(folder: Path, dtype: torch.dtype, limit: int) -> bool:
    """Whether the whole model may be kept, with a fifth of the memory left to work in."""
    return weight_bytes(folder, dtype) <= _SHARE * limit


def load_streamed(
    folder: Path, tokenizer: Any, config: Any, device: str, dtype: torch.dtype, digest: str,
    source: str, limit: int,
) -> StreamedDecoder:  # fmt: skip
    """The model with its layers on disk. Raises ModelError where tensors are lacking."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    tensors = open_tensors(folder)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    family = family_of(config.model_type)

    def read(key: str) -> torch.Tensor:
        tensor = tensors[key]
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    _tie(model, family.embedding, family.unembedding, config)
    keys = _names(tensors, model)
    prefix = f"{family.layers}."
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not name.startswith(prefix):
            _set(model, name, read(_key(keys, model, name, source)))
    _tie(model, family.embedding, family.unembedding, config)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    layers = list(model.get_submodule(family.layers).children())
    paths = [
        {
            name: _key(keys, model, f"{prefix}{number}.{name}", source)
            for name, _ in layer.named_parameters()
        }
        for number, layer in enumerate(layers)
    ]
    store = LayerStore(layers, paths, read)
    decoder = StreamedDecoder(model.eval(), tokenizer, source, digest, store, limit)
    if decoder.room <= 0:
        raise ModelError(
            f"--max-memory {limit} bytes do not hold the embedding and one layer of {source}; "
            f"give more than {limit - decoder.room}"
        )
    return decoder


@contextmanager
def _stubs(decoder: Decoder, calls: list[Call], as_tuple: bool) -> Iterator[None]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.pop("hidden_states")
        if states.dim() != 3:
            raise _WrongKindError
        calls.append((args[1:], kwargs))
        return (states,) if as_tuple else states

    before = [layer.__dict__.get("forward") for layer in decoder.layers]
    for layer in decoder.layers:
        _replace_forward(layer, stub)
    try:
        yield
    finally:
        for layer, forward in zip(decoder.layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                _replace_forward(layer, forward)


class _WrongKindError(Exception):
    """The model takes the first of what a layer returns."""


def trace(decoder: Decoder, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Call]]:
    """What the first layer reads (B, T, D), and every layer's other arguments; none of them runs.

    Some families' layers return their states, others a tuple that begins with them.
    """
    for as_tuple in (False, True):
        calls: list[Call] = []
        seen: list[torch.Tensor] = []
        handle = decoder.layers[0].register_forward_pre_hook(_first_states(seen), with_kwargs=True)
        try:
            with _stubs(decoder, calls, as_tuple):
                if decoder.final_states(**inputs).dim() == 3:
                    return seen[0], calls
        except _WrongKindError:
            continue
        finally:
            handle.remove()
    raise ModelError(f"the layers of {decoder.source} cannot be run one by one")


def _first_states(seen: list[torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    return hook


def _replace_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    layer.__dict__["forward"] = forward  # the instance's own, which its class's yields to


def _set(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Put a parameter's values there, or let go of them."""
    owner, _, leaf = name.rpartition(".")
    home = module.get_submodule(owner)
    value = home._parameters[leaf]
    assert value is not None
    if tensor is None:
        tensor = torch.empty_like(value, device="meta")
    elif tensor.shape != value.shape:
        raise ModelError(
            f"tensor {name} is {tuple(tensor.shape)} where the configuration says "
            f"{tuple(value.shape)}; get a whole copy of the checkpoint"
        )
    home._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie(model: Any, embedding: str, unembedding: str, config: Any) -> None:
    if getattr(config, "tie_word_embeddings", False):
        model.get_submodule(unembedding)._parameters["weight"] = model.get_submodule(
            embedding
        )._parameters["weight"]


def _names(tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, str]:
    """Tensors of a checkpoint by the names that transformers gives them today."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if type(change) is WeightRenaming]
    keys = {}
    for key in tensors:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        keys[name] = key
    return keys


def _key(keys: Mapping[str, str], model: Any, name: str, source: str) -> str:
    """The tensor of a parameter; some checkpoints leave the base model's prefix out."""
    for key in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        if key in keys:
            return keys[key]
    raise ModelError(
        f"model {source}: no tensor {name}, which streaming from disk needs; give a folder whose "
        "tensors are named as the architecture's, or leave out --device-map"
    )
