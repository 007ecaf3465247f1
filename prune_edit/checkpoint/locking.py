"""One writer a target: a lock file beside it, which the system lets go of when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prune_edit.errors import OutputExistsError

try:
    fcntl: Any = import_module("fcntl")
except ImportError:  # not POSIX
    fcntl = None

P = ParamSpec("P")
R = TypeVar("R")
_held: dict[Path, int] = {}  # by this process: how often it was asked for


def lock_path(target: Path) -> Path:
    """The lock file of an output."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def locked(out: str | Path) -> Iterator[bool]:
    """Hold the output for this process alone; whether that was possible on this file system.

    The same process may hold it again. Raises OutputExistsError where another one holds it,
    OSError.
    """
    target = Path(out).resolve()
    if target in _held:
        _held[target] += 1
        try:
            yield True
        finally:
            _held[target] -= 1
        return
    descriptor = _acquire(target)
    if descriptor is None:
        yield False
        return
    _held[target] = 1
    try:
        yield True
    finally:
        del _held[target]
        with suppress(OSError):
            lock_path(target).unlink()
        os.close(descriptor)


def claims_output(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb hold its `out` from its start, so that a second run is told before it works."""
    described = signature(verb)

    @wraps(verb)
    def holding(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = described.bind(*args, **kwargs)
        bound.apply_defaults()
        out = Path(bound.arguments["out"])
        with ExitStack() as stack:
            # Where nothing can be made, the verb says so when it has looked at what it was given.
            if out.resolve().parent.is_dir():
                with suppress(OSError):
                    stack.enter_context(locked(out))
            return verb(*args, **kwargs)

    return holding


def _acquire(target: Path) -> int | None:
    """An open, locked descriptor, or None where there are no such locks."""
    if fcntl is None:
        return None
    path = lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputExistsError(
                f"{target} is being written by another run (process {holder}); wait for it, or "
                "give another --out"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            return None
        # Whoever held it may have removed the file between our opening and our locking it.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)
