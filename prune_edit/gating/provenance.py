"""Whether a base is the model's own: by the digest it was made from, else by shape and words."""

from __future__ import annotations

from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import GateError


def check_base(model: Decoder, base: Decoder, other_base: bool = False) -> list[str]:
    """What to note of the two. Raises GateError where `base` is another model.

    `other_base` takes it all the same; what differs is noted.
    """
    made_from, base_from = _made_from(model), _made_from(base)
    name, given = model.source, base.source
    if made_from and made_from == base.digest:
        return []
    if model.digest and model.digest == base.digest:
        return ["MODEL and its base are the same model"]
    said = ""
    if made_from and base_from == made_from:
        return [f"{name} and {given} were both made from {_short(made_from)}"]
    if made_from:
        named = _block(model).get("base_model", "")
        said = (
            f"{name} was made from {named or 'a model'} ({_short(made_from)}), not from {given} "
            f"({_short(base.digest)})"
        )
    elif difference := _difference(model, base):
        said = f"{given} is another model than {name}: {difference}"
    if not said:
        return [f"nothing in {name} says what it was made from; its shape is that of {given}"]
    if not other_base:
        raise GateError(f"{said}; give its base with --against, or --other-base to compare anyway")
    return [said]


def described(decoder: Decoder, name: str) -> dict[str, Any]:
    """A model for gate.json: its name, digest, and what it says it was made from."""
    block = _block(decoder)
    return {
        "name": name,
        "digest": decoder.digest,
        "made_from": block.get("base_model", ""),
        "made_from_digest": _made_from(decoder),
    }


def _block(decoder: Decoder) -> dict[str, Any]:
    block = getattr(decoder.model.config, "prune_edit", None)
    return dict(block) if isinstance(block, dict) else {}


def _made_from(decoder: Decoder) -> str:
    return str(_block(decoder).get("base_digest") or "")


def _short(digest: str) -> str:
    return digest if "@" in digest else digest[:12] or "no digest"


def _difference(model: Decoder, base: Decoder) -> str:
    """The first thing in which two models are not the same architecture, in words."""
    kinds = [decoder.family.model_type for decoder in (model, base)]
    if kinds[0] != kinds[1]:
        return f"a {kinds[1]}, not a {kinds[0]}"
    words = [decoder.tokenizer.get_vocab() for decoder in (model, base)]
    if words[0] != words[1]:
        return f"its vocabulary differs ({len(words[1])} and {len(words[0])} tokens)"
    shapes = [
        (decoder.head_shape, decoder.neuron_shape, decoder.unembedding.shape[1])
        for decoder in (model, base)
    ]
    return "" if shapes[0] == shapes[1] else "its layers have other sizes"
