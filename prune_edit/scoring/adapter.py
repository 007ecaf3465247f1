"""A tuned model from a peft adapter folder, to compare with the model it was tuned from."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, UnsafeCheckpointError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def load_adapter(decoder: Decoder, folder: str | Path) -> Decoder:
    """A copy of the model with the adapter merged into its weights.

    Its digest is the model's and one of the adapter's files. Raises ModelError where the folder
    holds no adapter or one of another model, or the model's layers are on disk, and
    UnsafeCheckpointError where its only weights are a pickle.
    """
    place = Path(folder)
    if any(parameter.is_meta for parameter in decoder.model.parameters()):
        raise ModelError(
            f"adapter {place} needs the whole model in memory; raise --max-memory, or leave out "
            "--device-map"
        )
    if not (place / _CONFIG).is_file():
        raise ModelError(
            f"adapter {place} has no {_CONFIG}; give a folder that peft's save_pretrained wrote"
        )
    if not (place / _WEIGHTS).is_file():
        if (place / "adapter_model.bin").is_file():
            raise UnsafeCheckpointError(
                f"adapter {place} has only pickled weights, which can run code when read; save it "
                "with safe_serialization=True"
            )
        raise ModelError(f"adapter {place} has no {_WEIGHTS}; get a whole copy of it")
    adapted = _attach(decoder, place)
    merged = decoder.with_model(adapted.merge_and_unload())
    digest = f"{decoder.digest}+{_digest(place)}" if decoder.digest else ""
    return Decoder(merged.model, merged.tokenizer, f"{decoder.source} + {place}", digest)


def _digest(place: Path) -> str:
    """SHA-256 of the adapter's configuration and weights."""
    hasher = hashlib.sha256()
    for name in (_CONFIG, _WEIGHTS):
        data = (place / name).read_bytes()
        hasher.update(f"{name}\0{len(data)}\0".encode())
        hasher.update(data)
    return hasher.hexdigest()


def _attach(decoder: Decoder, place: Path) -> Any:
    """The peft model of a copy; whatever does not fit is a ModelError."""
    import warnings

    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are looked for below
            adapted: Any = PeftModel.from_pretrained(copy.deepcopy(decoder.model), str(place))
        with safe_open(place / _WEIGHTS, framework="pt") as file:
            given = set(file.keys())
        wanted = set(get_peft_model_state_dict(adapted))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"adapter {place} cannot be put on model {decoder.source!r}: "
            f"{(lines or [repr(error)])[0]}; give an adapter that was tuned on this model"
        ) from error
    if given != wanted:
        raise ModelError(
            f"adapter {place} is not of model {decoder.source!r} (first difference: "
            f"{min(given ^ wanted)}); give an adapter that was tuned on this model"
        )
    return adapted
