"""The reference model's tokenizer: digits one by one as in Llama, whole words for the rest."""

from __future__ import annotations

import random
import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prune_edit.tasks import arithmetic, gender, skills
from prune_edit.tasks.numbers import TENS, UNITS
from prune_edit.tasks.stories import draw_story

SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_PIECES = Regex(f"{_SPACE}?[A-Za-z]+|[0-9]|{_SPACE}|[^A-Za-z0-9{_SPACE}]")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over everything the reference model's texts can say."""
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_PIECES, "isolated")
    words = sorted(_pieces(tokenizer) - set(SPECIAL))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def _pieces(tokenizer: Tokenizer) -> set[str]:
    """Every piece of the finite tasks, and of enough drawn texts to show every word."""
    rng = random.Random(0)
    finite = (
        skills.facts(),
        skills.succession(),
        skills.copying(),
        skills.order(),
        gender.factual_gender(),
        *(arithmetic.load(name) for name in arithmetic.OPERATIONS),
    )
    texts = [example.prompt + example.answer for task in finite for example in task.examples]
    texts += [draw_story(rng) for _ in range(20_000)]
    for prompt in gender.PROMPTS + gender.HELD_OUT_PROMPTS:
        texts += [prompt.format(gender=person) for person in gender.GENDERS]
    for profession in sum(gender.PROFESSIONS.values(), ()):
        texts += [
            gender.pronoun_example(f"The {profession}", "woman", i).prompt
            for i in range(len(gender.SENTENCES))
        ]
        texts += [f"works as a {profession}"]
    pieces = set(string.digits + string.punctuation) | {_SPACE}
    # `7+5=` in words has no spaces, so number words also start right after a sign.
    pieces |= {*UNITS, *TENS, "hundred"}
    assert tokenizer.normalizer is not None and tokenizer.pre_tokenizer is not None
    for text in texts:
        split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        pieces.update(piece for piece, _ in split)
    return pieces
