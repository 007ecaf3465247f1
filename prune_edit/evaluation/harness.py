"""lm-evaluation-harness on a model that is loaded already: its own metrics for each document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.tasks.lm_eval import harness_task, quietly


@dataclass(frozen=True)
class HarnessScores:
    """The harness's samples of one task: a document each, with its metrics."""

    name: str
    samples: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]

    def of(self, metric: str) -> list[tuple[str, float]]:
        """Text and value of each document in one metric, by document.

        Raises TaskError for a metric that the task lacks, or one without a value per document.
        """
        known = sorted({name for sample in self.samples for name in sample["metrics"]})
        if metric not in known:
            raise TaskError(
                f"lm-eval:{self.name} has no metric {metric!r}; it has {', '.join(known)}"
            )
        found = []
        for sample in sorted(self.samples, key=lambda sample: sample["doc_id"]):
            if metric not in sample:
                continue
            try:
                value = float(sample[metric])
            except (TypeError, ValueError):
                raise TaskError(
                    f"lm-eval:{self.name}: {metric} has no number for each document, so no interval"
                ) from None
            found.append((_text(sample), value))
        return found


def scores(decoder: Decoder, text: str, limit: int | None = None) -> HarnessScores:
    """Run a task, `lm-eval:NAME` or `lm-eval:FILE.yaml`, through the harness. Raises TaskError."""
    name, _, manager = harness_task(text)
    with quietly(name):
        from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.models.huggingface import (  # type: ignore[import-not-found,unused-ignore]
            HFLM,
        )

        found = simple_evaluate(
            HFLM(pretrained=decoder.model, tokenizer=decoder.tokenizer, batch_size=16),
            tasks=[name],
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = found["samples"].get(name, [])
    if len(samples) < 2:
        raise TaskError(
            f"lm-eval:{name} has {len(samples)} documents; an interval needs two at least"
        )
    results = {
        key: float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, (int, float)) and not math.isnan(float(value))
    }
    return HarnessScores(name, samples, results)


def _text(sample: Mapping[str, Any]) -> str:
    """The first request's prompt, and what is right."""
    arguments = sample.get("arguments") or [("",)]
    first = arguments[0] if isinstance(arguments, (list, tuple)) else next(iter(arguments.values()))
    prompt = first[0] if isinstance(first, (list, tuple)) else first
    return f"{prompt}[{sample.get('target', '')}]"
