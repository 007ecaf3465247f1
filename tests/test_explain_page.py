"""The page, the terminal and the command of `explain`: the numbers shown are the JSON's."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from test_methods import tuned

from prune_edit import plots, verbs
from prune_edit.cli import main
from prune_edit.decoder import Decoder
from prune_edit.errors import PruneEditError
from prune_edit.explain import Chain, LoraExplanation, PromptExplanation, TaskExplanation
from prune_edit.loading import load_decoder
from prune_edit.report.explained import page
from prune_edit.report.svg import rounded
from prune_edit.scoring import load_adapter

NASTY = '<b>&"x"</b>'


@pytest.fixture(scope="module")
def prompt() -> PromptExplanation:
    found = verbs.explain(prompt="3+5=", verify=True)
    assert isinstance(found, PromptExplanation)
    return found


@pytest.fixture(scope="module")
def task() -> TaskExplanation:
    """Sums and differences."""
    found = verbs.explain(task=("arithmetic/add", "arithmetic/sub"), limit=4)
    assert isinstance(found, TaskExplanation)
    return found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the bundled model's layer 2, with weights that matter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="model.layers.2.self_attn.(q|o)_proj")
    torch.manual_seed(0)
    model: Any = get_peft_model(load_decoder().model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder := tmp_path_factory.mktemp("lora") / "adapter")
    return folder


@pytest.fixture(scope="module")
def lora(adapter: Path) -> LoraExplanation:
    """That adapter, over one prompt."""
    found = verbs.explain(prompt="3+5=", adapter=adapter)
    assert isinstance(found, LoraExplanation)
    return found


def numbers(value: Any) -> Iterator[float]:
    """Every number of a JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from numbers(each)
    else:
        for each in value:
            yield from numbers(each)


class Page(HTMLParser):
    """Collects a page's numbers, and checks that it is whole and asks for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.shown: list[tuple[float, str]] = []
        self.drawn: list[tuple[float, str]] = []
        self.value: float | None = None
        self.loose: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        assert not set(found) & {"src", "href", "onload", "onclick"}
        if tag == "data":
            self.value = float(str(found["value"]))
        if "data-value" in found:
            self.drawn.append((float(str(found["data-value"])), ""))
        if tag not in ("meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if "data-value" in dict(attrs):
            self.drawn.append((float(str(dict(attrs)["data-value"])), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "data":
            self.value = None

    def handle_data(self, data: str) -> None:
        if self.value is not None:
            self.shown.append((self.value, data))
        elif self.open and self.open[-1] == "td" and re.fullmatch(r"-?[\d.,]+ ?%?", data.strip()):
            self.loose.append(data)
        elif self.open and self.open[-1] == "title" and self.drawn:
            self.drawn[-1] = (self.drawn[-1][0], data)


def is_rounded(value: float, said: str) -> bool:
    """Whether a text is a number, as it is or in percent, rounded to the places shown."""
    (digits,) = re.findall(r"-?[\d,]+(?:\.\d+)?", said.rpartition(": ")[2])
    places = len(digits.partition(".")[2])
    number = float(digits.replace(",", ""))
    scale = 100 if re.search(r"%|points", said) else 1
    return abs(number - scale * value) <= 0.5000001 * 10.0**-places


def checked(found: Any) -> Page:
    """A page whose every number is the JSON's."""
    there = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    text = page(there)
    assert text == found.to_html()
    read = Page()
    read.feed(text)
    assert read.open == []
    assert not {"script", "link", "img", "iframe", "b8"} & set(read.tags)
    assert "url(" not in text
    assert "http" not in text
    known = set(numbers(there))
    assert read.shown
    assert read.drawn
    assert not read.loose
    for value, said in (*read.shown, *read.drawn):
        assert value in known
        assert is_rounded(value, said), (value, said)
    return read


def test_the_page_of_a_prompt_shows_the_jsons_numbers(prompt: PromptExplanation) -> None:
    read = checked(prompt)
    assert read.tags.count("section") == 8
    shown = [value for value, _ in read.shown]
    for edge in prompt.chain.edges:
        assert edge.measured_drop in shown
    heads = sum(len(row) for row in prompt.heads.of().log_prob_drops)
    drawn = [value for value, _ in read.drawn]
    assert len(drawn) > 2 * heads
    assert prompt.heads.of().log_prob_drops[0][8] in drawn


def test_the_page_of_a_task_shows_the_jsons_numbers(task: TaskExplanation) -> None:
    read = checked(task)
    assert read.tags.count("section") == 7
    assert task.carries is not None
    assert [each.group for each in task.heads.maps] == [
        "all", "arithmetic/add: add", "arithmetic/sub: sub",
    ]  # fmt: skip
    assert task.lowest.rows[0].without_head in [value for value, _ in read.shown]


def test_the_page_of_an_adapter_shows_the_jsons_numbers(lora: LoraExplanation) -> None:
    read = checked(lora)
    assert read.tags.count("section") == 1
    assert lora.lora.layers[2].weights in [value for value, _ in read.shown]
    assert [bool(layer.weights) for layer in lora.lora.layers] == [i == 2 for i in range(8)]
    assert lora.adapter == "adapter"


def test_texts_stay_texts(prompt: PromptExplanation) -> None:
    found = json.loads(json.dumps(prompt.to_dict()).replace('"3"', json.dumps(NASTY)))
    found["question"]["notes"] = [NASTY]
    text = page(found)
    assert NASTY not in text
    assert escape(NASTY) in text
    read = Page()
    read.feed(text)
    assert read.open == []


def test_notebooks_are_shown_the_same(prompt: PromptExplanation) -> None:
    for part in (prompt, prompt.heads, prompt.neurons, prompt.chain, prompt.neurons.rows[0]):
        text = part._repr_html_()
        read = Page()
        read.feed(text)
        assert read.open == []
        assert ":root" not in text
        assert text.startswith('<div class="prune-edit">')
    assert str(prompt.chain.deep[0].name) in prompt.chain._repr_html_()


def test_nothing_is_left_of_a_small_number_but_no_sign() -> None:
    assert rounded(-0.0004, 3) == "0.000"
    assert rounded(-0.0006, 3) == "-0.001"


# Chromium


def chromium(folder: Path, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    plain = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    ).split()
    command = [browser, *plain, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(
    width: int, prompt: PromptExplanation, task: TaskExplanation, tmp_path: Path
) -> None:
    """A frame of a telephone's width, which Chromium's own window cannot have."""
    for found in (prompt, task):
        framed = tmp_path / "frame.html"
        framed.write_text(
            f'<iframe style="width:{width}px;height:800px;border:0" '
            f'srcdoc="{escape(found.to_html(), quote=True)}"></iframe><script>onload = () => {{'
            "const page = document.querySelector('iframe').contentDocument.documentElement;"
            "document.title = `${page.clientWidth} ${page.scrollWidth} ${page.scrollHeight}`;}"
            "</script>",
            encoding="utf-8",
        )
        shown = chromium(tmp_path, framed, "--dump-dom").stdout
        (said,) = re.findall(r"<title>(\d+ \d+ \d+)</title>", shown)
        inner, wide, high = map(int, said.split())
        assert inner == width
        assert wide <= width
        assert high > 2000


def test_the_page_is_drawn_light_and_dark(prompt: PromptExplanation, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "page.html"
    file.write_text(prompt.to_html(), encoding="utf-8")
    corners = {}
    for name, setting in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        chromium(
            tmp_path, file, f"--screenshot={shot}", "--window-size=1280,2400",
            f"--blink-settings=preferredColorScheme={setting}",
        )  # fmt: skip
        drawn = image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
        assert drawn.size == (1280, 2400)
        assert len(drawn.getcolors(1 << 24)) > 100
        corners[name] = drawn.getpixel((2, 2))
    assert min(corners["light"]) > 240
    assert max(corners["dark"]) < 40


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


def test_the_command_writes_the_page_and_its_json(
    prompt: PromptExplanation, tmp_path: Path
) -> None:
    out = tmp_path / "why" / "page.html"
    shown = run("3+5=", "--verify", "--out", str(out))
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "why" / "page.json").read_text())
    assert found == json.loads(json.dumps(prompt.to_dict()))
    assert out.read_text() == prompt.to_html()
    for said in ("'3+5=' gives '8', probability 0.99", "6_126", "0^8 2.3", "cut: share", "█"):
        assert said in shown.output
    pictures = ["page-heads.png", "page-heads.svg"] if plots.available() else []
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == sorted(["page.html", "page.json", *pictures])
    again = run("3+5=", "--out", str(out))
    assert again.exit_code == 8
    assert "exists; give another --out, or --overwrite" in again.output


def test_heads_that_are_gone_are_drawn_too(
    prompt: PromptExplanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = prompt.heads.maps
    few = replace(
        whole,
        log_prob_drops=((None, *whole.log_prob_drops[0][1:]), *whole.log_prob_drops[1:]),
        accuracy_drops=((None, *whole.accuracy_drops[0][1:]), *whole.accuracy_drops[1:]),
    )
    made = replace(prompt, heads=replace(prompt.heads, maps=(few,)))
    monkeypatch.setattr(verbs, "explain", lambda **settings: made)
    shown = run("3+5=", "--out", str(tmp_path / "page.html"))
    assert shown.exit_code == 0, shown.output
    drawn = ["page-heads.png", "page-heads.svg"] if plots.available() else []
    for name in drawn:
        assert (tmp_path / name).stat().st_size > 1000
        assert name in shown.output.replace("\n", "")


def test_json_alone_goes_to_standard_output_and_notes_beside_it() -> None:
    shown = run("3+5=", "--answer", "9", "--json")
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert found["question"]["answer"] == "8"
    assert found["question"]["notes"][0].startswith("the model says '8'")
    assert "the model says '8'" in shown.stderr


def test_a_task_on_the_terminal(task: TaskExplanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "explain", lambda **settings: task)
    shown = run("--task", "arithmetic/add")
    assert shown.exit_code == 0, shown.output
    for said in ("digits, add", "hidden-interpretable", "random kept", "without lowest"):
        assert said in shown.output


def test_an_adapter_on_the_terminal(lora: LoraExplanation, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(verbs, "explain", lambda **settings: given.update(settings) or lora)
    shown = run("lora", "--adapter", "some", "--task", "a", "--task", "b")
    assert shown.exit_code == 0, shown.output
    assert (given["prompt"], given["adapter"], given["task"]) == (None, "some", ("a", "b"))
    assert "coefficients grow" in shown.output
    assert run("lora").exit_code == 2
    assert run("3+5=", "--out", "page.txt").exit_code == 2


def lines_of(shown: Result) -> list[str]:
    """Standard error without the bars of libraries that were imported before the command."""
    lines = shown.stderr.strip().splitlines()
    return [line for line in lines if not line.startswith("Loading weights")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("a " * 300,), 6, "has 301 tokens, the model has 256 positions; shorten it"),
        (("Wörld",), 6, "not in the model's vocabulary"),
        (("3+5=", "--answer", "8", "--token", "2"), 6, "give 1 to 1"),
        (("3+5=", "--task", "arithmetic"), 1, "give one of them"),
        (("--verify",), 1, "give a prompt and no adapter"),
        (("--answer", "8"), 1, "give one, or leave out --answer"),
        (("lora", "--adapter", "nowhere"), 3, "has no adapter_config.json"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], code: int, said: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == code
    assert said in shown.stderr
    assert len(lines_of(shown)) == 1


def test_an_adapter_of_another_base_is_one_line(tmp_path: Path) -> None:
    tuned("llama", tmp_path / "adapter")
    shown = run("3+5=", "--adapter", str(tmp_path / "adapter"))
    assert shown.exit_code == 3
    assert "give an adapter that was tuned on this model" in shown.stderr
    assert len(lines_of(shown)) == 1


def test_the_example_tunes_a_layer_and_explains_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "examples" / "lora_by_layer.py"
    monkeypatch.setattr(sys, "argv", [script.name, str(tmp_path / "out"), "2", "0"])
    runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(r"untuned: 3\d\.\d% of 128 test sums", shown)
    (row,) = json.loads((tmp_path / "out" / "lora_by_layer.json").read_text())["layers"]
    assert f"    0  {row['accuracy']:>8.1%}" in shown
    changed = [layer["weights"] > 0 for layer in row["explained"]["layers"]]
    assert changed == [i == 0 for i in range(8)]
    assert load_adapter(load_decoder(), tmp_path / "out" / "layer-0").layout.full


def test_the_verb_names_what_does_not_go_together() -> None:
    with pytest.raises(PruneEditError, match="top 0 lists no neurons"):
        verbs.explain(prompt="3+5=", top=0)


def test_other_models_are_explained(stories260k: Decoder, shared: Path) -> None:
    text = "Once upon a time, there was a little girl named"
    found = verbs.explain(shared / "models" / "stories260K", text)
    assert isinstance(found, PromptExplanation)
    assert found.question.answer == "Lily"
    assert isinstance(found.chain, Chain)
    sums = verbs.explain(shared / "models" / "mathgpt-4l4h", "293480")
    assert isinstance(sums, PromptExplanation)
    assert sums.question.answer == "0"
    assert all(len(row.weights) == 6 for row in sums.attention.rows)
