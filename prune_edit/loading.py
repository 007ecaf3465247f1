"""Load a decoder from a folder or a hub id: safetensors only, one-line errors, disk if need be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_edit.checkpoint.reading import is_pickled, model_digest, read_config, read_headers
from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError
from prune_edit.families import family_of
from prune_edit.support import check_supported
from prune_edit.trust import trusted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_MODEL = Path(__file__).parent / "reference_model"
_LONGEST = 400  # characters of a library's message


def load_decoder(
    source: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Decoder:
    """Load a folder or hub id; without one, the bundled reference model.

    With `device_map="auto"` a model that does not fit into `max_memory` (`8GiB`; default: what is
    free on the device) keeps its layers on disk: a `streamed.StreamedDecoder`. Raises ModelError,
    UnsupportedFamilyError for an architecture without a row, and UnsafeCheckpointError where the
    only weights are pickles.
    """
    place = str(REFERENCE_MODEL if source is None else source)
    if device_map is not None or max_memory is not None:
        streamed = _streamed(place, device, dtype, device_map, max_memory)
        if streamed is not None:
            return streamed
    if _looks_like_a_path(place):
        digest = _digest_of(Path(place))
        return Decoder(*_from_pretrained(place, device, dtype), place, digest)
    model, tokenizer = _from_pretrained(place, device, dtype)
    # A hub model is what its commit says it is.
    commit = str(getattr(model.config, "_commit_hash", "") or "")
    return Decoder(model, tokenizer, place, f"{place}@{commit}")


def local_folder(source: str | Path | None) -> tuple[Path, str | None]:
    """Where a model's files are on this machine, and for a hub id what `Decoder.digest` is.

    A hub id is downloaded first. Raises ModelError.
    """
    place = str(REFERENCE_MODEL if source is None else source)
    if _looks_like_a_path(place):
        return Path(place), None
    with _one_line_errors(place):
        folder = _snapshot(place)
    return folder, f"{place}@{folder.name}"


def _snapshot(place: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    wanted += ["*.bin"] if trusted().pickle else []
    return Path(snapshot_download(place, allow_patterns=wanted))


def _digest_of(folder: Path) -> str:
    """A folder's digest; raises for a family without a row before the weights are read."""
    config = read_config(folder)
    if config.get("model_type"):
        check_supported(config)
    if not is_pickled(folder):
        read_headers(folder)  # looked at before any library reads them
    return model_digest(folder)


def _streamed(
    place: str, device: str, dtype: str, device_map: str | None, max_memory: str | None
) -> Decoder | None:
    """The decoder with its layers on disk, or None where the whole model fits."""
    from transformers import AutoConfig, AutoTokenizer

    from prune_edit.modeling import register
    from prune_edit.streamed import fits, free_memory, load_streamed, parse_memory

    if device_map is None:
        raise ModelError(f"--max-memory {max_memory} needs --device-map auto; give both or neither")
    if device_map != "auto":
        raise ModelError(f"--device-map {device_map!r} is unknown; give auto")
    register()
    _check_device(device)
    kind = _float_type(dtype)
    limit = free_memory(device) if max_memory is None else parse_memory(max_memory)
    local = _looks_like_a_path(place)
    digest = _digest_of(Path(place)) if local else ""
    with _one_line_errors(place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trusted().remote_code)
        check_supported(config.to_dict())
        if not local:
            digest = f"{place}@{getattr(config, '_commit_hash', None) or ''}"
            folder = _snapshot(place)
        else:
            folder = Path(place)
        if fits(folder, kind, limit):
            return None
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted().remote_code)
        return load_streamed(folder, tokenizer, config, device, kind, digest, place, limit)


def _float_type(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"dtype {name!r} is unknown; give float32, bfloat16 or float16")
    return kind


def _looks_like_a_path(place: str) -> bool:
    """A hub id is `owner/name`; where a folder `owner` is here, a name in it was meant."""
    plain = place.startswith((".", "/", "~")) or place.count("/") != 1
    return plain or Path(place).parent.is_dir()


def _from_pretrained(
    place: str, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from prune_edit.modeling import register

    register()
    _check_device(device)
    kind = _float_type(dtype)
    with _one_line_errors(place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trusted().remote_code)
        check_supported(config.to_dict())
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted().remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=kind,
            use_safetensors=None if trusted().pickle else True,
            trust_remote_code=trusted().remote_code,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
        model, report = loaded
        _check_weights(place, model, report)
        return model.to(device).eval(), tokenizer


def _check_weights(place: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise ModelError unless the weights are those of the architecture.

    Stock code initialises what is missing at random, ignores what is too much, and only logs.
    """
    remedy = "get a whole copy of the checkpoint"
    for name, have, want in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"model {place}: tensor {name} is {tuple(have)}, the configuration says {tuple(want)}; "
            f"{remedy}"
        )
    for name in sorted(map(str, report["missing_keys"])):
        raise ModelError(
            f"model {place}: weights do not fill the architecture (first: {name}); {remedy}"
        )
    layers = re.escape(family_of(model.config.model_type).layers)
    count = model.config.num_hidden_layers
    for name in sorted(map(str, report["unexpected_keys"])):
        found = re.search(rf"{layers}\.(\d+)\.", name)
        if found is not None and int(found[1]) >= count:
            raise ModelError(
                f"model {place}: there are weights of layer {found[1]} ({name}), the configuration "
                f"says {count} layers; {remedy}"
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"model {place}: tensor {name} holds NaN or infinity as "
                f"{str(parameter.dtype).removeprefix('torch.')}; {remedy}, or give a wider --dtype"
            )


def _check_device(device: str) -> None:
    """Raise ModelError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device).item()  # `meta` has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used: {first}; give --device cpu") from None


class _one_line_errors(AbstractContextManager["_one_line_errors"]):  # noqa: N801
    """Turn whatever the libraries raise while loading into one ModelError line."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            said = " ".join(str(error).split()) or repr(error)
            if "trust_remote_code" in said:
                said = "it brings its own code, which only runs with --trust-remote-code"
            said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
            raise ModelError(
                f"model {self.place} cannot be loaded: {type(error).__name__}: {said}; give a "
                "folder with config.json, tokenizer files and safetensors weights, or a hub id"
            ) from error
