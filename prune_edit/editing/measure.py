"""What an edit did: bias, what should not change, and the mass that went elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import Bias, measure_bias
from prune_edit.editing.concept import Concept
from prune_edit.editing.probe import Probe, Texts, texts_of
from prune_edit.errors import TaskError
from prune_edit.evaluation.accuracy import Accuracy, measure_accuracy
from prune_edit.evaluation.perplexity import measure_perplexity
from prune_edit.running import Running
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import Example, Task

_EXAMPLES = 1024


@dataclass(frozen=True)
class Side:
    """One model's figures: the bias by view, and what should stay.

    `plausible` is the mean probability of all the concept's answers together after the held-out
    prompts, of both sides.
    """

    views: dict[str, Bias]
    tasks: dict[str, Accuracy | None]  # None where the model's vocabulary cannot write the task
    perplexity: float | None
    plausible: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bias": {name: bias.to_dict() for name, bias in self.views.items()},
            "tasks": {
                name: found
                and {
                    "accuracy": found.value,
                    "interval": list(found.interval),
                    "examples": found.total,
                }
                for name, found in self.tasks.items()
            },
            "perplexity": self.perplexity,
            "plausible_mass": self.plausible,
        }


def measure_side(
    decoder: Decoder,
    probes: Mapping[str, Probe],
    plausible: Texts,
    tasks: Sequence[Task],
    options: Running,
) -> Side:
    """Bias on every view, test accuracy of the tasks, perplexity of the stories, plausible mass."""
    found: dict[str, Accuracy | None] = {}
    for task in tasks:
        try:
            rows = encode_all(
                decoder.tokenizer,
                task.sample("test", _EXAMPLES),
                f"task {task.name!r}",
                decoder.max_positions,
            )
            found[task.name] = measure_accuracy(decoder, rows, options, task.name)
        except TaskError:
            found[task.name] = None
    with torch.no_grad():
        mass = plausible.sums(decoder)[0].exp().sum() / plausible.weights[1][0]
    return Side(
        {name: measure_bias(decoder, probe, options) for name, probe in probes.items()},
        found,
        measure_perplexity(decoder, None, options),
        float(mass),
    )


def plausible_texts(decoder: Decoder, concept: Concept) -> Texts:
    """Every answer of the concept after every held-out prompt and contrast.

    Of `sums`, row 0 is the log probability of each; weights' row 1 is the number of prompts.
    """
    prompts = dict.fromkeys(
        prompt
        for pair in concept.held_out
        for prompt in (pair.prompt, pair.contrast)
        if prompt is not None
    )
    rows = [Example(prompt, answer) for prompt in prompts for answer in concept.answers]
    encoded = encode_all(decoder.tokenizer, rows, "concept", decoder.max_positions)
    return texts_of([[(row, (1.0, float(len(prompts))))] for row in encoded])
