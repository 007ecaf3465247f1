"""The command line: a group whose commands are imported when they are asked for.

No torch, transformers or rich before a command does its work, so that `--help` is instant.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

import click

from prune_edit.errors import OutputWriteError, PruneEditError

COMMANDS = (
    "prune",
    "sweep",
    "score",
    "plan",
    "apply",
    "edit",
    "explain",
    "eval",
    "gate",
    "report",
    "verify",
    "export",
    "tasks",
)
_SHARED = ("score",)  # what several processes can do together
_RESUMING = ("prune", "sweep", "score", "apply")  # what keeps finished stages for the next run
_INTERRUPTED = 130
_REFUSED = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
)


class _Commands(click.Group):
    """The commands by name, each from its own file; every error ends as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"prune_edit.cli.{cmd_name}").command
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _write_what_it_can(sys.stdout, sys.stderr)
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:  # noqa: PTH123
            if not is_main():  # of processes launched together only the first speaks
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            return super().main(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        if _launched() and name not in _SHARED:
            raise click.UsageError(f"{name} runs in one process; start it without a launcher")
        return name, found, rest

    def invoke(self, ctx: click.Context) -> Any:
        if debugging():
            return super().invoke(ctx)
        _silence_libraries()
        _keep_freed_memory()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except PruneEditError as error:
            _fail(ctx, f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in _RESUMING
            _fail(
                ctx,
                "interrupted; no output was written"
                + (", the same command goes on from here" if resumes else ""),
                _INTERRUPTED,
            )
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader such as `head` left; click ends quietly
                raise
            if error.errno not in _REFUSED:
                _fail_unexpectedly(ctx, error)
            place = f" ({error.filename})" if error.filename else ""
            _fail(
                ctx,
                f"error: the output could not be written: {error.strerror}{place}; free some space "
                "or give another --out",
                OutputWriteError.exit_code,
            )
        except Exception as error:  # a user's terminal is no place for a traceback
            _fail_unexpectedly(ctx, error)


def _write_what_it_can(*streams: Any) -> None:
    """Let terminals that lack a character show it escaped, not end the command."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _launched() -> bool:
    """Whether a launcher started several of these processes."""
    named = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return named and os.environ["WORLD_SIZE"] != "1"


def is_main() -> bool:
    """Whether this is the process that prints and writes: the only one, or the first."""
    return not _launched() or os.environ["RANK"] == "0"


def debugging() -> bool:
    """Whether errors are to be shown with where they come from."""
    return os.environ.get("PRUNE_EDIT_DEBUG", "") not in ("", "0")


def _silence_libraries() -> None:
    """Their bars and warnings off the terminal, before they are imported; we raise instead."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: tuning frees and asks for the same megabytes every step.

    Otherwise a third of the time goes to the kernel, which clears the pages each time anew.
    """
    try:
        allocator = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: nothing to set
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    allocator(trim_threshold, 1 << 30)
    allocator(mmap_threshold, 1 << 25)  # the most that glibc takes


def _fail(ctx: click.Context, text: str, code: int) -> None:
    click.echo(" ".join(text.split()), err=True)
    ctx.exit(code)


def _fail_unexpectedly(ctx: click.Context, error: Exception) -> None:
    _fail(
        ctx,
        f"error: unexpected {type(error).__name__}: {error}; set PRUNE_EDIT_DEBUG=1 to see where, "
        "and please report it",
        PruneEditError.exit_code,
    )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 usage, 3 model, 4 family, 5 pickle, 6 task, 7 budget, 8 output "
    "exists, 9 output not written, 10 verification, 11 plan or scores, 12 edit, 130 interrupted. "
    "gate: 0 passed, 1 blocked, 2 not measured.",
)
@click.version_option(package_name="prune-edit")
def main() -> None:
    """Prune and edit language models for a task, and measure what it cost."""
