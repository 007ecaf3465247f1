"""A tokenizer.json as llama.cpp reads vocabularies.

BPE over bytes becomes its `gpt2`, BPE with byte fallback its `llama` (SentencePiece), and whole
words or a unigram model its `t5`, which finds the likeliest pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_edit.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_PREFIX = "\N{LOWER ONE EIGHTH BLOCK}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {
    None: "gpt-2",  # the byte-level pre-tokenizer's own pattern
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}
"""Patterns that byte-level BPE cuts text by -> llama.cpp's names for them."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; `types` and `scores` are a number a token."""

    model: str  # gpt2, llama or t5
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = ""
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad
    add_bos: bool = False
    space_prefix: bool = False
    chat_template: str = ""


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a model folder. Raises ModelError for one llama.cpp has no form of."""
    path = Path(folder) / "tokenizer.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _vocabulary(Path(folder), fields)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; GGUF holds the tokenizer, too") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no tokenizer that can be read: {error!r}") from None


def _vocabulary(folder: Path, fields: Mapping[str, Any]) -> Vocabulary:
    model, added = fields["model"], fields.get("added_tokens") or []
    steps = [step["type"] for step in _steps(fields.get("pre_tokenizer"), "pretokenizers")]
    numbered = (
        {token: i for i, (token, _) in enumerate(model["vocab"])}
        if model["type"] == "Unigram"
        else dict(model["vocab"])
    )
    numbered |= {token["content"]: token["id"] for token in added}
    tokens = [f"<unused{i}>" for i in range(max(numbered.values()) + 1)]
    for token, number in numbered.items():
        tokens[number] = token
    types = [_NORMAL if token in numbered else 5 for token in tokens]
    for token in added:
        types[token["id"]] = _CONTROL if token["special"] else _USER
    special = _special(folder, numbered, model)
    common: dict[str, Any] = {
        "special": special,
        "add_bos": _adds_bos(fields, special, tokens),
        "space_prefix": _prepends(fields),
        "chat_template": _chat_template(folder),
    }
    if model["type"] == "BPE" and "ByteLevel" in steps:
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        return Vocabulary("gpt2", tokens, types, merges=merges, pre=_pattern(fields), **common)
    if "unk" in special:
        types[special["unk"]] = _UNKNOWN
    if model["type"] == "BPE" and model.get("byte_fallback"):
        types = [_BYTE if _is_byte(t) else kind for t, kind in zip(tokens, types, strict=True)]
        scores = _ranks(model["merges"], tokens)
        return Vocabulary("llama", tokens, types, scores, **common)
    if model["type"] == "Unigram":
        given = [float(score) for _, score in model["vocab"]]
        scores = [*given, *[0.0] * (len(tokens) - len(given))]
        return Vocabulary("t5", tokens, types, scores, **common)
    if model["type"] == "WordLevel":
        # As few pieces as possible: whole words. One that is unknown falls apart.
        return Vocabulary("t5", tokens, types, [-1.0] * len(tokens), **common)
    raise ModelError(
        f"{folder}: llama.cpp has no tokenizer like this {model['type']} over {steps or 'text'}"
    )


def _steps(part: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer.json, or those of a sequence."""
    if part and part["type"] == "Sequence":
        for step in part[key]:
            yield from _steps(step, key)
    elif part:
        yield part


def _pattern(fields: Mapping[str, Any]) -> str:
    steps = list(_steps(fields["pre_tokenizer"], "pretokenizers"))
    cut = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    if cut not in _PRE:
        raise ModelError(
            f"llama.cpp's name of the pattern {cut!r} that tokenizer.json cuts text by is not "
            f"known; known are {', '.join(_PRE.values())}"
        )
    return _PRE[cut]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _ranks(merges: list[Any], tokens: list[str]) -> list[float]:
    """Scores by which SentencePiece joins pairs in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first, second = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault(first + second, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _special(folder: Path, numbered: Mapping[str, int], model: Mapping[str, Any]) -> dict[str, int]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if isinstance(token, str) and token in numbered:
            found[name] = numbered[token]
    unknown = model.get("unk_token")
    if "unk" not in found and isinstance(unknown, str) and unknown in numbered:
        found["unk"] = numbered[unknown]
    return found


def _adds_bos(fields: Mapping[str, Any], special: Mapping[str, int], tokens: list[str]) -> bool:
    if "bos" not in special:
        return False
    for step in _steps(fields.get("post_processor"), "processors"):
        for piece in step.get("single") or ():
            if "SpecialToken" in piece:
                return bool(piece["SpecialToken"]["id"] == tokens[special["bos"]])
            break
    return False


def _prepends(fields: Mapping[str, Any]) -> bool:
    """Whether a space goes before the text."""
    normal = list(_steps(fields.get("normalizer"), "normalizers"))
    if any(step["type"] == "Prepend" and step["prepend"] == _PREFIX for step in normal):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(fields.get("pre_tokenizer"), "pretokenizers")
    )


def _chat_template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = settings.get("chat_template")
    return found if isinstance(found, str) else ""
