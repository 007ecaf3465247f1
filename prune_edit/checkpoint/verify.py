"""Read a written checkpoint back and compare it with the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_edit import modeling
from prune_edit.caching import decode, prefill
from prune_edit.checkpoint.write import quiet
from prune_edit.errors import VerificationError

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
