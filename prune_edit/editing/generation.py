"""What the model writes: continuations drawn with a seed, the concept's words counted in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.editing.concept import Concept
from prune_edit.running import Running
from prune_edit.tasks.prompts import text_ids

SAMPLES = 32
TOKENS = 12


@torch.no_grad()
def sample(
    decoder: Decoder, prompt: str, count: int, tokens: int, generator: torch.Generator
) -> list[str]:
    """`count` continuations of at most `tokens` tokens, drawn from the model's distribution."""
    front = text_ids(decoder.tokenizer, prompt)
    if (limit := decoder.max_positions) is not None:
        tokens = min(tokens, limit - len(front) + 1)
    ids = torch.tensor([front]).repeat(count, 1).to(decoder.device)
    end = decoder.tokenizer.eos_token_id
    for _ in range(max(0, tokens)):
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        states = decoder.final_states(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places
        )
        chances = decoder.unembed(states[:, -1]).float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, drawn], 1)
    texts = []
    for row in ids[:, len(front) :].tolist():
        row = row[: row.index(end)] if end in row else row
        texts.append(str(decoder.tokenizer.decode(row)))
    return texts


def count_words(texts: Iterable[str], words: Iterable[str]) -> int:
    """How often whole words, or phrases of them, stand in the texts."""
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return sum(len(re.findall(rf"\b(?:{pattern})\b", text)) for text in texts)


def generated(decoder: Decoder, concept: Concept, seed: int, options: Running) -> dict[str, Any]:
    """Words of each group in what follows the held-out prompts of each group.

    `counts[group][words]`: after prompts about `group`, words counted for `words`. `follows` is the
    share of all counted words that are their prompt's own, chance being one in as many as there are
    groups; None where no such word was written.
    """
    prompts: dict[str, dict[str, None]] = {}
    for pair in concept.held_out:
        prompts.setdefault(pair.group, {})[pair.prompt] = None
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, dict[str, int]] = {}
    examples: list[str] = []
    done, total = 0, sum(map(len, prompts.values()))
    for group, some in sorted(prompts.items()):
        texts: list[str] = []
        for prompt in some:
            found = sample(decoder, prompt, SAMPLES, TOKENS, generator)
            examples.append(f"{prompt} ... {found[0]}")
            texts += found
            done += 1
            options.progress("writing", done, total)
        counts[group] = {
            name: count_words(texts, words) for name, words in sorted(concept.counted.items())
        }
    own, every = follows(counts)
    return {
        "continuations": total * SAMPLES,
        "counts": counts,
        "follows": own / every if every else None,
        "examples": _some(examples),
    }


def follows(counts: Mapping[str, Mapping[str, int]]) -> tuple[int, int]:
    """Counted words that are their prompt's own group's, and all."""
    own = sum(row.get(group, 0) for group, row in counts.items())
    return own, sum(sum(row.values()) for row in counts.values())


def _some(texts: Sequence[str]) -> list[str]:
    return list(texts[:: max(1, len(texts) // 6)])[:6]
