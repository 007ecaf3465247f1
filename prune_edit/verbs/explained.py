"""Verb `explain`: why a model says what it says, how it does a task, or what an adapter changed."""

from __future__ import annotations

from pathlib import Path

from prune_edit.decoder import Decoder
from prune_edit.errors import PruneEditError
from prune_edit.explain import (
    LoraExplanation,
    PromptExplanation,
    TaskExplanation,
    about_of,
    ask,
    explain_adapter,
    explain_prompt,
    explain_task,
)
from prune_edit.fitting import fit_task
from prune_edit.loading import load_decoder
from prune_edit.recover.shrink import without_dead
from prune_edit.recovery import Note
from prune_edit.samples import Samples
from prune_edit.scoring import Options, Progress, load_adapter, silent
from prune_edit.tasks.prompts import Encoded
from prune_edit.verbs.common import Tasks, as_task, base_name, check_limit, ignore

EXAMPLES = 64
"""Prompts of a task, where nothing else is said."""
_SPLIT = "test"


def explain(
    model: str | Path | None = None,
    prompt: str | None = None,
    *,
    task: Tasks | None = None,
    answer: str | None = None,
    token: int | None = None,
    adapter: str | Path | None = None,
    verify: bool = False,
    top: int = 10,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = silent,
    note: Note = ignore,
) -> PromptExplanation | TaskExplanation | LoraExplanation:
    """Explain what a model says after a prompt, or how it does a task (default: arithmetic).

    Of an `answer` of several tokens the `token`-th (from 1) is explained; where the model does not
    say it, what it says instead. With `verify`, every edge of the chain is cut and measured. With
    an `adapter`, a folder of peft's, it is what that changed, over the prompt or the task. `top`
    neurons are listed; a task is seen through at most `limit` (64) test prompts. Raises ModelError,
    TaskError, PruneEditError for settings that do not go together.
    """
    check_limit(limit)
    _check(prompt, task, answer, token, adapter, verify, top)
    decoder = without_dead(load_decoder(model, device=device, dtype=dtype))
    options = Options(seed=seed, progress=progress)
    about = about_of(decoder, options, base_name(decoder))
    if adapter is None and prompt is not None:
        found = explain_prompt(decoder, prompt, options, about, answer, token, verify, top)
        for text in found.question.notes:
            note(text)
        return found
    if adapter is None:
        name, prompts = _prompts(decoder, task, limit, options, note)
        whole = explain_task(decoder, name, prompts, options, about, top)
        for text in whole.notes:
            note(text)
        return whole
    adapted = load_adapter(decoder, adapter)
    folder = Path(adapter).resolve().name
    if prompt is None:
        name, prompts = _prompts(decoder, task, limit, options, note)
        return explain_adapter(decoder, adapted, folder, name, prompts, options, about, (), top)
    # Both models are asked for what the tuned one says.
    question = ask(adapted, prompt, answer, token)
    for text in question.notes:
        note(text)
    return explain_adapter(
        decoder, adapted, folder, f"{prompt} -> {question.answer}", [question.row], options, about,
        question.notes, top,
    )  # fmt: skip


def _check(
    prompt: str | None,
    task: Tasks | None,
    answer: str | None,
    token: int | None,
    adapter: str | Path | None,
    verify: bool,
    top: int,
) -> None:
    """Raise PruneEditError for settings that do not go together."""
    if prompt is not None and task is not None:
        raise PruneEditError("a prompt and a task are two things to explain; give one of them")
    if prompt is None and (answer is not None or token is not None):
        raise PruneEditError("an answer belongs to a prompt; give one, or leave out --answer")
    if verify and (prompt is None or adapter is not None):
        raise PruneEditError(
            "--verify cuts the edges of one prompt's chain; give a prompt and no adapter"
        )
    if top < 1:
        raise PruneEditError(f"top {top} lists no neurons; give at least 1")


def _prompts(
    decoder: Decoder, task: Tasks | None, limit: int | None, options: Options, note: Note
) -> tuple[str, list[Encoded]]:
    """The task's name, and its prompts for this model."""
    fitted = fit_task(as_task("arithmetic" if task is None else task), decoder, options, note)
    data = Samples(fitted, decoder, EXAMPLES if limit is None else limit)
    return fitted.name, data.encoded(_SPLIT, EXAMPLES)
