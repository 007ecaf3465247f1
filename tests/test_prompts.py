"""Spaces, BOS, padding and answer tokens, on all three tokenizers; accuracy is greedy decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import TaskError
from prune_edit.evaluation.accuracy import Accuracy, answer_sums, correct, measure_accuracy, wilson
from prune_edit.fitting import fit_task
from prune_edit.reference_model.tokenizer import build_tokenizer
from prune_edit.running import answer_log_probs
from prune_edit.scoring.options import Options
from prune_edit.tasks import RETAINED, Example, Task, load_task
from prune_edit.tasks.prompts import Encoded, batches, collate, encode, encode_all, join, text_ids

OPTIONS = Options()
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big red ball. She wanted to play with it."
).split(" ")


@pytest.fixture(scope="module")
def words() -> Any:
    """The reference model's tokenizer."""
    return build_tokenizer()


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(piece).replace("\u2581", "_") for piece in tokenizer.convert_ids_to_tokens(ids)]


def example(prompt: str, answer: str) -> Example:
    return Example(prompt, answer)


# Spaces


@pytest.mark.parametrize(
    ("prompt", "answer", "want"),
    [
        ("The sum of 3 and 5 is", "8", ("The sum of 3 and 5 is", " 8")),
        ("The capital of France is", "Paris", ("The capital of France is", " Paris")),
        ("Q: What is 3 plus 5? A:", "8", ("Q: What is 3 plus 5? A:", " 8")),
        ("She said,", "hello", ("She said,", " hello")),
        ("(see above)", "then", ("(see above)", " then")),
        ("After 9", "comes", ("After 9", " comes")),
        ("is", " 8", ("is", " 8")),  # as written
        ("is ", "8", ("is", " 8")),  # the space moves
        ("is   ", "  8", ("is", " 8")),
        ("3+5=", "8", ("3+5=", "8")),
        ("3+5= ", "8", ("3+5=", " 8")),
        ("293480", "0773", ("293480", "0773")),  # digits after digits
        ("x-", "1", ("x-", "1")),
        ('say "', "hello", ('say "', " hello")),
        ("Hello", ", world", ("Hello", ", world")),
        ("Hello", "!", ("Hello", "!")),
        ("line\n", "next", ("line\n", "next")),
        ("line", "\nnext", ("line", "\nnext")),
        ("日本", "東京", ("日本", "東京")),
        ("über", "ärger", ("über", " ärger")),
        ("", "x", ("", "x")),
        ("x", "", ("x", "")),
    ],
)
def test_join(prompt: str, answer: str, want: tuple[str, str]) -> None:
    assert join(prompt, answer) == want
    assert join(*want) == want, "joining twice is joining once"


# Tokens


def test_the_reference_tokenizer_reads_digits_one_by_one_and_words_whole(words: Any) -> None:
    row = encode(words, example("The sum of 12 and 35 is", "47"))
    assert pieces(words, row.ids) == [
        "<s>", "_The", "_sum", "_of", "_", "1", "2", "_and", "_", "3", "5", "_is", "_", "4", "7",
    ]  # fmt: skip
    assert pieces(words, row.answer) == ["_", "4", "7"]
    assert row.example.answer == "47"
    bare = encode(words, example("12+35=", "47"))
    assert pieces(words, bare.ids) == ["<s>", "_", "1", "2", "+", "3", "5", "=", "4", "7"]
    assert pieces(words, bare.answer) == ["4", "7"]
    spelt = encode(words, example("twelve plus one is", "thirteen"))
    assert pieces(words, spelt.answer) == ["_thirteen"]


def test_the_reference_tokenizer_keeps_the_text(words: Any) -> None:
    for name in ("arithmetic", *RETAINED):
        for e in load_task(name).sample("all", 300):
            row = encode(words, e)
            assert words.unk_token_id not in row.ids
            assert words.decode(row.ids[1:]) == e.prompt + e.answer
            assert words.decode(row.answer).strip() == e.answer.strip()


@pytest.mark.parametrize("place", ["The sum of 3 and 5 is", "The sum of 3 and 5 is ", "3+5= "])
def test_a_space_at_the_prompts_end_moves_to_the_answer(place: str, words: Any) -> None:
    row = encode(words, example(place, "8"))
    assert pieces(words, row.answer) == ["_", "8"]
    assert row.ids[: row.start] == tuple(text_ids(words, place.strip()))


def test_stories_tokens(stories260k: Decoder) -> None:
    tokenizer = stories260k.tokenizer
    row = encode(tokenizer, example("Once upon a time, there was a little girl named", "Lily"))
    assert row.ids[0] == tokenizer.bos_token_id == 1
    assert row.ids.count(1) == 1
    assert 2 not in row.ids, "an end token would end the prompt"
    assert tokenizer.decode(row.answer) == "Lily"
    assert pieces(tokenizer, row.answer)[0].startswith("_")
    same = encode(tokenizer, example("Once upon a time, there was a little girl named ", "Lily"))
    assert same.ids == row.ids
    assert same.start == row.start


def test_mathgpt_tokens(mathgpt: Decoder) -> None:
    row = encode(mathgpt.tokenizer, example("293480", "0773"))
    assert row.ids == (2, 9, 3, 4, 8, 0, 0, 7, 7, 3), "there is no BOS to add"
    assert row.answer == (0, 7, 7, 3)


class Letters:
    """A tokenizer of single letters (and of `merged` as 200) with tokens in front and behind."""

    unk_token_id = None

    def __init__(self, front: Sequence[int] = (), behind: Sequence[int] = (), merged: str = "\0"):
        self.front, self.behind, self.merged = front, behind, merged

    def ids(self, text: str) -> list[int]:
        letters = text.replace(self.merged, "\0")
        return [200 if letter == "\0" else ord(letter) for letter in letters]

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if not isinstance(text, str):
            parts = [self(part, add_special_tokens)["input_ids"] for part in text]
            return {"input_ids": parts}
        ids = self.ids(text)
        return {"input_ids": [*self.front, *ids, *self.behind] if add_special_tokens else ids}


@pytest.mark.parametrize("front", [(), (1,), (1, 5)])
@pytest.mark.parametrize("behind", [(), (2,)])
def test_start_tokens_stay_and_end_tokens_go(front: Any, behind: Any) -> None:
    tokenizer: Any = Letters(front, behind)
    assert text_ids(tokenizer, "ab") == [*front, 97, 98]
    row = encode(tokenizer, example("ab=", "c"))
    assert row.ids == (*front, 97, 98, 61, 99)
    assert row.answer == (99,)


def test_the_prompt_is_never_merged_with_its_answer() -> None:
    tokenizer: Any = Letters((1,), merged="=c")
    assert text_ids(tokenizer, "ab=c") == [1, 97, 98, 200]
    row = encode(tokenizer, example("ab=", "cd"))
    assert row.ids == (1, 97, 98, 61, 99, 100)
    assert row.start == 4


def test_without_a_prompt_the_start_token_predicts(words: Any, mathgpt: Decoder) -> None:
    row = encode(words, example("", "Monday"))
    assert row.start == 1
    assert pieces(words, row.ids) == ["<s>", "_Monday"]
    with pytest.raises(TaskError) as caught:
        encode(mathgpt.tokenizer, example("", "12"), "task t")
    assert str(caught.value) == (
        "task t: prompt '' has no tokens and the tokenizer adds none; give a prompt"
    )


def test_an_answer_without_tokens_is_refused(words: Any, stories260k: Decoder) -> None:
    for tokenizer in (words, stories260k.tokenizer):
        with pytest.raises(TaskError) as caught:
            encode(tokenizer, example("The sum is", ""), "task t")
        assert str(caught.value) == (
            "task t: answer '' of prompt 'The sum is' has no tokens of its own; give an answer "
            "that the tokenizer can write"
        )


def test_unknown_words_are_refused(words: Any, mathgpt: Decoder, stories260k: Decoder) -> None:
    for tokenizer, prompt, answer, text in (
        (words, "The xylophone is", "big", "The xylophone is big"),
        (words, "The sum is", "xylophone", "The sum is xylophone"),
        (mathgpt.tokenizer, "12+3=", "15", "12+3=15"),  # its unknown token is the digit 0
    ):
        with pytest.raises(TaskError) as caught:
            encode(tokenizer, example(prompt, answer), "task t")
        assert str(caught.value) == (
            f"task t: {text!r} has words that are not in the model's vocabulary; "
            "reword it, or take a task that fits the model"
        )
    encode(mathgpt.tokenizer, example("000000", "0000"))
    encode(stories260k.tokenizer, example("The xylophone is", "größer"))  # it can spell


def test_too_long_for_the_model(mathgpt: Decoder) -> None:
    positions = mathgpt.max_positions
    assert positions == 9
    fits = encode_all(mathgpt.tokenizer, [example("293480", "0773")], "t", positions)
    assert len(fits[0].ids) == 10, "the last token is only predicted"
    answer_sums(mathgpt, fits, OPTIONS)
    with pytest.raises(TaskError) as caught:
        encode_all(mathgpt.tokenizer, [example("2934801", "0773")], "task t", positions)
    assert str(caught.value) == (
        "task t: '2934801' with its answer has 11 tokens, the model has 9 positions; shorten it"
    )
    assert encode_all(mathgpt.tokenizer, [example("2934801", "0773")], "t", None)


# Batches


def rows_of(*shapes: tuple[int, int]) -> list[Encoded]:
    return [
        Encoded(tuple(range(10 * i + 1, 10 * i + 1 + length)), start, Example(str(i), ""))
        for i, (length, start) in enumerate(shapes, 1)
    ]


def test_collate_by_hand() -> None:
    rows = rows_of((3, 2), (5, 3))
    right, left = collate(rows), collate(rows, "left")
    assert right.input_ids.tolist() == [[11, 12, 0, 0], [21, 22, 23, 24]]
    assert left.input_ids.tolist() == [[0, 0, 11, 12], [21, 22, 23, 24]]
    assert right.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert left.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert right.position_ids[1].tolist() == [0, 1, 2, 3]
    for batch, columns in ((right, [1, 2, 3]), (left, [3, 2, 3])):
        assert batch.rows.tolist() == [0, 1, 1]
        assert batch.columns.tolist() == columns
        assert batch.targets.tolist() == [13, 24, 25]
        # What is read at a column is the token before the target.
        assert batch.input_ids[batch.rows, batch.columns].tolist() == [12, 23, 24]


def test_batches_hold_every_example_once_within_the_limit() -> None:
    rng = random.Random(0)
    rows = rows_of(*((rng.randrange(2, 9), 1) for _ in range(50)))
    for limit in (1, 20, 10_000):
        seen: list[int] = []
        for numbers, batch in batches(rows, limit):
            assert len(numbers) == 1 or batch.input_ids.numel() <= limit
            assert batch.input_ids.shape[0] == len(numbers)
            seen += numbers
            for i, number in enumerate(numbers):
                assert batch.input_ids[i, 0] == rows[number].ids[0]
        assert sorted(seen) == list(range(50))
    assert len(list(batches(rows, 10_000))) == 1


def stories_rows(decoder: Decoder) -> list[Encoded]:
    examples = [example(" ".join(STORY[:n]), STORY[n]) for n in range(8, 26, 2)]
    return encode_all(decoder.tokenizer, examples, "stories", decoder.max_positions)


def sum_rows(decoder: Decoder) -> list[Encoded]:
    rng = random.Random(0)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(20)]
    examples = [
        # Every other answer is wrong, by a little or by its end.
        example(f"{a:03d}{b:03d}"[: 6 - i % 3], f"{a + b + i % 2:04d}"[: 4 - i % 2])
        for i, (a, b) in enumerate(pairs)
    ]
    return encode_all(decoder.tokenizer, examples, "sums", decoder.max_positions)


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories260k", "mathgpt"])
def test_left_and_right_padding_give_the_same_log_probs(
    name: str, request: pytest.FixtureRequest
) -> None:
    decoder: Decoder = request.getfixturevalue(name)
    rows = stories_rows(decoder) if name == "stories260k" else sum_rows(decoder)
    found = []
    for side in ("right", "left"):
        batch = collate(rows, side)
        assert not batch.attention_mask.bool().all(), "padding should take part"
        states = decoder.final_states(**batch.inputs)[batch.rows, batch.columns]
        found.append(answer_log_probs(decoder, states, batch.targets))
    assert (found[0] - found[1]).abs().max() < 1e-4
    sums = torch.zeros(len(rows)).index_add(0, collate(rows).rows, found[0])
    assert torch.allclose(sums, torch.tensor(answer_sums(decoder, rows, OPTIONS)), atol=1e-4)
    # And one at a time, without any padding, over the whole vocabulary.
    for row, total in zip(rows, sums.tolist(), strict=True):
        after = decoder.model(torch.tensor([row.ids])[:, :-1]).logits[0].log_softmax(-1)
        want = sum(float(after[i - 1, row.ids[i]]) for i in range(row.start, len(row.ids)))
        assert total == pytest.approx(want, abs=1e-4)


# Accuracy


def greedy(decoder: Decoder, row: Encoded) -> tuple[int, ...]:
    front = torch.tensor([row.ids[: row.start]])
    made: Any = decoder.model.generate(  # type: ignore[operator]
        front,
        attention_mask=torch.ones_like(front),
        max_new_tokens=len(row.answer),
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(made[0, row.start :].tolist())


def test_right_is_what_greedy_decoding_says_of_stories(stories260k: Decoder) -> None:
    rows = stories_rows(stories260k)
    spans = [example(" ".join(STORY[:10]), " ".join(STORY[10 : 10 + n])) for n in (1, 2, 9)]
    others = [
        example(" ".join(STORY[:n]), wrong)
        for n, wrong in ((10, "Tom."), (12, "hated"), (15, "in the house"), (18, "park and sing"))
    ]
    rows += encode_all(stories260k.tokenizer, [*spans, *others], "stories")
    want = [greedy(stories260k, row) == row.answer for row in rows]
    assert 4 <= sum(want) <= len(rows) - 4, "both verdicts should occur"
    assert any(hit and len(row.answer) > 8 for row, hit in zip(rows, want, strict=True))
    for tokens in (1, 100, 4096):
        assert correct(stories260k, rows, Options(batch_tokens=tokens)) == want


def test_right_is_what_greedy_decoding_says_of_sums(mathgpt: Decoder) -> None:
    rng = random.Random(1)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(20)]
    examples = [
        example(f"{a:03d}{b:03d}", f"{a + b + (i % 4 == 0):04d}") for i, (a, b) in enumerate(pairs)
    ]
    rows = encode_all(mathgpt.tokenizer, examples, "sums", mathgpt.max_positions)
    want = [greedy(mathgpt, row) == row.answer for row in rows]
    assert correct(mathgpt, rows, OPTIONS) == want
    assert not any(want[::4])
    assert sum(want) >= 14


def test_the_story_goes_on_as_it_should(stories260k: Decoder) -> None:
    prompt = "Once upon a time, there was a little girl named"
    right = "Lily. She loved to play outside in the park."
    rows = encode_all(stories260k.tokenizer, [example(prompt, right)], "t")
    assert correct(stories260k, rows, OPTIONS) == [True]
    rows = encode_all(stories260k.tokenizer, [example(prompt, right.replace("park", "zoo"))], "t")
    assert correct(stories260k, rows, OPTIONS) == [False]


def test_accuracy_counts_groups(mathgpt: Decoder) -> None:
    examples = [
        Example("293480", "0773", "right"),
        Example("001002", "0003", "right"),
        Example("293480", "0774", "wrong"),
        Example("100100", "0200", "mixed"),
        Example("100101", "0202", "mixed"),
    ]
    rows = encode_all(mathgpt.tokenizer, examples, "sums", 9)
    found = measure_accuracy(mathgpt, rows, OPTIONS)
    assert found == Accuracy({"mixed": (1, 2), "right": (2, 2), "wrong": (0, 1)})
    assert (found.hits, found.total, found.value) == (3, 5, 0.6)
    assert found.interval == wilson(3, 5)
    assert found.of("mixed") == 0.5


def test_choices_decide(stories260k: Decoder) -> None:
    prompt = "Once upon a time, there was a little girl named Lily."
    names = (" She", " He", " It", " Xylophone")
    singles = encode_all(stories260k.tokenizer, [example(prompt, name) for name in names], "t")
    sums = answer_sums(stories260k, singles, OPTIONS)
    assert len(set(sums)) == len(sums)
    asked = [Example(prompt, name, choices=names) for name in names]
    rows = encode_all(stories260k.tokenizer, asked, "t")
    assert correct(stories260k, rows, OPTIONS) == [value == max(sums) for value in sums]
    # The second likeliest is right where the likeliest is not offered, though not arg-max.
    second = names[sorted(range(4), key=lambda i: -sums[i])[1]]
    least = names[sorted(range(4), key=lambda i: -sums[i])[3]]
    mixed = [
        Example(prompt, second, choices=(least, second)),
        Example(prompt, second),
        Example(prompt, least, choices=(least, second)),
        Example(prompt, least, choices=(least,)),
    ]
    rows = encode_all(stories260k.tokenizer, mixed, "t")
    assert correct(stories260k, rows, OPTIONS) == [True, False, False, True]
    assert correct(stories260k, rows[::-1], Options(batch_tokens=1)) == [True, False, False, True]


def test_an_equally_likely_choice_makes_it_wrong(stories260k: Decoder) -> None:
    # The same tokens under two names: a model that cannot tell two choices apart is not right.
    tied = Example("Once upon a", "time", choices=("time", " time"))
    alone = Example("Once upon a", "time", choices=("time", " dog"))
    rows = encode_all(stories260k.tokenizer, [tied, alone], "t")
    assert correct(stories260k, rows, OPTIONS) == [False, True]


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-6)


def test_wilson_solves_its_equation() -> None:
    # The ends are the shares p at which (hits/total - p)^2 = z^2 p (1 - p) / total.
    for hits, total in ((970, 1000), (3, 17), (1, 2)):
        for end in wilson(hits, total):
            squared = 1.959963984540054**2 * end * (1 - end) / total
            assert (hits / total - end) ** 2 == pytest.approx(squared, rel=1e-9)


def test_wilson_holds_its_share_and_narrows() -> None:
    for total in (1, 7, 50, 1000):
        for hits in range(total + 1):
            low, high = wilson(hits, total)
            assert 0 <= low <= hits / total <= high <= 1
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    low, high = wilson(5, 10, level=0.5)
    assert wilson(5, 10)[0] < low < 0.5 < high < wilson(5, 10)[1]


# Fitting arithmetic to a vocabulary


def test_arithmetic_for_a_vocabulary_of_digits_is_padded_sums(mathgpt: Decoder) -> None:
    notes: list[str] = []
    padded = load_task("arithmetic/padded")
    for name in ("arithmetic", "arithmetic/add"):
        assert fit_task(load_task(name), mathgpt, OPTIONS, notes.append) == padded
    assert notes == ["this model's vocabulary is digits alone: the task is arithmetic/padded"] * 2
    with pytest.raises(TaskError) as caught:
        fit_task(load_task("arithmetic/mul"), mathgpt, OPTIONS)
    assert str(caught.value) == (
        "task 'arithmetic/mul': this model's vocabulary can write none of its wordings; give your "
        "own with --task FILE.jsonl"
    )
    assert fit_task(padded, mathgpt, OPTIONS) is padded
    own = Task("own", (example("The xylophone is", "big"),))
    assert fit_task(own, mathgpt, OPTIONS) is own, "a user's task is taken as it is"


def test_arithmetic_stays_as_it_is_for_a_model_that_can_write_it(stories260k: Decoder) -> None:
    task = load_task("arithmetic/mul")
    assert fit_task(task, stories260k, OPTIONS) is task
