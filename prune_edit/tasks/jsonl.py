"""User tasks: a file of one JSON object a line."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from prune_edit.errors import TaskError
from prune_edit.tasks.task import Example, Task

_FIELDS = ("prompt", "answer", "group", "contrast", "choices", "key")


def load(path: Path) -> Task:
    """The task in a JSONL file. Raises TaskError naming the first bad line."""
    try:
        # Split at line feeds only: JSON texts may hold the other characters `splitlines` knows.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task file {path} cannot be read: {error}") from None
    examples = [
        parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not examples:
        raise TaskError(
            f"task file {path} is empty; give one JSON object a line, such as "
            '{"prompt": "3+5=", "answer": "8"}'
        )
    return Task(path.stem, tuple(dict.fromkeys(examples)), f"from {path.name}", source=str(path))


def parse(line: str, where: str) -> Example:
    """The example of one line; `where` names it in errors. Raises TaskError."""
    try:
        fields: Any = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}); give one object a line") from None
    if not isinstance(fields, dict):
        raise TaskError(f"{where}: a {type(fields).__name__}; give an object with prompt, answer")
    for name in fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_FIELDS)}"
            raise TaskError(f"{where}: unknown field {name!r}; {hint}")
    for name in ("prompt", "answer"):
        if not isinstance(fields.get(name), str):
            raise TaskError(f"{where}: field {name!r} is missing or not text")
    choices = fields.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TaskError(f"{where}: field 'choices' must be a list of texts")
    if choices and fields["answer"] not in choices:
        raise TaskError(f"{where}: answer {fields['answer']!r} is not among its choices {choices}")
    for name in ("group", "contrast", "key"):
        if not isinstance(fields.get(name, ""), str):
            raise TaskError(f"{where}: field {name!r} must be text")
    if not fields["answer"].strip():
        raise TaskError(f"{where}: the answer is empty; give the text that should follow")
    return Example(
        fields["prompt"],
        fields["answer"],
        fields.get("group", ""),
        fields.get("contrast"),
        tuple(dict.fromkeys(choices)),
        fields.get("key", ""),
    )
