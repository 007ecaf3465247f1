"""Whether a base is the model's own: by the digest it was made from, else by shape and words."""

from __future__ import annotations

from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import GateError
from prune_edit.lineage import ancestors, block_of


def check_base(model: Decoder, base: Decoder, other_base: bool = False) -> list[str]:
    """What to note of the two. Raises GateError where `base` is another model.

    `other_base` takes it all the same; what differs is noted.
    """
    before, base_before = ancestors(block_of(model)), ancestors(block_of(base))
    name, given = model.source, base.source
    if base.digest and base.digest in [each["digest"] for each in before]:
        return []
    if model.digest and model.digest == base.digest:
        return ["MODEL and its base are the same model"]
    said = ""
    others = {each["digest"] for each in base_before}  # names differ between machines
    common = [each for each in before if each["digest"] in others]
    if common:
        return [f"{name} and {given} were both made from {_short(common[-1]['digest'])}"]
    if before:
        last = before[-1]
        said = (
            f"{name} was made from {last['model'] or 'a model'} ({_short(last['digest'])}), not "
            f"from {given} ({_short(base.digest)})"
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
    before = ancestors(block_of(decoder))
    return {
        "name": name,
        "digest": decoder.digest,
        "made_from": before[-1]["model"] if before else "",
        "made_from_digest": before[-1]["digest"] if before else "",
        "lineage": before,
    }


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
