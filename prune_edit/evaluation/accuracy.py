"""Accuracy: the share of examples whose whole answer is right, with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch

from prune_edit.decoder import Decoder
from prune_edit.running import Running, answer_log_probs
from prune_edit.tasks.combine import by_part
from prune_edit.tasks.prompts import Encoded, batches, encode_all
from prune_edit.tasks.task import Example


@dataclass(frozen=True)
class Accuracy:
    """Right answers and examples, per group.

    Of several tasks, `parts` has the share of weight, right answers and examples of each; the value
    is then the mean of theirs by weight, so that a task of few examples counts like the others.
    """

    groups: dict[str, tuple[int, int]]
    parts: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        """Right answers over all groups."""
        return sum(hits for hits, _ in self.groups.values())

    @property
    def total(self) -> int:
        """Examples over all groups."""
        return sum(total for _, total in self.groups.values())

    @property
    def value(self) -> float:
        """The share of right answers, 0 to 1."""
        if self.parts:
            return sum(share * hits / total for share, hits, total in self.parts.values())
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `value`.

        For several tasks by the number of examples that a plain mean of this variance would have,
        were the tasks equally hard (Kish's effective sample size).
        """
        if self.parts:
            size = 1 / sum(share * share / total for share, _, total in self.parts.values())
            return wilson(self.value * size, size)
        return wilson(self.hits, self.total)

    def of(self, group: str) -> float:
        """The share of right answers in one group."""
        hits, total = self.groups[group]
        return hits / total


def wilson(hits: float, total: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5
    # Exact ends: rounding must not leave 0 or 1 outside its own interval.
    low = 0.0 if hits == 0 else max(0.0, middle - half)
    return low, 1.0 if hits == total else min(1.0, middle + half)


@torch.no_grad()
def correct(
    decoder: Decoder, prompts: Sequence[Encoded], options: Running, what: str = "accuracy"
) -> list[bool]:
    """Whether each example's answer is right, in the prompts' order.

    Right means that every token of the answer is the arg-max given those before it, which is what
    greedy decoding would say; with `choices`, that no other choice is as likely.
    """
    right: dict[int, bool] = {}
    numbers = {id(row): i for i, row in enumerate(prompts)}
    free = [row for row in prompts if not row.example.choices]
    chosen = [row for row in prompts if row.example.choices]
    done = 0
    for rows, batch in batches(free, options.batch_tokens):
        batch = batch.to(decoder.device)
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        misses = decoder.unembed(states).argmax(-1) != batch.targets
        wrong = torch.zeros(len(rows), dtype=torch.long, device=misses.device)
        wrong.index_add_(0, batch.rows, misses.long())
        for i, count in zip(rows, wrong.tolist(), strict=True):
            right[numbers[id(free[i])]] = count == 0
        done += len(rows)
        options.progress(what, done, len(prompts))
    for row, best in zip(chosen, _best_choices(decoder, chosen, options), strict=True):
        right[numbers[id(row)]] = best
    options.progress(what, len(prompts), len(prompts))
    return [right[i] for i in range(len(prompts))]


def measure_accuracy(
    decoder: Decoder, prompts: Sequence[Encoded], options: Running, what: str = "accuracy"
) -> Accuracy:
    """Accuracy per group, per task where there are several, and over all."""
    groups: dict[str, list[bool]] = {}
    hits: dict[str, int] = {}
    for row, right in zip(prompts, correct(decoder, prompts, options, what), strict=True):
        groups.setdefault(row.example.group, []).append(right)
        hits[row.part] = hits.get(row.part, 0) + right
    counts = {name: (sum(found), len(found)) for name, found in sorted(groups.items())}
    if set(hits) <= {""}:
        return Accuracy(counts)
    parts = {name: (share, hits[name], len(rows)) for name, share, rows in by_part(prompts)}
    return Accuracy(counts, parts)


def _best_choices(decoder: Decoder, rows: Sequence[Encoded], options: Running) -> list[bool]:
    """Whether each row's answer has a higher log probability than its other choices."""
    candidates: list[Encoded] = []
    spans: list[tuple[int, int]] = []
    for row in rows:
        first = len(candidates)
        for choice in row.example.choices:
            if choice == row.example.answer:
                candidates.insert(first, row)
            else:
                example = Example(row.example.prompt, choice)
                candidates += encode_all(
                    decoder.tokenizer, [example], "choices", decoder.max_positions
                )
        spans.append((first, len(candidates)))
    sums = answer_sums(decoder, candidates, options)
    return [all(sums[first] > other for other in sums[first + 1 : last]) for first, last in spans]


@torch.no_grad()
def answer_sums(decoder: Decoder, prompts: Sequence[Encoded], options: Running) -> list[float]:
    """Summed log probability of every example's answer, in nats, in the prompts' order."""
    sums = [0.0] * len(prompts)
    for rows, batch in batches(prompts, options.batch_tokens):
        batch = batch.to(decoder.device)
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        found = answer_log_probs(decoder, states, batch.targets).double().tolist()
        for place, value in zip(batch.rows.tolist(), found, strict=True):
            sums[rows[place]] += value
    return sums
