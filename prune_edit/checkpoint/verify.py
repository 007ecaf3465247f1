"""Read a written checkpoint back and compare it with the model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_edit import modeling
from prune_edit.caching import decode, prefill
from prune_edit.checkpoint.pieces import Piece
from prune_edit.checkpoint.reading import open_file, read_config, read_headers
from prune_edit.checkpoint.safety import Entry
from prune_edit.checkpoint.source import DTYPES, Source
from prune_edit.checkpoint.write import expected_shapes, quiet
from prune_edit.errors import ModelError, VerificationError
from prune_edit.families import family_of
from prune_edit.running import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference of logits relative to the largest logit; 5e-2 in half precision."""


def verify(folder: str | Path, reference_model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Raise VerificationError unless `folder` loads whole and computes what the reference does.

    `input_ids`: (B, T). Compared are all logits, and a cached decode step with the uncached.
    """
    from transformers import AutoModelForCausalLM

    modeling.register()
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet():
            model, info = load(
                folder,
                dtype=reference_model.dtype,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever keeps a folder from loading, it is not what was meant
        raise VerificationError(f"{folder} does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(map(str, info[kind])):
            raise VerificationError(
                f"{folder} does not read back whole: {kind.replace('_', ' ')} "
                f"{', '.join(names[:3])}; write it again"
            )
    model = model.to(reference_model.device).eval()
    ids = input_ids.to(reference_model.device)
    if ids.shape[1] < 2:
        ids = ids.repeat(1, 2)
    training = reference_model.training
    reference_model.eval()
    try:
        with torch.no_grad():
            expected = reference_model(ids, use_cache=False).logits  # (B, T, V)
            found = model(ids, use_cache=False).logits
            _, cache = prefill(model, ids[:, :-1])
            step = decode(model, ids[:, -1:], cache).logits
    finally:
        reference_model.train(training)
    tolerance = TOLERANCES.get(expected.dtype, 5e-2)
    for what, got, want in (
        ("logits", found, expected),
        ("logits of a cached decode step", step[:, -1], expected[:, -1]),
    ):
        difference = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
        if not difference <= tolerance:  # NaN fails, too
            raise VerificationError(
                f"{folder}: {what} differ from the model's by {difference:.1e} of their scale, "
                f"allowed is {tolerance:.0e}"
            )


_BLOCK = 16 << 20  # bytes compared at once
_SPOTS, _ROWS = 2, 8  # where in a tensor a sample looks, and at how many rows each


def verify_pieces(
    folder: Path,
    source: Source,
    pieces: Sequence[Piece],
    progress: Progress = silent,
    sample: bool = False,
) -> None:
    """Raise VerificationError unless `folder` holds the pieces.

    Its tensors must be those that its configuration describes, and each equal to the source's
    slice, which is read anew by the library; with `sample`, only some rows of each are compared,
    the first and the last among them. Neither model is in memory, one block is.
    """
    check_shapes(folder)
    there = read_headers(folder)
    if set(there) != {piece.name for piece in pieces}:
        odd = sorted(set(there) ^ {piece.name for piece in pieces})
        raise VerificationError(f"{folder} does not read back whole: {odd[0]}; write it again")
    for done, piece in enumerate(pieces, 1):
        # What a handle maps goes with it: of a tensor's sample that is little.
        opened = cache(open_file) if sample else open_file
        _compare(there[piece.name], piece, source, sample, opened)
        progress("verifying", done, len(pieces))


def _compare(
    entry: Entry, piece: Piece, source: Source, sample: bool, opened: Callable[[Path], Any]
) -> None:
    """Raise VerificationError unless a tensor is the piece."""
    folder = entry.path.parent
    if (entry.dtype, entry.shape) != (piece.dtype, piece.shape):
        raise VerificationError(
            f"{folder}: {piece.name} is {entry.dtype} {entry.shape}, meant was {piece.dtype} "
            f"{piece.shape}; write it again"
        )
    for first, expected in _expected(piece, source, sample, opened):
        found = opened(entry.path).get_slice(piece.name)
        got = found[first : first + len(expected)] if piece.shape else found[...]
        if not torch.equal(got.reshape(expected.shape), expected):
            raise VerificationError(
                f"{folder}: {piece.name} from row {first} on is not the slice of the source "
                "that the plan keeps; write it again"
            )


def check_shapes(folder: Path) -> None:
    """Raise VerificationError unless the tensors are those that config.json describes."""
    try:
        fields = read_config(folder)
        expected = expected_shapes(fields, family_of(str(fields.get("model_type"))))
        there = {name: entry.shape for name, entry in read_headers(folder).items()}
    except ModelError as error:
        raise VerificationError(str(error)) from None
    for name in sorted(set(expected) | set(there)):
        if expected.get(name) != there.get(name):
            said = "nothing" if name not in expected else str(expected[name])
            found = "nothing" if name not in there else str(there[name])
            raise VerificationError(
                f"{folder}: {name} is {found}, the configuration says {said}; write it again"
            )


def _spans(rows: int, width: int, sample: bool) -> Iterator[tuple[int, int]]:
    """The rows to compare, from and up to: all of them, or a few here and there."""
    if sample and rows > _SPOTS * _ROWS:
        for spot in range(_SPOTS):
            first = spot * (rows - _ROWS) // (_SPOTS - 1)
            yield first, first + _ROWS
        return
    step = max(1, _BLOCK // width)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _expected(
    piece: Piece, source: Source, sample: bool, opened: Callable[[Path], Any]
) -> Iterator[tuple[int, torch.Tensor]]:
    """What a piece must be, a few rows at a time, with the row that they begin at."""
    rows = piece.shape[0] if piece.shape else 1
    spans = _spans(rows, max(1, piece.bytes // max(1, rows)), sample)
    if piece.source is None:
        value = piece.value
        for first, last in spans:
            if value is not None:
                yield first, value[first:last] if piece.shape else value
            else:
                shape = (last - first, *piece.shape[1:])
                yield first, torch.zeros(shape, dtype=DTYPES[piece.dtype])
        return
    if source.pickled is None:
        entry = source.entries[piece.source]
        stored = _stored_name(opened(entry.path), piece.source)
    wanted = None if piece.positions is None else torch.from_numpy(piece.positions).long()
    for first, last in spans:
        tensor: Any
        if source.pickled is None:
            tensor = opened(entry.path).get_slice(stored)
        else:
            tensor = source.pickled[piece.source]
        if wanted is None or piece.axis == 1:
            block = tensor[first:last] if piece.shape else tensor[...]
            if wanted is not None:
                block = block[:, wanted.clamp(min=1) - 1]
                block[:, wanted == 0] = 0
        else:
            here = wanted[first:last]
            real = here[here > 0] - 1
            low, high = (int(real.min()), int(real.max()) + 1) if len(real) else (0, 0)
            block = tensor[low:high]
            if not len(here) == len(real) == len(block) or bool((here.diff() != 1).any()):
                taken = block.new_zeros((len(here), *piece.shape[1:]))
                taken[here > 0] = block[real - low]
                block = taken
        yield first, block.to(DTYPES[piece.dtype])


def _stored_name(file: Any, name: str) -> str:
    """A tensor's name in its file, where a base model's lack the prefix."""
    return name if name in set(file.keys()) else name.partition(".")[2]
