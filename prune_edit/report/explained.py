"""Explanations as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


def fragment(kind: str, found: Mapping[str, Any]) -> str:
    """A part of an explanation for a notebook."""
    return f"<pre>{escape(kind)}: {escape(str(dict(found)))}</pre>"
