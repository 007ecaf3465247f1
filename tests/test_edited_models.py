"""Edits end to end: several groups, heads, data sets; what a model was made from."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune_edit import verbs
from prune_edit.checkpoint.manifest import differences, read_manifest
from prune_edit.checkpoint.store import replacing
from prune_edit.editing import refuse
from prune_edit.editing.asked import Asked
from prune_edit.editing.bias import measure_bias
from prune_edit.editing.concept import load_concept
from prune_edit.editing.edit import Change, edit_of
from prune_edit.editing.probe import probe_pairs
from prune_edit.editing.search import SearchSettings
from prune_edit.errors import EditError, GateError, OutputWriteError, TaskError
from prune_edit.gating.provenance import check_base
from prune_edit.gating.rules import parse_rules
from prune_edit.lineage import ancestors, block_of
from prune_edit.loading import load_decoder
from prune_edit.pruning import Pruning
from prune_edit.scoring import Options
from prune_edit.tasks.gender import BOYS, GIRLS
from prune_edit.tasks.prompts import text_ids
from prune_edit.verbs import composed
from prune_edit.verbs.edited import _write as write_edit

QUICK = SearchSettings(rounds=4, prompts=16, draws=1)
GROUPS = {
    "girl": ("lamp", "tree", "cup", "river", "stone", "book"),
    "king": ("door", "glass", "chair", "table", "spoon", "boat"),
    "boy": ("wheel", "bell", "ring", "coin", "rope", "shoe"),
}
NEUTRAL = "child"
PROMPTS = tuple(f"{name} said: The {{}} liked the" for name in (*GIRLS[:4], *BOYS[:4]))


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pico model that links three groups to words, four to one, and the pairs that ask it."""
    folder = tmp_path_factory.mktemp("groups")
    tokenizer = load_decoder().tokenizer
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
    )  # fmt: skip
    rows, weights = [], []
    for who in (*GROUPS, NEUTRAL):
        for prompt in PROMPTS:
            for group, words in GROUPS.items():
                for word in words:
                    rows.append(text_ids(tokenizer, f"{prompt.format(who)} {word}"))
                    weights.append(4.0 if who == group else 1.0)
    assert len({len(row) for row in rows}) == 1
    ids, share = torch.tensor(rows), torch.tensor(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        some = ids[torch.multinomial(share, 96, generator=generator)]
        logs = model(some).logits[:, -2].log_softmax(-1)
        loss = -logs.gather(1, some[:, -1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        json.dumps({
            "prompt": prompt.format(who),
            "contrast": [prompt.format(o) for o in (*GROUPS, NEUTRAL) if o != who],
            "answer": word,
            "group": who,
        })
        for who, words in GROUPS.items() for prompt in PROMPTS for word in words
    ]  # fmt: skip
    path = folder / "words.jsonl"
    path.write_text("\n".join(lines))
    return folder / "model", path


def test_a_bias_between_several_groups_and_a_neutral_form_goes(
    groups: tuple[Path, Path], tmp_path: Path
) -> None:
    model, pairs = groups
    report = verbs.edit(
        model, concept=str(pairs), reduce="60%", neurons=16, settings=QUICK, protect="0%",
        out=tmp_path / "edited",
    )  # fmt: skip
    before, after = report["before"]["bias"], report["after"]["bias"]
    view = "held-out prompts and answers"
    assert set(before[view]["groups"]) == set(GROUPS)
    assert before[view]["nats"] > 0.7  # log 4 was planted
    assert report["tests"][view]["reduction"] > 0.3
    for group in GROUPS:
        assert abs(after[view]["groups"][group]) < before[view]["groups"][group]
    assert report["generation"]["before"]["counts"].keys() == set(GROUPS)
    assert 0 < len(report["units"]) <= 16


def test_heads_are_searched_beside_neurons(groups: tuple[Path, Path], tmp_path: Path) -> None:
    model, pairs = groups
    report = verbs.edit(
        model, concept=str(pairs), reduce="50%", neurons=4, heads=1, settings=QUICK,
        protect="0%", out=tmp_path / "edited",
    )  # fmt: skip
    kinds = [row["kind"] for row in report["units"]]
    assert kinds.count("head") == 1
    assert kinds.count("neuron") <= 4
    assert all(row["constant"] == 0 for row in report["units"] if row["kind"] == "head")
    assert report["tests"]["training"]["reduction"] > 0.3
    # Heads are written into the weights, and come off again.
    edited, dense = load_decoder(tmp_path / "edited"), load_decoder(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert not torch.allclose(edited.model(ids).logits, dense.model(ids).logits, atol=1e-3)
    verbs.undo(tmp_path / "edited", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()


def test_data_sets_are_concepts(shared: Path) -> None:
    concept = load_concept(f"winobias:{shared / 'data' / 'winobias'}")
    assert concept.name == "winobias"
    splits = [concept.train, concept.validation, concept.held_out]
    assert all(len(rows) > 20 for rows in splits)
    keys = [{pair.key for pair in rows} for rows in splits]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    winogender = load_concept(f"winogender:{shared / 'data' / 'winogender'}")
    assert {pair.group for pair in winogender.train} == {"female", "male"}
    with pytest.raises(TaskError, match="gives no contrast pairs, so it is no concept"):
        load_concept(f"svamp:{shared / 'data' / 'svamp' / 'SVAMP.json'}")
    with pytest.raises(TaskError, match="winobias is not shipped; give its file or folder"):
        load_concept("winobias")


def test_settings_are_checked_before_a_model_is_loaded() -> None:
    assert Asked(scale=0.0).way == "scale"
    assert Asked(scale=0.0).count(3072) == 18
    assert Asked().count(3072) == 30
    with pytest.raises(EditError, match="--reduce 50% is for --suppress search"):
        verbs.edit("/nowhere", suppress="zero", reduce="50%")
    with pytest.raises(TaskError, match="unknown concept 'gendre'"):
        verbs.prune("/nowhere", edit="gendre")


def test_pruned_and_edited_in_one_go(
    groups: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = groups
    settings: dict[str, Any] = {
        "task": "order", "keep_heads": "75%", "keep_neurons": "all", "select": "one-shot",
        "recover": "least-squares", "limit": 64, "speed": False, "random": 0,
        "edit": str(pairs), "reduce": "60%", "out": tmp_path / "both",
    }  # fmt: skip
    monkeypatch.setattr(composed, "Asked", partial(Asked, neurons=16, protect="0%", settings=QUICK))
    notes: list[str] = []

    def killed(*rest: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    # An output that cannot be is known before the work.
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch, pytest.raises(OutputWriteError, match="Not a directory"):
        patch.setattr(composed, "find_edit", killed)
        verbs.prune(model, **{**settings, "out": tmp_path / "file" / "both"})
    (tmp_path / "file").unlink()
    # A run killed after the edit finds it again.
    with monkeypatch.context() as patch:
        patch.setattr("prune_edit.pruning.Pruning.result", killed)
        with pytest.raises(KeyboardInterrupt):
            verbs.prune(model, **settings)
    assert not (tmp_path / "both").exists()
    judged: list[set[str]] = []
    real = Pruning.result

    def watched(pruning: Pruning) -> Any:
        judged.append({row.part for row in pruning.recovery.validation})
        assert "said-words" in {row.part for row in pruning.recovery.scoring}
        return real(pruning)

    with monkeypatch.context() as patch:
        patch.setattr(composed, "find_edit", killed)
        patch.setattr("prune_edit.pruning.Pruning.result", watched)
        found = verbs.prune(model, **settings, note=notes.append)
    assert len(judged) == 1
    assert "said-words" not in judged[0], "what a model drew itself is neither right nor wrong"
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
    report = json.loads((tmp_path / "both" / "edit.json").read_text())
    sides = found.extra["edit"]["bias"]
    view = "held-out prompts and answers"
    nats = {name: side[view]["nats"] for name, side in sides.items()}
    assert nats["dense"] > 0.7
    assert nats["edited"] < 0.7 * nats["dense"]
    # The pruned model imitates the edited one, in the figures of the folder and really.
    assert nats["pruned"] < 0.75 * nats["dense"]
    decoder = load_decoder(tmp_path / "both")
    concept = load_concept(str(pairs))
    assert measure_bias(decoder, probe_pairs(decoder, concept.held_out)).value == pytest.approx(
        nats["pruned"], abs=1e-4
    )
    assert report["after"]["bias"][view]["nats"] == nats["pruned"]
    assert sum(map(len, decoder.layout.heads)) == 6
    names = [each["model"] for each in ancestors(block_of(decoder))]
    assert names == ["model", "model-edited-words"]
    assert verbs.verify(tmp_path / "both", against=model)["ok"]
    card = (tmp_path / "both" / "README.md").read_text()
    assert "before it was pruned" in card
    assert 'base_model: "model"' in card
    with pytest.raises(EditError, match=r"edits\.json"):
        verbs.undo(tmp_path / "both", tmp_path / "back")


def test_chance_must_lower_the_mean_and_every_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder()
    concept = load_concept("gender")
    probe = probe_pairs(decoder, concept.validation)
    change = edit_of(decoder, [Change("neuron", 7, 314, 0.9)])
    size, count = measure_bias(decoder, probe).size, len(probe.pairs)
    sides = [replace(measure_bias(decoder, probe), value=value, size=value) for value in (1.0, 0.5)]
    opposite = torch.tensor([5.0, -5.0]).repeat(count)[None, :count]

    def judge(gaps: torch.Tensor) -> float:
        both = iter(sides)
        monkeypatch.setattr(refuse, "measure_bias", lambda *rest: next(both))
        monkeypatch.setattr(refuse, "random_gaps", lambda *rest: {"validation": gaps})
        return refuse.check_chance(decoder, change, probe, 0, Options())

    assert size > 0.5
    assert judge(torch.full((1, count), 0.9)) == 0.5
    assert judge(opposite) == 0.5, "a mean of zero by wrecking is no good edit"
    with pytest.raises(EditError, match="does no more than chance"):
        judge(torch.full((1, count), 0.4))
    sides[1] = replace(sides[1], value=1.1)
    with pytest.raises(EditError, match="does no more than chance"):
        judge(torch.full((1, count), 5.0))


# What a model was made from


def edited(source: Path, out: Path) -> Path:
    """The model with a neuron halved, as `edit` writes it."""
    decoder = load_decoder(source)
    change = Change("neuron", 0, decoder.layout.neurons[0][3], 0.5)
    with replacing(out, overwrite=False) as folder:
        write_edit(folder, decoder, edit_of(decoder, [change]), "words")
    return out


@pytest.fixture(scope="module")
def line(groups: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pico model, edited, then pruned, then edited again."""
    root = tmp_path_factory.mktemp("line")
    edited(groups[0], root / "edited")
    scores = verbs.score(root / "edited", task="order", method="magnitude")
    plan = verbs.plan(scores, keep_heads="90%", keep_neurons="all")
    verbs.apply(root / "edited", plan, root / "pruned", recover="none")
    verbs.apply(root / "edited", plan, root / "masked", recover="none", format="masked")
    edited(root / "pruned", root / "twice")
    names = ("edited", "pruned", "masked", "twice")
    return {"base": groups[0], **{name: root / name for name in names}}


def test_a_model_names_all_it_was_made_from(line: dict[str, Path]) -> None:
    base = load_decoder(line["base"])
    digests = {name: load_decoder(path).digest for name, path in line.items()}
    twice = load_decoder(line["twice"])
    names = [each["model"] for each in ancestors(block_of(twice))]
    assert names == ["model", "edited", "pruned"]
    found = [each["digest"] for each in ancestors(block_of(twice))]
    assert found == [base.digest, digests["edited"], digests["pruned"]]
    for name in ("edited", "pruned"):
        assert check_base(twice, load_decoder(line[name])) == []
    assert check_base(twice, base) == []
    assert check_base(load_decoder(line["pruned"]), base) == []
    (said,) = check_base(twice, load_decoder(line["masked"]))
    assert "were both made from" in said
    other = replace(base, digest="0" * 64)
    with pytest.raises(GateError, match=r"was made from pruned .* not from"):
        check_base(twice, other)


def test_every_step_of_the_line_verifies(line: dict[str, Path]) -> None:
    for name in ("edited", "pruned", "masked", "twice"):
        assert verbs.verify(line[name])["ok"], name
        assert verbs.verify(line[name], against=line["base"])["ok"], name
    assert verbs.verify(line["twice"], against=line["pruned"])["ok"]
    found = verbs.verify(line["pruned"], against=line["edited"])
    assert "slices" in [check["name"] for check in found["checks"]]
    assert not verbs.verify(line["edited"], against=line["masked"])["ok"]


def test_an_edited_masked_model_still_says_what_is_zero(
    line: dict[str, Path], tmp_path: Path
) -> None:
    edited(line["masked"], tmp_path / "edited")
    blocks = [block_of(load_decoder(path)) for path in (line["masked"], tmp_path / "edited")]
    assert blocks[0]["heads"] == blocks[1]["heads"]
    assert sum(map(len, blocks[1]["heads"])) == 7
    assert blocks[1]["format"] == "masked"


def test_a_recorded_verdict_leaves_the_manifest_whole(line: dict[str, Path]) -> None:
    folder = line["pruned"]
    for bound, word in (({"max_ratio": 1.0}, "passed"), ({"max": 5}, "blocked")):
        wanted = parse_rules({"rule": [{"figure": "parameters", **bound}]})
        verbs.gate(folder, wanted, against=line["base"], record=True)
        assert f"## Gate: {word}" in (folder / "README.md").read_text()
        assert list(differences(folder, read_manifest(folder))) == []
    (folder / "model.sig").write_text("{}")
    try:
        with pytest.raises(OutputWriteError, match="is signed"):
            verbs.gate(folder, wanted, against=line["base"], record=True)
    finally:
        (folder / "model.sig").unlink()
