"""Write a checkpoint folder as an ONNX graph of its logits, checked in onnxruntime.

B batch, T positions, V vocabulary. The graph has no cache: it reads the whole input each time.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_edit.decoder import Decoder
from prune_edit.errors import PruneEditError, VerificationError
from prune_edit.loading import load_decoder

FILE = "model.onnx"
_TOLERANCE = 1e-4  # of the largest logit
_COPIED = ("config.json", "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json")


class _Logits(nn.Module):
    """Ids (B, T) and their mask -> logits (B, T, V), nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        return logits


def export_onnx(folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Write `model.onnx` of the model in `folder` into the folder `out`; what it is, as JSON.

    Batch and length are free. The logits of two inputs of other sizes than it was traced with,
    one padded, are compared with the model's in onnxruntime. Raises PruneEditError without the
    packages, VerificationError where the logits differ, ModelError, OSError.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PruneEditError(f"ONNX needs {error.name}; pip install 'prune-edit[onnx]'") from None
    decoder = load_decoder(folder)
    graph = _Logits(decoder.model)
    path = Path(out) / FILE
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not here
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            _inputs(decoder, 2, 5),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for shape in ((1, 3), (3, min(11, decoder.max_positions or 11))):
        inputs = _inputs(decoder, *shape)
        with torch.no_grad():
            want = graph(*inputs)
        got = session.run(
            ["logits"], {"input_ids": inputs[0].numpy(), "attention_mask": inputs[1].numpy()}
        )[0]
        real = inputs[1].bool()
        difference = (torch.from_numpy(got) - want)[real].abs().max() / want[real].abs().max()
        worst = max(worst, float(difference))
    if not worst <= _TOLERANCE:
        raise VerificationError(
            f"{path}: logits in onnxruntime differ from the model's by {worst:.1e} of their scale, "
            f"allowed is {_TOLERANCE:.0e}"
        )
    size = sum(each.stat().st_size for each in Path(out).glob(f"{FILE}*"))
    return {"out": str(out), "bytes": size, "difference": worst}


def _inputs(decoder: Decoder, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Arbitrary ids and a mask; the last row is padded on the left."""
    ids = torch.arange(batch * length).view(batch, length) * 7 + 3
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, 0] = 0
    return ids % decoder.unembedding.shape[0], mask
