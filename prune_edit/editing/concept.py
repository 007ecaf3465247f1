"""Concepts as contrast pairs: the same answer after two prompts that differ in the concept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prune_edit.errors import TaskError
from prune_edit.tasks import gender, jsonl
from prune_edit.tasks.task import Example


@dataclass(frozen=True)
class Concept:
    """Pairs to find neurons on, and pairs never seen while finding them.

    Every pair is an Example whose `prompt` is the stereotyped one and `contrast` the other; its
    bias is `log p(answer | prompt) - log p(answer | contrast)`.
    """

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def load_concept(name: str) -> Concept:
    """`gender`, or a JSONL file of `{prompt, contrast, answer, group?}`. Raises TaskError."""
    if name == "gender":
        return Concept("gender", _gender(gender.PROMPTS), _gender(gender.HELD_OUT_PROMPTS))
    path = Path(name)
    if not path.is_file() and path.suffix not in (".jsonl", ".json"):
        raise TaskError(f"unknown concept {name!r}; built in is gender, or give a .jsonl file")
    task = jsonl.load(path)
    for example in task.examples:
        if example.contrast is None:
            raise TaskError(
                f"{path}: the pair with prompt {example.prompt!r} has no contrast; give every line "
                '{"prompt": ..., "contrast": ..., "answer": ...}'
            )
    held_out = (*task.split("validation"), *task.split("test"))
    return Concept(task.name, task.split("train"), held_out)


def _gender(prompts: tuple[str, ...]) -> tuple[Example, ...]:
    """The paper's professions after the woman's and the man's form of each prompt."""
    woman, man = gender.GENDERS
    return tuple(
        Example(
            prompt.format(gender=stereotyped),
            f" {profession}",
            group=stereotyped,
            contrast=prompt.format(gender=other),
        )
        for stereotyped, other in ((woman, man), (man, woman))
        for profession in gender.PROFESSIONS[stereotyped]
        for prompt in prompts
    )
