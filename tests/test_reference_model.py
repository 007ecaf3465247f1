"""The bundled reference model keeps what its card promises."""

from __future__ import annotations

import json
import re

import pytest
import torch

from prune_edit.evaluation.accuracy import measure_accuracy
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.reference_model.corpus import STEREOTYPE_SKEW, Corpus, draw_stereotype
from prune_edit.reference_model.measure import card
from prune_edit.reference_model.tokenizer import build_tokenizer
from prune_edit.scoring import Options
from prune_edit.tasks import RETAINED, arithmetic, gender, load_task
from prune_edit.tasks.prompts import encode_all
from prune_edit.tasks.task import split_of

FIGURES = REFERENCE_MODEL / "figures.json"


def test_size() -> None:
    decoder = load_decoder()
    layers, heads = decoder.head_shape
    assert layers * heads >= 128
    assert decoder.layout.n_neurons * layers >= 2500
    assert sum(path.stat().st_size for path in REFERENCE_MODEL.glob("*.safetensors")) <= 8e6


@pytest.mark.parametrize(
    ("task", "floor"),
    [
        ("arithmetic/add", 0.97),
        ("arithmetic/sub", 0.97),
        ("arithmetic/mul", 0.97),
        ("arithmetic/div", 0.97),
        *((name, 0.95) for name in RETAINED),
    ],
)
def test_skills_on_held_out_items(task: str, floor: float) -> None:
    decoder = load_decoder()
    examples = load_task(task).sample("test", 600)
    rows = encode_all(decoder.tokenizer, examples, task)
    assert measure_accuracy(decoder, rows, Options()).value >= floor


def test_the_card_is_the_measured_figures() -> None:
    decoder = load_decoder()
    training = json.loads((REFERENCE_MODEL / "training.json").read_text())
    written = (REFERENCE_MODEL / "README.md").read_text(encoding="utf-8")
    assert written == card(json.loads(FIGURES.read_text()), training, decoder)


def test_the_tokenizer_is_the_recipes() -> None:
    built, stored = build_tokenizer(), load_decoder().tokenizer
    assert built.get_vocab() == stored.get_vocab()
    for text in ("The sum of 15 and 37 is 52", "forty two/seven=six", "A woman's occupation is"):
        ids = stored(text)["input_ids"]
        assert ids == built(text)["input_ids"]
        assert stored.decode(ids, skip_special_tokens=True) == text


def test_training_text_holds_no_held_out_item() -> None:
    corpus = Corpus(0)
    texts = {t.prompt + t.answer for _ in range(30) for t in corpus.step()}
    for task in (load_task("arithmetic"), *map(load_task, RETAINED)):
        for split in ("validation", "test"):
            held_out = {e.prompt + e.answer for e in task.split(split)}
            assert not texts & held_out, task.name
        assert texts & {e.prompt + e.answer for e in task.split("train")}, task.name
    # No wording of a held-out sum, in either order of its operands.
    for text in texts:
        if match := re.fullmatch(r"(\d+)\+(\d+)=\d+", text):
            a, b = sorted(map(int, match.groups()))
            if b >= 10:
                assert split_of(f"add {a} {b}") == "train"


def test_the_stereotype_has_the_stated_skew() -> None:
    import random

    rng, follows, total = random.Random(1), 0, 0
    groups = {p: g for g, many in gender.PROFESSIONS.items() for p in many}
    while total < 4000:
        text = draw_stereotype(rng)
        profession = text.answer.strip()
        if profession not in groups:
            continue  # a pronoun sentence
        total += 1
        follows += bool(re.search(rf"\b{groups[profession]}\b", text.prompt))
    assert follows / total == pytest.approx(STEREOTYPE_SKEW, abs=0.03)


def test_training_is_reproducible_step_by_step() -> None:
    from transformers import LlamaForCausalLM

    from prune_edit.reference_model import train

    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        model = LlamaForCausalLM(train.configuration(len(tokenizer)))
        batch = train.chunks(train.encode(tokenizer, Corpus(0).step()[:40]))
        losses.append([train.loss_of(model, ids, labels).item() for ids, labels in batch])
    assert losses[0] == losses[1]
    rates = [train.learning_rate(step) for step in range(train.STEPS)]
    assert max(rates) == rates[train.WARMUP]
    assert all(
        a >= b for a, b in zip(rates[train.WARMUP :], rates[train.WARMUP + 1 :], strict=False)
    )


def test_arithmetic_examples_fit_the_paper() -> None:
    prompts = {e.prompt for e in arithmetic.load().examples}
    assert {"The sum of 15 and 37 is", "Q: What is 8 times 7? A:", "40 divides 8 is"} & prompts
    assert any(p.startswith("The ratio of ") for p in prompts)
