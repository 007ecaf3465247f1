"""Watch every layer of a model over every prompt, also where the layers are on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prune_edit.decoder import Decoder
from prune_edit.hooks import Captured, capture
from prune_edit.running import Running, stream
from prune_edit.streamed import StreamedDecoder, resident, trace
from prune_edit.tasks.prompts import Batch, Encoded, batches

Step = tuple[int, Batch, Captured]
"""A layer, a batch, and what was captured of the layer in it."""


def each_layer(
    decoder: Decoder, prompts: Sequence[Encoded], running: Running, what: str
) -> Iterator[Step]:
    """Every layer of every batch once, a batch's layers in ascending order.

    Of a model on disk each layer is read once for as many prompts as fit, and is there meanwhile.
    """
    if isinstance(decoder, StreamedDecoder):
        yield from _from_disk(decoder, prompts, running, what)
        return
    for batch in stream(decoder, prompts, running, what):
        with capture(decoder) as seen:
            decoder.final_states(**batch.inputs)
        for layer in range(decoder.n_layers):
            yield layer, batch, seen


def _from_disk(
    decoder: StreamedDecoder, prompts: Sequence[Encoded], running: Running, what: str
) -> Iterator[Step]:
    weight = decoder.unembedding
    most = max(1, (decoder.room - decoder.work) // (2 * weight.shape[1] * weight.element_size()))
    done = 0
    running.progress(what, 0, len(prompts))
    for group in groups(prompts, min(running.batch_tokens, most), most):
        there = [batch.to(decoder.device) for batch in group]
        traced = [trace(decoder, batch.inputs) for batch in there]
        states, calls = [first for first, _ in traced], [rest for _, rest in traced]
        for layer in range(decoder.n_layers):
            with resident(decoder, layer):
                for number, batch in enumerate(there):
                    args, kwargs = calls[number][layer]
                    with capture(decoder) as seen:
                        found = decoder.layers[layer](states[number], *args, **kwargs)
                    states[number] = found[0] if isinstance(found, tuple) else found
                    yield layer, batch, seen
        done += sum(len(batch.input_ids) for batch in group)
        running.progress(what, done, len(prompts))


def groups(prompts: Sequence[Encoded], tokens: int, most: int) -> Iterator[list[Batch]]:
    """Batches of at most `tokens` padded tokens, as many together as have at most `most`."""
    group: list[Batch] = []
    held = 0
    for _, batch in batches(prompts, tokens):
        size = batch.input_ids.numel()
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
