"""What a user allows beyond the safe: reading pickles, running a model's own code.

Both are off unless `trusting` says otherwise, which the command line does for `--allow-pickle` and
`--trust-remote-code`. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """What is allowed while models are read."""

    pickle: bool = False
    remote_code: bool = False


_SAFE = Trust()
_given = ContextVar("_given", default=_SAFE)


def trusted() -> Trust:
    """What is allowed here."""
    return _given.get()


@contextmanager
def trusting(*, pickle: bool | None = None, remote_code: bool | None = None) -> Iterator[None]:
    """Allow more within the block; what is None stays as it was.

    `pickle`: weights from `.bin` and `.pt`, read with `weights_only`. `remote_code`: Python files
    that come with a model run in this process.
    """
    had = _given.get()
    token = _given.set(
        Trust(
            had.pickle if pickle is None else pickle,
            had.remote_code if remote_code is None else remote_code,
        )
    )
    try:
        yield
    finally:
        _given.reset(token)
