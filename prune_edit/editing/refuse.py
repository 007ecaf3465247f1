"""What is refused before and after an edit is searched: no bias, no skill, no more than chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.bias import measure_bias, paired_test
from prune_edit.editing.chance import random_gaps
from prune_edit.editing.concept import Concept
from prune_edit.editing.edit import Edit, applied
from prune_edit.editing.probe import Probe, even_pairs
from prune_edit.errors import EditError, TaskError
from prune_edit.running import Running

_CHANCE = 0.05


def fitting(
    decoder: Decoder, concept: Concept, uneven: str, note: Callable[[str], None]
) -> Concept:
    """The concept with the pairs that the tokenizer suits. Raises TaskError, also if few do."""
    where = f"concept {concept.name!r}"
    splits = {
        name: even_pairs(decoder, getattr(concept, name), uneven, where)
        for name in ("train", "validation", "held_out")
    }
    views = {}
    for name, pairs in concept.views.items():
        try:
            some = even_pairs(decoder, pairs, "drop" if uneven == "refuse" else uneven, where)
        except TaskError as error:  # words that the model does not have
            note(f"{name} are left out: {error}")
            continue
        if some:
            views[name] = some
    dropped = sum(len(getattr(concept, name)) - len(pairs) for name, pairs in splits.items())
    if dropped:
        note(f"{dropped} pairs are left out, whose tokens do not stand at the same places")
    for name, pairs in splits.items():
        if len(pairs) < 2:
            raise TaskError(
                f"{where}: the tokenizer leaves {len(pairs)} {name.replace('_', '-')} pairs of "
                f"{len(getattr(concept, name))}; reword them, or take them with --uneven keep"
            )
    return replace(
        concept,
        train=splits["train"],
        validation=splits["validation"],
        held_out=splits["held_out"],
        views=views,
    )


@torch.no_grad()
def check_can(decoder: Decoder, train: Probe) -> None:
    """Raise EditError for a model that finds the answers no likelier than any token."""
    _, levels = train.both(decoder)
    tokens = float(train.texts.weights[1].sum()) / len(train.pairs)  # of an answer
    per_token = float(levels.mean()) / tokens
    chance = -float(torch.tensor(float(decoder.unembedding.shape[0])).log())
    if per_token <= chance:
        raise EditError(
            f"the model cannot do this: its answers have {per_token:.2f} nats a token, and "
            f"{chance:.2f} would be chance; a bias among answers that it never gives means nothing"
        )


@torch.no_grad()
def check_bias(decoder: Decoder, *probes: Probe) -> None:
    """Raise EditError where there is no bias to tell from chance."""
    pairs = [pair for each in probes for pair in each.pairs]
    gaps = torch.cat([each.gaps(decoder) for each in probes]).tolist()
    mean, p = sum(gaps) / len(gaps), paired_test(pairs, gaps)
    if p > _CHANCE or mean <= 0:
        raise EditError(
            f"the contrast is too weak: {mean:+.3f} nats over {len(gaps)} pairs, p = {p:.2f} by "
            "sign flips; an edit would remove noise"
        )


@torch.no_grad()
def check_chance(
    decoder: Decoder, found: Edit, validation: Probe, seed: int, options: Running
) -> float:
    """The share of the bias that is left on validation pairs.

    Raises EditError where the edit changes nothing or lowers nothing, or as many random units do as
    much: in the mean and in the mean absolute gap, since units that wreck the model may bring the
    mean to zero by pushing some pairs far up and others far down.
    """
    if not found.changes:
        raise EditError("the search found no edit that lowers the bias; nothing was written")
    before = measure_bias(decoder, validation, options)
    with applied(decoder, found):
        after = measure_bias(decoder, validation, options)
    gaps = random_gaps(decoder, found, {"validation": validation}, seed, options)["validation"]
    drawn, sizes = gaps.mean(1), gaps.abs().mean(1)
    as_good = (drawn.abs() <= abs(after.value)) & (sizes <= after.size)
    if abs(after.value) >= abs(before.value) or bool(as_good.any()):
        raise EditError(
            f"this edit does no more than chance: bias on validation pairs {before.value:.3f} -> "
            f"{after.value:.3f} nats, with {len(drawn)} random choices of as many units "
            f"{float(drawn.min()):.3f} to {float(drawn.max()):.3f}; nothing was written"
        )
    return after.size / max(before.size, 1e-9)
