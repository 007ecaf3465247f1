"""Which models are supported: the errors that say why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_edit.families import FAMILIES, unsupported


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedFamilyError, saying why, where a configuration's model cannot be scored.

    Mixtures of experts, encoders and multimodal models are told by their fields, not by name.
    """
    name = str(config.get("model_type"))
    row = FAMILIES.get(name)
    if row is None:
        raise unsupported(name, _reason(name, config))
    for flag, setting in row.refused:
        if config.get(flag) is setting:
            raise unsupported(name, f"with {flag}={setting} has no exact scores")


def _reason(name: str, config: Mapping[str, Any]) -> str:
    """Why a model without a row is not supported."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.get("is_encoder_decoder"):
        return "is an encoder-decoder model, not a decoder"
    if experts := _experts(config):
        return f"is a mixture of experts ({experts}), where a neuron's layer is not one FFN"
    if "text_config" in config:
        return "is a multimodal model (it has a text_config), not a text decoder"
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "is an encoder, not a decoder"
    return "has no row in the table of families"


def _experts(config: Mapping[str, Any]) -> str:
    """The first field, at any depth, that counts more than one expert; empty without."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if found := _experts(value):
                return f"{key}.{found}"
        elif str(key).endswith("experts") and (
            (isinstance(value, int) and value > 1) or (isinstance(value, list | tuple) and value)
        ):
            return f"{key}={value}"
    return ""
