"""Tensors as bytes and as text, and back."""

from __future__ import annotations

import base64

import torch


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, in order."""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def packed(tensor: torch.Tensor) -> str:
    """A tensor's bytes as text."""
    return base64.b64encode(raw_bytes(tensor)).decode()


def unpacked(text: str, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `packed`, in the format and shape of `like`."""
    data = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return data.view(like.dtype).view(like.shape)
