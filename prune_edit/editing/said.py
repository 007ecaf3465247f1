"""What a model says after a concept's prompts, as a task: for a recovery that must not lose it."""

from __future__ import annotations

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.concept import Concept
from prune_edit.editing.generation import sample
from prune_edit.errors import TaskError
from prune_edit.running import Running
from prune_edit.tasks.task import Example, Task

_SAMPLES = 64  # of a prompt
_TOKENS = 2
_PROMPTS = 64


@torch.no_grad()
def said_task(decoder: Decoder, concept: Concept, options: Running) -> Task:
    """Continuations that the model itself draws after the concept's training prompts, both sides.

    So they have its stereotypes, as often as it has them. Raises TaskError where it says nothing.
    """
    prompts = dict.fromkeys(
        prompt for pair in concept.train for prompt in (pair.prompt, pair.contrast) if prompt
    )
    generator = torch.Generator().manual_seed(options.seed)
    step = max(1, len(prompts) // _PROMPTS)
    examples: list[Example] = []
    for number, prompt in enumerate(list(prompts)[::step]):
        texts = sample(decoder, prompt, _SAMPLES, _TOKENS, generator)
        # A continuation drawn twice counts twice.
        examples += [
            Example(prompt, text, key=f"{number} {draw}")
            for draw, text in enumerate(texts)
            if text.strip()
        ]
    if not examples:
        raise TaskError(f"the model says nothing after the prompts of concept {concept.name!r}")
    return Task(f"said-{concept.name}", tuple(examples), "what the dense model says")
