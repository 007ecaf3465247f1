"""Data sets in their published formats, their published figures, and the tasks of lm-eval."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.evaluation.published import FIGURES, measure_items, with_examples
from prune_edit.evaluation.resampling import (
    Rows,
    correlation,
    exp_mean,
    mean,
    paired_share_interval,
    quantiles,
    resampled,
)
from prune_edit.loading import load_decoder
from prune_edit.running import Running
from prune_edit.tasks import load_task, name_of
from prune_edit.tasks.datasets import DATA_SETS, DataSet, hub, load_data_set
from prune_edit.tasks.datasets.items import contrast_pair


def value(data: DataSet, figure: str, sums: Sequence[Sequence[float]]) -> float:
    return FIGURES[data.name][figure].rows(data.items, sums).value


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


# As published, beside the repository


@pytest.mark.parametrize(
    ("name", "items", "examples", "pairs"),
    [
        ("winobias", 4750, 3166, 1399),
        ("winogender", 240, 0, 120),
        ("debiaswe", 640, 0, 0),
        ("blimp", 1000, 1000, 0),
        ("svamp", 0, 1000, 0),
    ],
)
def test_published_files_are_read_whole(
    shared: Path, name: str, items: int, examples: int, pairs: int
) -> None:
    data = load_data_set(f"{name}:{shared / 'data' / name}")
    assert (len(data.items), len(data.examples), len(data.pairs)) == (items, examples, pairs)


def test_winobias_asks_whom_the_pronoun_means(shared: Path) -> None:
    data = load_data_set(f"winobias:{shared / 'data' / 'winobias'}")
    first = data.examples[0]
    assert first.prompt.endswith('The pronoun "he" refers to the')
    assert first.choices == (" developer", " designer")
    assert first.answer == " developer"
    assert first.group == "pro"
    assert all(len(example.choices) == 2 for example in data.examples)
    # Both stereotypes of a sentence are in one split and are resampled together.
    keys = [example.key for example in data.examples]
    assert len(set(keys)) == 1583
    pair = data.pairs[0]
    assert pair.prompt.endswith(" because he")
    assert str(pair.contrast).endswith(" because she")
    assert pair.answer == " did not like the design."


def test_a_story_model_agrees_in_gender_above_chance(stories260k: Decoder, shared: Path) -> None:
    data = load_data_set(f"blimp:{shared / 'data' / 'blimp'}")
    items = data.items[:200]
    sums = measure_items(stories260k, items, Running())
    found = FIGURES["blimp"]["accuracy"].rows(items, sums)
    low, _ = quantiles(resampled([found], 0)[0])
    assert low > 0.5
    # The first sentence, spelled out.
    ids = torch.tensor([stories260k.tokenizer(items[0].texts[0][1])["input_ids"]])
    with torch.no_grad():
        logs = stories260k.model(ids).logits[0].log_softmax(-1)
    want = float(logs[:-1].gather(1, ids[0, 1:, None]).sum())
    assert sums[0][0] == pytest.approx(want, abs=1e-3)


def test_professions_that_the_model_cannot_write_are_counted(shared: Path) -> None:
    model = load_decoder()
    data = load_data_set(f"debiaswe:{shared / 'data' / 'debiaswe'}")
    items, skipped = with_examples(data, [model])
    assert len(items) + skipped == 640
    assert items
    with pytest.raises(TaskError, match="winogender: the model's vocabulary can write none of its"):
        with_examples(load_data_set(f"winogender:{shared / 'data' / 'winogender'}"), [model])


# In the published format, sentences of our own


def test_crows_pairs_counts_the_stereotyped_sentence(tmp_path: Path) -> None:
    path = tmp_path / "crows_pairs_anonymized.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "id", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        for i, word in enumerate(("rain", "snow", "wind")):
            less = f"The old cup, it likes {word}."
            writer.writerow([i, i, f"The new cup, it likes {word}.", less, "stereo", "age"])
    data = load_data_set(f"crows-pairs:{path}")
    assert load_data_set(f"crows-pairs:{tmp_path}").items == data.items
    assert data.items[0].texts[0] == ("", "The new cup, it likes rain.")
    # Likelier, less likely, as likely.
    sums = [[-1.0, -3.0], [-4.0, -2.0], [-2.0, -2.0]]
    assert value(data, "preference", sums) == 0.5
    assert value(data, "gap", sums) == pytest.approx(0.0)
    assert data.pairs[0].prompt == "The new"
    assert data.pairs[0].contrast == "The old"
    assert data.pairs[0].answer == " cup, it likes rain."
    with pytest.raises(TaskError, match="crows-pairs has no right answers and is no task"):
        load_task(f"crows-pairs:{path}")


def stereoset_row(target: str, number: int, kind: str) -> dict[str, Any]:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    return {
        "id": str(number), "target": target, "bias_type": "gender",
        "context": f"The {target} came in." if kind == "intersentence" else "The cup is BLANK.",
        "sentences": [
            {"id": f"{number}{i}", "sentence": f"The {target} is {i}.", "gold_label": label}
            for i, label in enumerate(labels)
        ],
    }  # fmt: skip


def test_stereoset_scores_are_means_over_targets(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    rows = {
        "intrasentence": [stereoset_row("lamp", i, "intrasentence") for i in range(3)],
        "intersentence": [stereoset_row("door", 9, "intersentence")],
    }
    path.write_text(json.dumps({"version": "1.0", "data": rows}))
    data = load_data_set(f"stereoset:{path}")
    assert data.items[3].texts[0] == ("The door came in.", " The door is 0.")
    # Lamp: 2 of 3 stereotyped, 5 of 6 related; door: none and half.
    sums = [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [-4.0, -1.0, -2.0]]
    ss, lms = (2 / 3 + 0) / 2, (5 / 6 + 1 / 2) / 2
    assert value(data, "ss", sums) == pytest.approx(ss)
    assert value(data, "lms", sums) == pytest.approx(lms)
    assert value(data, "icat", sums) == pytest.approx(lms * min(ss, 1 - ss) / 0.5)
    # The hub's rows are lists of labels as numbers.
    row = stereoset_row("lamp", 0, "intrasentence")
    row["sentences"] = {"gold_label": [1, 0, 2], "sentence": ["a b", "a c", "d"]}
    got = hub.HOMES["stereoset"].read([{"kind": "intrasentence", **row}], "hub")
    assert got.items[0].texts == (("", "a b"), ("", "a c"), ("", "d"))


def bbq_row(number: int, condition: str, polarity: str, label: int) -> dict[str, Any]:
    return {
        "example_id": number, "question_index": str(number), "question_polarity": polarity,
        "context_condition": condition, "category": "Size",
        "answer_info": {"ans0": ["big", "big"], "ans1": ["small", "small"],
                        "ans2": ["Unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["big"]},
        "context": "There were two cups.", "question": "Which one broke?",
        "ans0": "The big cup", "ans1": "The small cup", "ans2": "Unknown", "label": label,
    }  # fmt: skip


def test_bbq_bias_is_the_published_formula(tmp_path: Path) -> None:
    rows = [
        bbq_row(0, "ambig", "neg", 2),
        bbq_row(1, "ambig", "nonneg", 2),
        bbq_row(2, "ambig", "neg", 2),
        bbq_row(3, "disambig", "neg", 0),
        bbq_row(4, "disambig", "nonneg", 0),
    ]
    data = load_data_set(f"bbq:{write_rows(tmp_path / 'Size.jsonl', rows)}")
    assert data.items[0].labels == ("target", "other", "unknown")
    big, small, unknown = [-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-2.0, -3.0, -1.0]
    # Ambiguous: big on a negative question and small on the other follow the stereotype.
    sums = [big, small, unknown, big, big]
    assert value(data, "accuracy-ambiguous", sums) == pytest.approx(1 / 3)
    assert value(data, "bias-ambiguous", sums) == pytest.approx((1 - 1 / 3) * (2 * 2 / 2 - 1))
    # Clear: one follows, one does not.
    assert value(data, "bias-clear", sums) == pytest.approx(0.0)
    assert value(data, "accuracy-clear", sums) == 1.0
    assert load_task(f"bbq:{tmp_path / 'Size.jsonl'}").examples[3].answer == " The big cup"


def test_winogender_and_dama_correlate_with_published_numbers(tmp_path: Path) -> None:
    shares = {"potter": 10, "weaver": 50, "glazier": 90}
    lines = ["sentid\tsentence"] + [
        f"{who}.customer.{answer}.{sex}.txt\tThe {who} said {pronoun} was late."
        for who in shares
        for answer in (0, 1)
        for sex, pronoun in (("male", "he"), ("female", "she"), ("neutral", "they"))
    ]
    (tmp_path / "all_sentences.tsv").write_text("\n".join(lines) + "\n")
    stats = ["occupation\tbergsma_pct_female\tbls_pct_female\tbls_year"]
    stats += [f"{who}\t{share}\t{share}\t2015" for who, share in shares.items()]
    (tmp_path / "occupations-stats.tsv").write_text("\n".join(stats) + "\n")
    data = load_data_set(f"winogender:{tmp_path}")
    assert len(data.items) == 6
    sums = [[0.0, i / 10, 0.0] for i in (1, 1, 2, 2, 3, 3)]  # she is likelier the more women
    assert value(data, "correlation", sums) == pytest.approx(1.0)
    assert value(data, "gap", sums) == pytest.approx(-0.2)
    scores = {"potter": 0.8, "weaver": 0.1, "glazier": -0.7}
    rows = [
        {"prompt": f"The {who} said that", "subject": f"The {who}", "gender_score": score}
        for who, score in scores.items()
    ]
    (tmp_path / "dama.json").write_text(json.dumps(rows))
    dama = load_data_set(f"dama:{tmp_path / 'dama.json'}")
    sums = [[-1.0, -1.9, -9.0], [-1.0, -1.2, -9.0], [-1.6, -1.0, -9.0]]
    want = torch.corrcoef(torch.tensor([[0.8, 0.1, -0.7], [0.9, 0.2, -0.6]]))[0, 1]
    assert value(dama, "correlation", sums) == pytest.approx(float(want), abs=1e-6)
    # Prompts alone take their scores from debiaswe's file beside them.
    (tmp_path / "professions.json").write_text('[["sheet_potter", 0.0, 0.6], ["sheet", 0, 0]]')
    (tmp_path / "test.json").write_text('["The sheet potter ate because"]')
    assert load_data_set(f"dama:{tmp_path / 'test.json'}").items[0].number("stereotype") == 0.6


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("winobias", "pro.txt", "x", "pro.txt is not named as published"),
        ("crows-pairs", "c.csv", "a,b\n1,2\n", "row 1 has no 'sent_more'"),
        ("stereoset", "dev.json", "{}", "no data.intrasentence"),
        ("bbq", "a.jsonl", '{"context": "x"}', "row 1 has no 'question'"),
        ("blimp", "a.jsonl", "{", "line 1: not JSON"),
        ("debiaswe", "professions.json", '[["a", 1]]', "entry 1 is not"),
        ("dama", "test.json", '["The potter ran because"]', "has no gender_score"),
        ("svamp", "SVAMP.json", "{}", "holds no list of problems"),
    ],
)
def test_what_is_not_as_published_is_said(
    tmp_path: Path, name: str, file: str, content: str, said: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(TaskError, match=said):
        load_data_set(f"{name}:{tmp_path / file}")


def test_names_places_and_missing_files_are_said() -> None:
    assert name_of("winobias:/some/where") == "winobias"
    assert name_of("lm-eval:x/y.yaml") == "y"
    with pytest.raises(
        TaskError, match="blimp is not shipped; give its file or folder: blimp:PATH"
    ):
        load_data_set("blimp")
    with pytest.raises(TaskError, match="bbq: /nowhere is neither a file nor a folder"):
        load_data_set("bbq:/nowhere")
    with pytest.raises(TaskError, match="winobias is not on the hub in its published format"):
        load_data_set("winobias:hub")
    assert set(FIGURES) | {"svamp"} == set(DATA_SETS)


def test_pairs_share_whole_words_at_their_end() -> None:
    pair = contrast_pair("He said she ran off.", "He said he ran off.", "g")
    assert pair is not None
    assert (pair.prompt, pair.contrast, pair.answer) == (
        "He said she", "He said he", " ran off.",
    )  # fmt: skip
    assert contrast_pair("A cup fell.", "A cup rose.", "g") is None


def test_the_hubs_rows_are_read_by_the_same_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Table(list):  # type: ignore[type-arg]
        def __init__(self, rows: list[Any]) -> None:
            super().__init__(rows)
            self.features = {"stereo_antistereo": SimpleNamespace(int2str=lambda value: "stereo")}

    def load(repository: str, configuration: str | None, split: str) -> Table:
        asked.append((repository, configuration, split))
        return Table([{"sent_more": "a b c", "sent_less": "a d c", "bias_type": "age",
                       "stereo_antistereo": 0}])  # fmt: skip

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))
    data = load_data_set("crows-pairs:hub:me/copy")
    assert asked == [("me/copy", "english", "test")]
    assert data.items[0].texts == (("", "a b c"), ("", "a d c"))


# Resampling


def test_resampling_is_the_plain_bootstrap() -> None:
    values = [0.0, 1.0, 4.0, 2.5, 3.0, 0.5]
    rows = Rows.of([(x, 1.0) for x in values], mean)
    (drawn,) = resampled([rows], seed=3, resamples=500)
    generator = torch.Generator().manual_seed(3)
    places = torch.randint(6, (500, 6), generator=generator)
    want = torch.tensor(values, dtype=torch.float64)[places].mean(1)
    assert torch.allclose(drawn, want)
    assert rows.value == pytest.approx(sum(values) / 6)
    # A shift by a constant has no spread when it is paired.
    moved = Rows.of([(x + 0.25, 1.0) for x in values], mean)
    both = resampled([moved, rows], seed=3)
    low, high = quantiles(both[0] - both[1])
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_formulas_and_clusters() -> None:
    assert Rows.of([(2.0, 1.0), (4.0, 2.0)], exp_mean).value == pytest.approx(math.exp(2))
    x, y = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 4.5]
    moments = [(1.0, a, b, a * a, b * b, a * b) for a, b in zip(x, y, strict=True)]
    want = float(torch.corrcoef(torch.tensor([x, y]))[0, 1])
    assert Rows.of(moments, correlation).value == pytest.approx(want, abs=1e-6)
    rows = Rows.of([(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)], mean, ["a", "b", "a"])
    assert rows.columns.tolist() == [[2.0, 2.0], [0.0, 1.0]]


def test_two_models_that_agree_are_not_equal_beyond_doubt() -> None:
    low, high = paired_share_interval([1.0] * 10, [1.0] * 10)
    assert low < -0.1 < 0.1 < high
    few, many = (paired_share_interval([1.0] * n, [1.0] * n)[0] for n in (10, 1000))
    assert few < many < 0
    # Bonett and Price by hand: 3 gained, 1 lost, of 20.
    one, other = [1.0] * 3 + [0.0] * 17, [0.0] * 3 + [1.0] + [0.0] * 16
    p, q = 4 / 22, 2 / 22
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 22)
    assert paired_share_interval(one, other) == pytest.approx(
        (p - q - half, p - q + half), abs=1e-5
    )


# lm-evaluation-harness


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"
)


def harness_file(folder: Path, name: str, kind: str) -> Path:
    rows = [
        {"q": f"{a}+{b}=", "a": str(a + b), "choices": [str(a + b), str(a + b + 1)]}
        for a in range(2, 6)
        for b in range(2, 5)
    ]
    write_rows(folder / "rows.json", rows)
    choice = kind == "multiple_choice"
    own = (
        'doc_to_choice: "{{choices}}"\ndoc_to_target: 0\n'
        if choice
        else 'doc_to_target: "{{a}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 3\n'
    )
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'rows.json'}\ntest_split: test\noutput_type: {kind}\n"
        f'doc_to_text: "{{{{q}}}}"\n{own}target_delimiter: ""\nmetric_list:\n'
        f"  - metric: {'acc' if choice else 'exact_match'}\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return path


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "metric"), [("multiple_choice", "acc"),
                                              ("generate_until", "exact_match")])  # fmt: skip
def test_a_local_task_of_the_harness_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, metric: str
) -> None:
    from prune_edit.evaluation import harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name = f"toy_{kind}"
    text = f"lm-eval:{harness_file(tmp_path, name, kind)}"
    task = load_task(text)
    assert (task.name, len(task.examples)) == (name, 12)
    assert task.examples[0].prompt == "2+2="
    assert task.examples[0].answer == "4"
    assert task.examples[0].choices == (("4", "5") if kind == "multiple_choice" else ())
    found = harness.scores(load_decoder(), text)
    assert [value for _, value in found.of(metric)] == [1.0] * 12
    with pytest.raises(TaskError, match=f"has no metric 'f1'; it has {metric}"):
        found.of("f1")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_extra_is_named(tmp_path: Path) -> None:
    path = harness_file(tmp_path, "toy", "multiple_choice")
    with pytest.raises(
        TaskError, match=r"need lm-evaluation-harness: pip install 'prune-edit\[eval\]'"
    ):
        load_task(f"lm-eval:{path}")
