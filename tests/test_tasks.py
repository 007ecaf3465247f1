"""Tasks: right answers, honest splits, and one line for every mistake in a user's file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune_edit.errors import TaskError
from prune_edit.tasks import BUILT_IN, RETAINED, Example, Task, arithmetic, load_task, stories
from prune_edit.tasks.arithmetic import FORMS, OPERATIONS
from prune_edit.tasks.numbers import in_words
from prune_edit.tasks.task import SPLITS, fraction_of, split_of

# The paper's 16 prompts, spelled out.
WORDINGS = {
    "add": (
        "The sum of {a} and {b} is",
        "Q: What is {a} plus {b}? A:",
        "{a} plus {b} is",
        "{a}+{b}=",
    ),
    "sub": (
        "The difference between {a} and {b} is",
        "Q: What is {a} minus {b}? A:",
        "{a} minus {b} is",
        "{a}-{b}=",
    ),
    "mul": (
        "The product of {a} and {b} is",
        "Q: What is {a} times {b}? A:",
        "{a} times {b} is",
        "{a}*{b}=",
    ),
    "div": (
        "The ratio of {a} and {b} is",
        "Q: What is {a} divides {b}? A:",
        "{a} divides {b} is",
        "{a}/{b}=",
    ),
}
WORDS: dict[str, int] = dict(
    zip(
        (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
            "eighty ninety"
        ).split(),
        [*range(20), *range(20, 100, 10)],
        strict=True,
    )
)


def number(text: str) -> int:
    """A number in digits or words, read without the package's help."""
    if text.isdigit():
        assert text == str(int(text)), "leading zeros"
        return int(text)
    total = below = 0
    for word in text.split():
        if word == "thousand":
            total, below = total + below * 1000, 0
        elif word == "hundred":
            below *= 100
        else:
            below += WORDS[word]
    return total + below


def patterns() -> dict[tuple[str, int], re.Pattern[str]]:
    return {
        (operation, i): re.compile(
            re.escape(text).replace(r"\{a\}", "([a-z0-9 ]+)").replace(r"\{b\}", "([a-z0-9 ]+)")
        )
        for operation, texts in WORDINGS.items()
        for i, text in enumerate(texts)
    }


def read(example: Example, known: dict[Any, re.Pattern[str]]) -> tuple[str, int, str, int, int]:
    """Operation, wording, form, and the two operands of a prompt."""
    # The bare wording fits inside the others, so the most specific comes first.
    for wording in (0, 1, 3, 2):
        if match := known[example.group, wording].fullmatch(example.prompt):
            a, b = match.groups()
            assert a.isdigit() == b.isdigit()
            form = "digits" if a.isdigit() else "words"
            return example.group, wording, form, number(a), number(b)
    raise AssertionError(example)


@pytest.fixture(scope="module")
def parsed() -> dict[str, list[tuple[str, int, str, int, int]]]:
    task, known = arithmetic.load(), patterns()
    return {split: [read(e, known) for e in task.split(split)] for split in SPLITS}


# Arithmetic


@pytest.mark.parametrize("digits", [(1,), (2,), (3,)])
def test_every_answer_is_right(digits: tuple[int, ...]) -> None:
    known = patterns()
    task = arithmetic.load(None, digits)
    assert task.groups == tuple(sorted(OPERATIONS))
    for example in task.examples:
        operation, wording, form, a, b = read(example, known)
        assert len(str(max(a, b))) == digits[0] or operation == "mul"
        answer = number(example.answer.strip())
        if operation == "add":
            assert answer == a + b
        elif operation == "sub":
            assert answer == a - b >= 0
        elif operation == "mul":
            assert answer == a * b
            assert b < 10
        else:
            assert answer * b == a
        assert example.answer.strip().isdigit() == (form == "digits")
        # Words are set apart; after `a+b=` nothing is.
        assert example.answer.startswith(" ") == (wording != 3)
        assert "  " not in example.prompt + example.answer


def test_all_wordings_and_forms_are_asked_and_tested(parsed: dict[str, Any]) -> None:
    for split in SPLITS:
        shown = Counter(row[:3] for row in parsed[split])
        assert set(shown) == {(o, w, f) for o in OPERATIONS for w in range(4) for f in FORMS}
        for operation in OPERATIONS:  # ... and about equally often
            counts = [n for (name, *_), n in shown.items() if name == operation]
            assert max(counts) < 1.5 * min(counts)


def test_ranges(parsed: dict[str, Any]) -> None:
    found = {o: {row[3:] for s in SPLITS for row in parsed[s] if row[0] == o} for o in OPERATIONS}
    assert found["add"] == {(a, b) for a in range(100) for b in range(100)}
    assert found["sub"] == {(a, b) for a in range(100) for b in range(a + 1)}
    assert found["mul"] == {(a, b) for a in range(100) for b in range(10)}
    assert found["div"] == {(a, b) for a in range(1, 100) for b in range(1, 100) if a % b == 0}


def test_held_out_sums_were_never_seen_in_either_order(parsed: dict[str, Any]) -> None:
    pairs = {
        split: {
            (row[0], *sorted(row[3:]))
            for row in parsed[split]
            if row[0] in ("add", "sub") and max(row[3:]) >= 10
        }
        for split in SPLITS
    }
    assert all(len(found) > 1000 for found in pairs.values())
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]


def test_tables_are_held_out_by_wording(parsed: dict[str, Any]) -> None:
    tables = {
        split: {row for row in parsed[split] if row[0] in ("mul", "div") or max(row[3:]) < 10}
        for split in SPLITS
    }
    assert not tables["train"] & tables["test"]
    facts = {split: {(row[0], *row[3:]) for row in rows} for split, rows in tables.items()}
    # What is asked of a table is (nearly) always known from another wording.
    assert len(facts["test"] - facts["train"]) < 0.01 * len(facts["test"])
    assert len(facts["test"]) > 1000


def test_split_shares(parsed: dict[str, Any]) -> None:
    total = sum(map(len, parsed.values()))
    for operation in OPERATIONS:
        counts = [sum(row[0] == operation for row in parsed[split]) for split in SPLITS]
        shares = [count / sum(counts) for count in counts]
        assert shares == pytest.approx([0.70, 0.15, 0.15], abs=0.025), operation
    assert [len(parsed[s]) / total for s in SPLITS] == pytest.approx([0.70, 0.15, 0.15], abs=0.01)


def last_digits(pairs: set[tuple[int, int]]) -> list[float]:
    counts = Counter((a + b) % 10 for a, b in pairs)
    return [counts[digit] / len(pairs) for digit in range(10)]


def test_held_out_sums_have_all_last_digits(parsed: dict[str, Any]) -> None:
    # Above 9 only: a pair and its mirror image are held out together.
    def held_out(split: str) -> set[tuple[int, int]]:
        return {row[3:] for row in parsed[split] if row[0] == "add" and max(row[3:]) > 9}

    for split in SPLITS:
        assert min(last_digits(held_out(split))) > 0.05
        assert max(last_digits(held_out(split))) < 0.15
    # The linear hash that looks like one, for comparison, leaves a single digit.
    linear = {(a, b) for a in range(100) for b in range(100) if (7919 * a + 104729 * b) % 10 == 0}
    assert max(last_digits(linear)) == 1


def test_padded_sums() -> None:
    task = arithmetic.load_padded()
    assert len(task.examples) > 7000
    for example in task.examples:
        assert re.fullmatch(r"\d{6}", example.prompt)
        assert re.fullmatch(r"\d{4}", example.answer)
        assert int(example.answer) == int(example.prompt[:3]) + int(example.prompt[3:])
    train, test = (
        {tuple(sorted((e.prompt[:3], e.prompt[3:]))) for e in task.split(s)}
        for s in ("train", "test")
    )
    assert not train & test


def test_subtasks_are_the_parts_of_the_whole() -> None:
    parts = [example for name in OPERATIONS for example in arithmetic.load(name).examples]
    assert sorted(map(repr, parts)) == sorted(map(repr, arithmetic.load().examples))
    for name in OPERATIONS:
        assert arithmetic.load(name).name == f"arithmetic/{name}"
        assert arithmetic.load(name).groups == (name,)


def test_number_words() -> None:
    assert in_words(0) == "zero"
    assert in_words(47) == "forty seven"
    assert in_words(100) == "one hundred"
    assert in_words(998_017) == "nine hundred ninety eight thousand seventeen"
    for n in range(20_000):
        assert number(in_words(n)) == n


# Splits


def test_the_hash_is_the_same_everywhere() -> None:
    # Pinned: another hash would move examples between the splits of a trained reference model.
    assert fraction_of("add 3 5") == 0.6326621217824396
    keys = ("add 3 5", "add 50 55", "add 73 50", "d")
    assert [split_of(key) for key in keys] == ["train", "train", "test", "validation"]


def sampled(name: str, count: int) -> Task:
    return Task(name, BUILT_IN[name]().examples[:count])


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_splits_are_a_partition_that_does_not_depend_on_order(name: str) -> None:
    task = sampled(name, 3000)
    mirror = Task(name, task.examples[::-1])
    assert mirror.digest == task.digest
    for split in (*SPLITS, "all"):
        assert task.split(split) == mirror.split(split)
        assert task.sample(split, 37) == mirror.sample(split, 37)
    assert task.split("all") != task.examples
    together = [example for split in SPLITS for example in task.split(split)]
    assert Counter(together) == Counter(task.examples) == Counter(task.split("all"))
    keys = [{example.split_key for example in task.split(split)} for split in SPLITS]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_another_example_elsewhere_moves_nothing() -> None:
    examples = tuple(Example(f"{i}", "x") for i in range(100))
    whole, part = Task("t", examples), Task("t", examples[:90])
    for split in SPLITS:
        assert set(part.split(split)) == set(whole.split(split)) & set(examples[:90])


@pytest.mark.parametrize("seed", range(40))
def test_a_tiny_task_has_all_splits(seed: int) -> None:
    for count in (3, 4, 5):
        examples = tuple(Example(f"prompt {seed} {i}", "x") for i in range(count))
        task = Task("tiny", examples)
        sizes = [len(task.split(split)) for split in SPLITS]
        assert min(sizes) >= 1
        assert sum(sizes) == count
        mirror = Task("tiny", examples[::-1])
        assert [mirror.split(split) for split in SPLITS] == [task.split(s) for s in SPLITS]


def test_wordings_of_one_fact_stay_together_in_a_tiny_task() -> None:
    examples = tuple(Example(f"{i} {j}", "x", key=f"{i}") for i in range(3) for j in range(4))
    task = Task("tiny", examples)
    found = [{example.key for example in task.split(split)} for split in SPLITS]
    assert [len(keys) for keys in found] == [1, 1, 1]
    assert set.union(*found) == {"0", "1", "2"}


def test_too_few_examples_are_said_to_be() -> None:
    with pytest.raises(TaskError, match=r"^task 'none' has no examples; give at least one$"):
        Task("none", ())
    task = Task("one", (Example("a", "b"),))
    assert task.split("all") == task.examples
    empty = [split for split in SPLITS if not task._splits[split]]
    assert len(empty) == 2
    for split in empty:
        with pytest.raises(TaskError) as caught:
            task.split(split)
        assert str(caught.value) == (
            f"task 'one' has 1 examples, too few for a {split} split; "
            "give at least three different ones"
        )


def test_digest_follows_every_field() -> None:
    base = Example("p", "a", "g", "c", ("a", "b"), "k")
    others = (
        Example("q", "a", "g", "c", ("a", "b"), "k"),
        Example("p", "b", "g", "c", ("a", "b"), "k"),
        Example("p", "a", "h", "c", ("a", "b"), "k"),
        Example("p", "a", "g", "d", ("a", "b"), "k"),
        Example("p", "a", "g", "c", ("a", "c"), "k"),
        Example("p", "a", "g", "c", ("a", "b"), "l"),
    )
    assert len({Task("t", (example,)).digest for example in (base, *others)}) == 7
    assert Task("other name", (base,)).digest == Task("t", (base,)).digest


# Sampling


def test_a_sample_is_even_over_the_groups() -> None:
    task = arithmetic.load()
    for limit in (1, 4, 50, 201):
        found = task.sample("train", limit)
        assert len(found) == len(set(found)) == limit
        counts = Counter(example.group for example in found)
        sizes = [counts[name] for name in OPERATIONS]
        assert max(sizes) - min(sizes) <= 1
    assert set(found) <= set(task.split("train"))
    assert set(task.sample("train", 50)) < set(task.sample("train", 201))


def test_a_sample_takes_all_of_a_small_group() -> None:
    examples = tuple(Example(f"{g}{i}", "x", g) for g, n in (("a", 2), ("b", 90)) for i in range(n))
    counts = Counter(example.group for example in Task("t", examples).sample("all", 20))
    assert counts == {"a": 2, "b": 18}


def test_no_limit_is_everything() -> None:
    task = load_task("facts")
    for limit in (None, 10**9):
        rows = task.sample("test", limit)
        assert set(rows) == set(task.split("test"))
        assert len(rows) == len(task.split("test"))
        # The groups in turn, so that the first examples are of all of them.
        assert {row.group for row in rows[: len(task.groups)]} == set(task.groups)


# Other tasks


@pytest.mark.parametrize("name", RETAINED)
def test_retained_tasks_have_one_answer_a_prompt(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    answers: dict[str, set[str]] = {}
    for example in task.examples:
        answers.setdefault(example.prompt, set()).add(example.answer)
        assert example.answer.strip()
        assert not example.choices or example.answer in example.choices
    assert {prompt for prompt, found in answers.items() if len(found) > 1} == set()
    assert len(answers) == len(task.examples)
    assert all(len(task.split(split)) > 20 for split in SPLITS)


def test_factual_gender_offers_both_pronouns() -> None:
    task = load_task("factual-gender")
    by_prompt = {example.prompt: example for example in task.examples}
    assert by_prompt["The mother said that"].answer == " she"
    assert by_prompt["The king said that"].answer == " he"
    assert by_prompt["When the queen woke up,"].choices == (" she", " he")
    assert by_prompt["Tom lost"].choices == (" his", " her")
    assert Counter(e.group for e in task.examples) == {"woman": 320, "man": 320}


def test_order_and_succession_are_right() -> None:
    for example in load_task("order").examples:
        numbers = [int(n) for n in re.findall(r"\d+", example.prompt)]
        if example.group == "sorting":
            assert example.answer == " " + " ".join(map(str, sorted(numbers)))
        else:
            most = "maximum" in example.prompt or "largest" in example.prompt
            assert int(example.answer) == (max if most else min)(numbers)
    by_prompt = {e.prompt: e.answer for e in load_task("succession").examples}
    assert by_prompt["After Sunday comes"] == " Monday"
    assert by_prompt["Before January comes"] == " December"
    assert by_prompt["Count: 7, 8, 9,"] == " 10"
    assert by_prompt["Q: What comes after forty nine? A:"] == " fifty"
    assert "After z comes" not in by_prompt


def test_stories_are_the_same_every_time_and_of_their_split() -> None:
    for split in SPLITS:
        found = stories.stories(split, 40)
        assert len(set(found)) == 40
        assert {split_of(story) for story in found} == {split}
        assert stories.stories.__wrapped__(split, 40) == found
        assert stories.stories(split, 10) == found[:10]
        assert all(re.fullmatch(r"[A-Z][A-Za-z ,.]+\.", story) for story in found)
    assert stories.stories() == stories.stories("test", 256)


# Names and files


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(TaskError) as caught:
        load_task("aritmetic")
    assert str(caught.value) == (
        "unknown task 'aritmetic'; did you mean 'arithmetic'? built in are "
        f"{', '.join(BUILT_IN)}, or give a .jsonl file, a data set as NAME:PATH, or lm-eval:TASK"
    )
    with pytest.raises(TaskError, match=r"^unknown task 'zzz'; built in are arithmetic, "):
        load_task("zzz")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def act(*lines: str | dict[str, Any]) -> str:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(path)

    return act


GOOD = {"prompt": "3+5=", "answer": "8"}


def test_a_users_task(write: Callable[..., str]) -> None:
    rows = [
        GOOD,
        {"prompt": "A", "answer": " he", "group": "g", "contrast": "B", "choices": [" he", " she"]},
        {"prompt": "Größe:", "answer": "groß"},
    ]
    task = load_task(write(rows[0], "", "   ", *rows[1:], GOOD))  # blank lines and repeats go
    assert task.name == "mine"
    assert task.about == "from mine.jsonl"
    assert task.examples == (
        Example("3+5=", "8"),
        Example("A", " he", "g", "B", (" he", " she")),
        Example("Größe:", "groß"),
    )
    assert not task.adapts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "answer": }',
            "not JSON (Expecting value: line 1 column 27 (char 26)); give one object a line",
        ),
        ("[1, 2]", "a list; give an object with prompt, answer"),
        ('"text"', "a str; give an object with prompt, answer"),
        ({**GOOD, "anser": "8"}, "unknown field 'anser'; did you mean 'answer'?"),
        ({**GOOD, "choice": ["8"]}, "unknown field 'choice'; did you mean 'choices'?"),
        (
            {**GOOD, "xyz": 1},
            "unknown field 'xyz'; known are prompt, answer, group, contrast, choices, key",
        ),
        ({"prompt": "3+5="}, "field 'answer' is missing or not text"),
        ({"answer": "8"}, "field 'prompt' is missing or not text"),
        ({"prompt": "3+5=", "answer": 8}, "field 'answer' is missing or not text"),
        ({**GOOD, "choices": ["7", "9"]}, "answer '8' is not among its choices ['7', '9']"),
        ({**GOOD, "choices": "8"}, "field 'choices' must be a list of texts"),
        ({**GOOD, "choices": ["8", 9]}, "field 'choices' must be a list of texts"),
        ({**GOOD, "group": 1}, "field 'group' must be text"),
        ({**GOOD, "contrast": ["a"]}, "field 'contrast' must be text"),
        ({"prompt": "a", "answer": ""}, "the answer is empty; give the text that should follow"),
        ({"prompt": "a", "answer": " "}, "the answer is empty; give the text that should follow"),
    ],
)
def test_a_bad_line_is_named(line: Any, message: str, write: Callable[..., str]) -> None:
    path = write(GOOD, "", line, GOOD)
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert str(caught.value) == f"{path} line 3: {message}"


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_named(lines: tuple[str, ...], write: Callable[..., str]) -> None:
    path = write(*lines)
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert str(caught.value) == (
        f"task file {path} is empty; give one JSON object a line, such as "
        '{"prompt": "3+5=", "answer": "8"}'
    )


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    with pytest.raises(TaskError, match=r"task file .*none\.jsonl cannot be read: .*No such file"):
        load_task(str(missing))
    missing.write_bytes(b"\xff\xfe{}")
    with pytest.raises(TaskError, match=r"none\.jsonl cannot be read: 'utf-8' codec"):
        load_task(str(missing))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(TaskError, match="cannot be read"):
        load_task(str(folder))


def test_a_line_may_hold_any_separator(write: Callable[..., str]) -> None:
    # U+2028 is legal inside a JSON text, and no end of a line of the file.
    path = Path(write(GOOD))
    path.write_text('{"prompt": "a\u2028b", "answer": "c"}\n', encoding="utf-8")
    assert load_task(str(path)).examples == (Example("a\u2028b", "c"),)


def test_a_file_from_windows(write: Callable[..., str]) -> None:
    path = Path(write(GOOD))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_task(str(path)).examples == (Example("3+5=", "8"),)


@pytest.mark.parametrize("line", [r'{"prompt": "\ud800", "answer": "8"}', "[" * 100_000])
def test_what_only_looks_like_json_is_named(line: str, write: Callable[..., str]) -> None:
    with pytest.raises(TaskError, match=r"mine\.jsonl line 2: not JSON \(.*\); give one object"):
        load_task(write(GOOD, line))


def test_a_choice_given_twice_counts_once(write: Callable[..., str]) -> None:
    # Else the answer would have to be likelier than itself.
    task = load_task(write({"prompt": "a", "answer": "b", "choices": ["b", "c", "b"]}))
    assert task.examples[0].choices == ("b", "c")
