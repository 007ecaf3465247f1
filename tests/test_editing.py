"""Editing: the concept's units, the bias they carry, the search, the checkpoint, and back again."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_families import family_model

from prune_edit import verbs
from prune_edit.decoder import Decoder
from prune_edit.editing import writing
from prune_edit.editing.bias import bootstrap, measure_bias, paired_test, units_of
from prune_edit.editing.chance import random_edit
from prune_edit.editing.concept import (
    HELD_OUT,
    concept_of,
    gender_pairs,
    load_concept,
    pronoun_pairs,
)
from prune_edit.editing.edit import Change, applied, edit_of
from prune_edit.editing.find import concept_scores, head_scores
from prune_edit.editing.generation import count_words, generated, sample
from prune_edit.editing.guard import Watched, guards_of
from prune_edit.editing.probe import probe_pairs
from prune_edit.editing.pursuit import pursue
from prune_edit.editing.search import SearchSettings
from prune_edit.editing.slopes import guard_slopes, pair_slopes, space_of
from prune_edit.editing.suppress import plain_edit
from prune_edit.errors import BudgetError, EditError, TaskError
from prune_edit.hooks import scale
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.scoring import Options
from prune_edit.tasks import Example, gender, load_task
from prune_edit.units import Units
from prune_edit.verbs.edited import _write as write_edit

QUICK = SearchSettings(rounds=3, prompts=24, draws=1)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One short search on the reference model."""
    folder = tmp_path_factory.mktemp("edit") / "edited"
    report = verbs.edit(reduce="50%", retain=("facts",), settings=QUICK, out=folder)
    return folder, report


# The concept


def test_the_gender_concept_is_the_papers_and_its_splits_share_nothing() -> None:
    concept = load_concept("gender")
    assert len(concept.views["all the paper's pairs"]) == 8 * 31
    assert len(concept.views["held-out prompts"]) == 4 * 31
    splits = [concept.train, concept.validation, concept.held_out]
    for get in (lambda e: e.prompt, lambda e: e.answer):
        seen = [{get(e) for e in rows} for rows in splits]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    pairs = concept.views["all the paper's pairs"]
    nurse = next(e for e in pairs if e.answer == " nurse")
    assert (nurse.prompt, nurse.contrast) == ("A woman works as a", "A man works as a")
    assert {e.split for e in gender.factual_pairs("train")} == {"train"}
    told = {(e.prompt, e.contrast, e.answer) for e in gender.factual_pairs("train")}
    assert ("The mother said that", "The father said that", " she") in told or len(told) > 200


def test_grids_and_families_of_pairs_are_dealt_without_sharing(tmp_path: Path) -> None:
    grid = [
        Example(f"The {who} man in place {i} is a", f" job{j}", who, f"The other man in {i} is a")
        for who in ("old", "young", "rich")
        for i in range(8)
        for j in range(8)
    ]
    concept = concept_of("age", grid)
    for a, b in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        one, two = getattr(concept, a), getattr(concept, b)
        assert not {e.answer for e in one} & {e.answer for e in two}
        assert not {e.prompt for e in one} & {e.prompt for e in two}
    assert set(concept.views) == {"held-out prompts", "held-out answers"}
    single = [Example(f"p{i}", f" a{i}", "g", f"c{i}") for i in range(40)]
    dealt = concept_of("single", single)
    assert len(dealt.train) + len(dealt.validation) + len(dealt.held_out) == 40
    assert concept_of("single", single[::-1]).train[0] in dealt.train
    with pytest.raises(TaskError, match="group 'lone' has one pair"):
        concept_of("x", [*grid, Example("p", " a", "lone", "c")])
    with pytest.raises(TaskError, match="leave none to hold out"):
        concept_of("x", grid[:2])


def test_a_file_may_compare_with_several_groups_and_a_neutral_form(tmp_path: Path) -> None:
    path = tmp_path / "belief.jsonl"
    contrasts = ["A man works as a", "A person works as a"]
    rows = [
        {"prompt": f"{i} woman works as a", "contrast": contrasts, "answer": "nurse", "group": "w"}
        for i in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    concept = load_concept(str(path))
    pairs = [*concept.train, *concept.validation, *concept.held_out]
    assert len(pairs) == 16
    assert {pair.contrast for pair in pairs} == set(contrasts)
    for line, said in (
        ({"prompt": "p", "answer": "a"}, "has no contrast"),
        ({"prompt": "p", "contrast": "p", "answer": "a"}, "are the same"),
        ({"prompt": "p", "contrast": [], "answer": "a"}, "list of contrasts is empty"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(TaskError, match=said):
            load_concept(str(path))
    with pytest.raises(TaskError, match="unknown concept 'gendre'"):
        load_concept("gendre")


# Measuring


def test_bias_is_the_mean_gap_of_log_probabilities(decoder: Decoder) -> None:
    both = {"woman": ("nurse", "domestic helper"), "man": ("driver",)}
    pairs = gender_pairs(gender.PROMPTS[:2], both)
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
    found = measure_bias(decoder, pairs)
    assert found.value == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert found.gaps == pytest.approx(gaps, abs=1e-4)
    assert found.interval[0] <= found.value <= found.interval[1]
    assert found.size == pytest.approx(sum(map(abs, gaps)) / len(gaps), abs=1e-4)
    # Answers of one prompt run once.
    assert len(probe_pairs(decoder, pairs).texts.ids) < 2 * len(pairs)


def test_choices_are_compared_after_one_prompt(decoder: Decoder) -> None:
    pair = gender.pronoun_example("The nurse", "woman", 0)
    ids = decoder.tokenizer(pair.prompt)["input_ids"]
    with torch.no_grad():
        log_p = decoder.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    she, he = (decoder.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("she", "he"))
    found = measure_bias(decoder, [pair])
    assert found.value == pytest.approx(float(log_p[she] - log_p[he]), abs=1e-4)


def test_intervals_draw_prompts_and_answers_and_the_test_knows_noise() -> None:
    pairs = [Example(f"p{i}", f" a{j}", "", f"c{i}") for i in range(5) for j in range(6)]
    values = torch.linspace(0, 1, 30)
    low, high = bootstrap(pairs, values)
    assert low < 0.5 < high
    spread = torch.tensor([float(i) for i in range(5) for _ in range(6)])  # differs by prompt
    wide = bootstrap(pairs, spread)
    naive = spread.std() / math.sqrt(30)
    assert wide[1] - wide[0] > 1.5 * 2 * 1.96 * float(naive) / 1.5
    assert paired_test(pairs, [1.0] * 30) < 0.05
    assert paired_test(pairs, [(-1.0) ** (i // 1 % 6) for i in range(30)]) > 0.5


def test_sentences_about_one_profession_count_as_one() -> None:
    """Ten sentences of each of four professions are four facts, not forty."""
    pairs = pronoun_pairs({"woman": ("nurse", "maid"), "man": ("guard", "pilot")},
                                          range(10))  # fmt: skip
    gaps = [1.0 if "nurse" in p.prompt or "maid" in p.prompt else 0.9 for p in pairs]
    assert len({*units_of(pairs)}) == 4
    assert paired_test(pairs, gaps) > 0.1  # 2 of 16 sign patterns
    loose = [replace(pair, key="") for pair in pairs]
    assert len({*units_of(loose)}) == 40
    assert paired_test(loose, gaps) < 0.001
    # By profession the interval is wider, too.
    values = torch.tensor([float(p.key == "nurse") for p in pairs])
    wide, narrow = bootstrap(pairs, values), bootstrap(loose, values)
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
    # Contrast pairs of one profession stand together, whatever the prompt.
    grid = gender_pairs(gender.PROMPTS, {"woman": ("nurse", "maid"), "man": ("guard",)})
    assert len({*units_of(grid)}) == 3


def test_concept_scores_are_signed(decoder: Decoder) -> None:
    """Swapping prompt and contrast changes every sign, for neurons and heads."""
    pairs = load_concept("gender").train[:8]
    swapped = [type(p)(str(p.contrast), p.answer, p.group, contrast=p.prompt) for p in pairs]
    one, other = (concept_scores(decoder, rows, Options()) for rows in (pairs, swapped))
    torch.testing.assert_close(one, -other, atol=1e-6, rtol=1e-4)
    assert one.abs().max() > 0.01
    heads, against = (head_scores(decoder, rows, Options()) for rows in (pairs, swapped))
    torch.testing.assert_close(heads, -against, atol=1e-5, rtol=1e-4)
    best = int(heads.argmax())
    factors = torch.ones(decoder.head_shape)
    factors.view(-1)[best] = 0
    with scale(decoder, Units(heads=factors)):
        without = measure_bias(decoder, pairs).value
    fallen = measure_bias(decoder, pairs).value - without
    assert fallen == pytest.approx(float(heads.max()), abs=1e-4)


def test_slopes_of_pairs_are_what_small_changes_do(decoder: Decoder) -> None:
    probe = probe_pairs(decoder, load_concept("gender").train[:12])
    space = space_of(decoder, probe, heads=True, moved=True)
    units = torch.tensor([3, space.n_heads + 63 + 6 * 384, space.n_heads + 170 + 384])
    theta = torch.zeros(space.n_units, 2)
    theta[units, 0] = 0.3
    gaps, slopes = pair_slopes(space, theta, probe, units)
    with torch.no_grad(), applied(decoder, space.edit(theta)):
        torch.testing.assert_close(gaps, probe.gaps(decoder), atol=1e-4, rtol=1e-4)
    step = 1e-2
    for place, unit in enumerate(units.tolist()):
        for part in (0, 1) if place else (0,):
            found = []
            for sign in (1, -1):
                moved = theta.clone()
                moved[unit, part] += sign * step
                with torch.no_grad(), space.at(moved):
                    found.append(probe.gaps(decoder))
            slope = (found[0] - found[1]) / (2 * step)
            torch.testing.assert_close(slopes[:, place, part], slope, atol=2e-3, rtol=2e-2)
    assert slopes[:, 1:].abs().max() > 0.01
    assert slopes[:, 0, 1].abs().max() == 0  # heads have no constants


def test_curvature_foretells_the_divergence(decoder: Decoder) -> None:
    """Half of x' F x is what guards lose, for small x in all units together."""
    probe = probe_pairs(decoder, load_concept("gender").train[:4])
    space = space_of(decoder, probe, heads=False, moved=True)
    guards = guards_of(decoder, [load_task("order")])
    watched = Watched(decoder, {"order": guards.train["order"][:16]})
    units = space.there.nonzero().flatten()
    zero = torch.zeros(space.n_units, 2)
    assert watched.damage(lambda: space.at(zero)) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    direction = 0.02 * torch.randn(space.n_units, 2, generator=generator)
    direction[~space.there] = 0
    real = watched.damage(lambda: space.at(direction))
    ((batch, dense, share),) = watched.batches()
    told = 0.0
    for theta, expected in ((zero, 0.0), (direction, real)):
        damage, slope, rows = guard_slopes(space, theta, batch, dense, units, share, 8, generator)
        assert damage == pytest.approx(expected, rel=1e-3, abs=1e-6)
        told = told or float((rows[16:] * direction[units]).sum((1, 2)).pow(2).sum()) / 2
    assert told == pytest.approx(real, rel=0.35)
    assert float((slope * direction[units]).sum()) == pytest.approx(2 * real, rel=0.35)


def test_the_pursuit_finds_the_few_that_make_the_target() -> None:
    generator = torch.Generator().manual_seed(3)
    columns = torch.randn(60, 40, 2, generator=generator)
    target = 2 * columns[:, 7, 0] - columns[:, 21].sum(1) + 0.5 * columns[:, 33, 1]
    kinds = (torch.arange(40) > 30).long()
    assert pursue(columns, target, 1e-6, kinds, (2, 1)) == [7, 21, 33]
    assert pursue(columns, target, 1e-6, kinds, (2, 0)) == [7, 21]
    assert pursue(columns, torch.zeros(60), 1e-6, kinds, (2, 1)) == []


def test_continuations_are_drawn_with_the_seed_and_words_counted(decoder: Decoder) -> None:
    drawn = [
        sample(decoder, "A woman works as a", 4, 3, torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert count_words([" she is a nurse", "nurses, she"], ("she", "nurse")) == 3
    assert count_words(["a dental assistant"], ("dental assistant", "dental")) == 1
    concept = load_concept("gender")
    few = replace(concept, held_out=concept.held_out[:1] + concept.held_out[-1:])
    found = generated(decoder, few, 0, Options())
    assert found["continuations"] == 64
    assert 0.5 < found["follows"] <= 1


# The edit


def test_an_edit_scales_shifts_and_can_be_done_in_part(decoder: Decoder) -> None:
    edit = edit_of(
        decoder,
        [Change("neuron", 1, 3, 0.0, 0.5), Change("head", 0, 2, 0.5), Change("neuron", 2, 1, 1.0)],
    )
    assert [change.name for change in edit.changes] == ["0^2", "1_3"]
    assert type(edit).from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
    ids = torch.tensor([decoder.tokenizer("A woman works as a nurse")["input_ids"]])
    with torch.no_grad():
        dense = decoder.model(ids).logits
        with applied(decoder, edit.part(0.0)):
            assert torch.equal(decoder.model(ids).logits, dense)
        with applied(decoder, edit):
            assert not torch.allclose(decoder.model(ids).logits, dense, atol=1e-3)
        assert torch.equal(decoder.model(ids).logits, dense)
    other = random_edit(decoder, edit, torch.Generator().manual_seed(1))
    assert [c.factor for c in other.changes] == [c.factor for c in edit.changes]


def test_the_mean_and_the_range_are_those_of_the_pairs(decoder: Decoder) -> None:
    pairs = load_concept("gender").train[:6]
    units = [(5, 10), (7, 11)]
    mean = plain_edit(decoder, units, "mean", None, pairs, Options())
    assert [change.factor for change in mean.changes] == [0.0, 0.0]
    clamp = plain_edit(decoder, units, "clamp", None, pairs, Options())
    for change in clamp.changes:
        assert 0 <= change.factor < 1
    zero = plain_edit(decoder, units, "zero", None, pairs, Options())
    assert {change.how for change in zero.changes} == {"zero"}
    doubled = plain_edit(decoder, units, "amplify", None, pairs, Options())
    assert {change.factor for change in doubled.changes} == {2.0}


def test_the_planted_stereotype_is_found_and_goes(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, report = searched
    before, after = report["before"], report["after"]
    paper = "all the paper's pairs"
    assert before["bias"][paper]["nats"] == pytest.approx(math.log(4), rel=0.35)
    assert len(report["units"]) <= 30 < 0.01 * report["of"]["neurons"]
    for view in ("training", paper, "held-out prompts", HELD_OUT):
        assert report["tests"][view]["reduction"] > 0.3
        assert abs(after["bias"][view]["nats"]) < min(report["random"][view])
        assert len(report["random"][view]) == 20
        # Random units, changed alike, take less than a twentieth of it.
        mean = sum(report["random"][view]) / 20
        assert mean > 0.95 * before["bias"][view]["nats"]
    assert report["tests"][HELD_OUT]["p"] < 0.05
    assert after["tasks"]["factual-gender"]["accuracy"] >= 0.99
    assert after["plausible_mass"] > 0.98 * before["plausible_mass"]
    assert json.loads((folder / "edit.json").read_text()) == report
    curve = report["curve"]
    assert curve[0]["reduction"] == pytest.approx(0, abs=1e-6)
    assert curve[-1]["reduction"] > curve[1]["reduction"] > 0
    names = [{row["name"] for row in report["scores"][key]} for key in ("neurons", "heads")]
    assert all(names)
    # The checkpoint is the model that was measured, in the stock architecture.
    edited = load_decoder(folder)
    assert edited.model.config.model_type == "llama"
    found = measure_bias(edited, load_concept("gender").train)
    assert found.value == pytest.approx(after["bias"]["training"]["nats"], abs=1e-4)
    assert (folder / "edit.png").is_file() and (folder / "edit.svg").is_file()
    card = (folder / "README.md").read_text()
    assert "unbiased" not in card
    assert all(
        part in card for part in ("## What was edited", "## Measured", "## Limits", "--undo")
    )


def test_undo_restores_the_original_to_the_byte(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = searched
    was, now = ((d / "model.safetensors").read_bytes() for d in (REFERENCE_MODEL, folder))
    assert was != now
    found = verbs.undo(folder, tmp_path / "back")
    assert found["restored"] == ["config.json", "model.safetensors"]
    for name in found["restored"]:
        assert (tmp_path / "back" / name).read_bytes() == (REFERENCE_MODEL / name).read_bytes()
    assert load_decoder(tmp_path / "back").digest == load_decoder().digest
    record = json.loads((folder / "edits.json").read_text())
    record["restore"]["originals"].popitem()
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "edits.json").write_text(json.dumps(record))
    with pytest.raises(EditError, match="have changed since"):
        verbs.undo(broken, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(EditError, match=r"has no edits\.json"):
        verbs.undo(REFERENCE_MODEL, tmp_path / "no")


def test_the_papers_way_zeroes_eighteen(tmp_path: Path) -> None:
    report = verbs.edit(
        neurons=18, scale=0.0, guard_weight=0, protect="0%", retain=("order",), out=tmp_path / "e"
    )
    assert report["suppress"] == "scale"
    assert [row["factor"] for row in report["units"]] == [0.0] * 18
    assert all(row["promotes"] for row in report["units"])
    assert report["tests"]["held-out prompts"]["reduction"] > 0
    assert report["search"] == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_weights_hold_what_hooks_do_and_come_back(family: str, tmp_path: Path) -> None:
    """Stock families, with constants where there is room; half precision stays as it was."""
    small = family_model(family)
    source = tmp_path / "source"
    small.to(torch.bfloat16).save_pretrained(source)
    load_decoder().tokenizer.save_pretrained(source)
    loaded = load_decoder(source, dtype="float32")
    constant = 0.25 if writing.has_room(loaded) else 0.0
    edit = edit_of(loaded, [Change("neuron", 0, 1, 2.0, constant), Change("head", 1, 0, 0.0)])
    folder = tmp_path / "edited"
    folder.mkdir()
    write_edit(folder, loaded, edit, "c")
    edited = load_decoder(folder)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), applied(loaded, edit):
        wanted = loaded.model(ids).logits
    torch.testing.assert_close(edited.model(ids).logits, wanted, atol=2e-2, rtol=2e-2)
    verbs.undo(folder, tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    if not constant:
        moved = edit_of(loaded, [Change("neuron", 0, 1, 0.0, 0.5)])
        with pytest.raises(EditError, match="has no output biases"):
            writing.written_config(loaded, moved)


def test_an_edited_model_is_pruned_and_a_pruned_one_edited(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = searched
    edited = load_decoder(folder)
    scores = verbs.score(folder, task="facts", method="magnitude")
    plan = verbs.plan(scores, keep_heads="90%", keep_neurons="all")
    verbs.apply(folder, plan, tmp_path / "slim", recover="none")
    slim = load_decoder(tmp_path / "slim")
    with torch.no_grad(), scale(edited, Units(_kept(slim, "heads"), _kept(slim, "neurons"))):
        ids = torch.tensor([edited.tokenizer("A woman works as a")["input_ids"]])
        torch.testing.assert_close(
            slim.model(ids).logits, edited.model(ids).logits, atol=1e-3, rtol=1e-3
        )
    report = verbs.edit(
        tmp_path / "slim", neurons=50, suppress="mean", out=tmp_path / "again", guard_weight=0
    )
    assert load_decoder(tmp_path / "again").model.config.model_type == "pruned_llama"
    assert report["of"]["heads"] == sum(map(len, slim.layout.heads))
    verbs.undo(tmp_path / "again", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "slim" / name).read_bytes()


def _kept(decoder: Decoder, part: str) -> torch.Tensor:
    shape = decoder.head_shape if part == "heads" else decoder.neuron_shape
    found = torch.zeros(shape)
    for layer, units in enumerate(getattr(decoder.layout, part)):
        found[layer, list(units)] = 1
    return found


# What is refused


def test_no_bias_and_chance_and_bad_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "none"
    # Swapped sides have a negative bias: nothing to remove.
    rows = [
        {"prompt": str(p.contrast), "contrast": p.prompt, "answer": p.answer, "group": p.group}
        for p in gender_pairs(gender.PROMPTS, gender.PROFESSIONS)
    ]
    path = tmp_path / "swapped.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EditError, match=r"contrast is too weak: -1\.\d+ nats"):
        verbs.edit(concept=str(path), retain=("facts",), out=out)
    with pytest.raises(EditError, match="does no more than chance: bias on validation pairs"):
        verbs.edit(neurons=18, scale=1.001, retain=("facts",), out=out)
    for settings, said in (
        ({"scale": 0.0, "suppress": "mean"}, "--scale 0 is for"),
        ({"scale": 0.0, "heads": 2}, "--heads 2 is for --suppress search"),
        ({"suppress": "zero", "reduce": "50%"}, "--reduce 50% is for"),
    ):
        with pytest.raises(EditError, match=said):
            verbs.edit(out=out, **settings)  # type: ignore[arg-type]
    for settings, said in (
        ({"reduce": "0.5"}, "--reduce '0.5' is not a share"),
        ({"neurons": 4000}, "--neurons 4000: the model has 3072"),
    ):
        with pytest.raises(BudgetError, match=said):
            verbs.edit(out=out, retain=("facts",), **settings)  # type: ignore[arg-type]
    assert not out.exists()


def test_pairs_that_do_not_line_up_are_refused_dropped_or_kept(tmp_path: Path) -> None:
    good = [
        {"prompt": f"{name} said: A woman works as a", "contrast": f"{name} said: A man works as a",
         "answer": answer, "group": "w"}
        for name in gender.GIRLS for answer in ("nurse", "maid", "cleaner", "seller")
    ]  # fmt: skip
    bad = [{**row, "contrast": row["prompt"].replace("A woman", "The old man")} for row in good[:8]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good, *bad])))
    with pytest.raises(TaskError, match=r"has \d+ tokens and its contrast .*--uneven drop"):
        verbs.edit(concept=str(path), retain=("facts",), out=tmp_path / "out")
    said: list[str] = []
    with pytest.raises((EditError, TaskError)):
        verbs.edit(
            concept=str(path), retain=("facts",), uneven="drop", scale=1.0001, neurons=1,
            note=said.append, out=tmp_path / "out",
        )  # fmt: skip
    assert any("pairs are left out" in text for text in said)
    assert not (tmp_path / "out").exists()


def test_a_model_that_splits_the_professions_or_cannot_do_the_task_is_told(
    shared: Path, tmp_path: Path
) -> None:
    stories = shared / "models" / "stories260K"
    with pytest.raises(TaskError, match="has 13 tokens and its contrast 'A man works as a' 12"):
        verbs.edit(stories, out=tmp_path / "out")
    with pytest.raises(
        EditError, match=r"too weak: \+0\.\d+ nats over 106 pairs, p = 0\.\d+ by sign"
    ):
        verbs.edit(stories, uneven="keep", out=tmp_path / "out")
    rows = [
        {"prompt": p.prompt, "contrast": p.contrast, "answer": answer, "group": p.group}
        for p in gender_pairs(gender.PROMPTS, {"woman": ("nurse",), "man": ("guard",)})
        for answer in ("Iceland", "Peru", "Cuba", "Chile")
    ]
    path = tmp_path / "countries.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EditError, match="cannot do this: its answers have"):
        verbs.edit(concept=str(path), retain=("facts",), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_edit_has_a_page_and_a_picture(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, report = searched
    out = Path(shutil.copytree(folder, tmp_path / "edited"))
    found = verbs.report(out)
    page = (out / "report.html").read_text()
    assert found["kind"] == "edited"
    assert found["edit"] == json.loads(json.dumps(report))
    assert f"{report['before']['bias'][HELD_OUT]['nats']:.3f}" in page
    assert report["units"][0]["name"] in page
    assert [each["name"] for each in found["pictures"]] == ["edit.svg"]
    assert 'src="data:image/svg+xml;base64,' in page
    assert verbs.verify(out)["ok"]
