"""Reports of a verdict for people and for CI, each from gate.json's content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prune_edit.report.html import html
from prune_edit.report.junit import junit
from prune_edit.report.markdown import markdown
from prune_edit.report.sarif import sarif

__all__ = ["FILES", "html", "junit", "markdown", "sarif"]

FILES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gate.xml": junit,
    "gate.md": markdown,
    "gate.sarif": sarif,
    "gate.html": html,
}
"""What is written beside gate.json."""
