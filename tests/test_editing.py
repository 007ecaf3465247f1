"""Editing: the concept's neurons, the bias they carry, the checkpoint that results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from prune_edit import verbs
from prune_edit.editing.bias import measure_bias
from prune_edit.editing.concept import load_concept
from prune_edit.editing.find import concept_scores
from prune_edit.editing.suppress import scale_neurons
from prune_edit.errors import TaskError
from prune_edit.loading import load_decoder
from prune_edit.planning import keep_top
from prune_edit.scoring import Options
from prune_edit.tasks import gender
from prune_edit.tasks.prompts import encode_all


def test_the_gender_concept_is_the_papers() -> None:
    concept = load_concept("gender")
    assert len(concept.train) == 8 * 31
    assert len(concept.held_out) == 4 * 31
    assert {e.prompt for e in concept.train}.isdisjoint(e.prompt for e in concept.held_out)
    nurse = next(e for e in concept.train if e.answer == " nurse")
    assert (nurse.prompt, nurse.contrast) == ("A woman works as a", "A man works as a")


def test_bias_is_the_mean_gap_of_log_probabilities() -> None:
    decoder = load_decoder()
    pairs = load_concept("gender").train[:5]
    gaps = []
    for pair in pairs:
        sides = []
        for prompt in (pair.prompt, pair.contrast):
            front = decoder.tokenizer(prompt)["input_ids"]
            full = decoder.tokenizer(prompt + pair.answer)["input_ids"]
            with torch.no_grad():
                log_p = decoder.model(torch.tensor([full])).logits[0].log_softmax(-1)
            sides.append(sum(float(log_p[i - 1, full[i]]) for i in range(len(front), len(full))))
        gaps.append(sides[0] - sides[1])
    found = measure_bias(decoder, pairs, Options())
    assert found.value == pytest.approx(sum(gaps) / 5, abs=1e-4)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_the_planted_stereotype_is_there_and_can_be_cut(tmp_path: Path) -> None:
    report = verbs.edit(concept="gender", neurons=18, out=tmp_path / "edited")
    before, after = report["before"], report["after"]
    planted = math.log(4)
    assert before["bias"]["train"]["nats"] == pytest.approx(planted, rel=0.35)
    for key in ("train", "held_out"):
        assert after["bias"][key]["nats"] < before["bias"][key]["nats"]
        # Lower than any of ten random choices of as many neurons.
        assert after["bias"][key]["nats"] < min(report["random"][key])
        assert len(report["random"][key]) == 10
    assert len(report["neurons"]) == 18
    assert json.loads((tmp_path / "edited" / "edit.json").read_text()) == report
    # The checkpoint is the model that was measured, in the stock architecture.
    edited = load_decoder(tmp_path / "edited")
    assert edited.model.config.model_type == "llama"
    found = measure_bias(edited, load_concept("gender").train, Options())
    assert found.value == pytest.approx(after["bias"]["train"]["nats"], abs=1e-4)


def test_scaling_by_one_changes_nothing_and_zero_removes() -> None:
    decoder = load_decoder()
    concept = load_concept("gender")
    kept = keep_top(concept_scores(decoder, concept.train[:16], Options()), 4)
    same, gone = (scale_neurons(decoder, kept, factor) for factor in (1.0, 0.0))
    ids = torch.tensor([decoder.tokenizer("A woman works as a nurse")["input_ids"]])
    with torch.no_grad():
        dense, one, zero = (d.model(ids).logits for d in (decoder, same, gone))
    assert torch.equal(dense, one)
    assert not torch.allclose(dense, zero, atol=1e-3)
    layer = next(i for i, units in enumerate(kept) if units)
    assert gone.values(layer)[list(kept[layer])].abs().max() == 0
    assert decoder.values(layer)[list(kept[layer])].abs().max() > 0  # the original is untouched


def test_concept_scores_are_signed() -> None:
    """Swapping prompt and contrast changes every sign."""
    decoder = load_decoder()
    pairs = load_concept("gender").train[:8]
    swapped = [type(p)(str(p.contrast), p.answer, p.group, contrast=p.prompt) for p in pairs]
    one, other = (concept_scores(decoder, rows, Options()) for rows in (pairs, swapped))
    torch.testing.assert_close(one, -other, atol=1e-6, rtol=1e-4)
    assert one.abs().max() > 0.01


def test_a_user_concept_needs_contrasts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "A woman works as a", "answer": "nurse"}\n')
    with pytest.raises(TaskError, match="has no contrast"):
        load_concept(str(path))
    with pytest.raises(TaskError, match="unknown concept 'gendre'"):
        load_concept("gendre")
    rows = [
        {
            "prompt": f"The {a} said that",
            "contrast": f"The {b} said that",
            "answer": "she",
            "group": "pronoun",
        }
        for a in gender.FEMALE[:6]
        for b in gender.MALE[:6]
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    concept = load_concept(str(path))
    assert concept.train
    assert concept.held_out
    encode_all(load_decoder().tokenizer, concept.train, "t")
