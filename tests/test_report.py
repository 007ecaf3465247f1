"""The reports: JUnit, Markdown, SARIF and HTML of one verdict, whatever its texts hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from prune_edit.report import FILES, html, junit, markdown, sarif
from prune_edit.report.words import failures, number, side, span, state, tally, title

NASTY = 'A <b>"nurse"</b> & a | b\x00 `x` said\nthat'


def quantity(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


def rule(name: str, level: str, status: str, **more: Any) -> dict[str, Any]:
    met = status == "passed"
    check = {
        "bound": "max_drop", "limit": 0.02, **quantity(-0.03, -0.05, -0.01), "worst": -0.05,
        "margin": 0.01 if met else -0.03, "met": met, "value_meets": met,
    }  # fmt: skip
    return {
        "name": name, "figure": "accuracy", "of": "facts", "group": "", "level": level, "why": "",
        "unit": "share", "ideal": None, "status": status, "error": "", "checks": [check],
        "model": quantity(0.91, 0.89, 0.93), "base": quantity(0.94, 0.92, 0.96),
        "change": quantity(-0.03, -0.05, -0.01), "ratio": quantity(0.97, 0.95, 0.99),
        "reduction": None, "examples": 500, "notes": [],
        "worst": [] if met else [{"text": NASTY, "group": "g", "model": 0.0, "base": 1.0}],
        **more,
    }  # fmt: skip


FOUND: dict[str, Any] = {
    "schema": 1, "verdict": "blocked", "exit_code": 1,
    "model": {"name": "release"}, "base": {"name": "dense"}, "rules_file": "my gate.toml",
    "rules": [
        rule("keeps facts", "block", "failed", why="it must"),
        rule(NASTY, "warn", "failed"),
        rule("small", "block", "passed"),
        rule("told", "info", "failed"),
        rule("unknown", "block", "unmeasured", error="no <such> task", checks=[], model=None,
             base=None, change=None, ratio=None, worst=[]),
    ],
    "notes": ["a note"],
    "environment": {"prune_edit": "0.1.0", "torch": "2", "device": "cpu"},
}  # fmt: skip


def test_words_name_value_interval_and_by_how_much() -> None:
    (said,) = failures(FOUND["rules"][0])
    assert said == (
        "accuracy of facts: -3.0 points (95 %: -5.0 to -1.0 points), wanted a fall of at most "
        "2.0 points; the worst side, -5.0 points, misses it by 3.0 points"
    )
    unsure = rule("x", "block", "failed")
    unsure["checks"][0] |= {"value_meets": True}
    assert "500 examples are too few to tell" in next(failures(unsure))
    assert [state(each) for each in FOUND["rules"]] == [
        "blocked", "warning", "passed", "info", "unmeasured",
    ]  # fmt: skip
    assert tally(FOUND) == "1 blocked, 1 unmeasured, 1 warning, 1 info, 1 passed"
    assert title(FOUND) == "release against dense: blocked"
    assert side(FOUND["rules"][0], "model") == "91.0 % (89.0 to 93.0 %)"
    assert number(7_164_000, "bytes") == "7.164MB"
    assert number(1234.5, "tokens/s") == "1.234k/s"
    assert span("1B", "2B") == "1B to 2B"


def test_junit_counts_failures_and_errors() -> None:
    root = ElementTree.fromstring(junit(FOUND))
    assert root.tag == "testsuites"
    (suite,) = root
    for element in (root, suite):
        assert {key: element.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
            "tests": "5", "failures": "1", "errors": "1", "skipped": "0",
        }  # fmt: skip
    cases = suite.findall("testcase")
    assert [[child.tag for child in case] for case in cases] == [
        ["failure"], ["system-out"], ["system-out"], ["system-out"], ["error"],
    ]  # fmt: skip
    failure = cases[0][0]
    assert "misses it by 3.0 points" in str(failure.get("message"))
    assert '<b>"nurse"</b> & a | b' in str(failure.text)  # an example, escaped and read back
    assert str(cases[1][0].text).startswith("WARNING: ")


def check_sarif(log: dict[str, Any]) -> None:
    """What the schema of SARIF 2.1.0 and GitHub's code scanning ask of such a log."""
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert {"tool", "invocations", "results", "columnKind"} == set(run)
    driver = run["tool"]["driver"]
    assert driver["name"]
    ids = [each["id"] for each in driver["rules"]]
    assert len(set(ids)) == len(ids)
    for each in driver["rules"]:
        assert each["defaultConfiguration"]["level"] in ("error", "warning", "note")
        for key in ("shortDescription", "fullDescription"):
            assert each[key]["text"]
    for result in run["results"]:
        assert result["ruleId"] == ids[result["ruleIndex"]]
        assert result["kind"] in ("pass", "fail", "notApplicable")
        # 3.27.10: another kind than `fail` has level `none`.
        assert (result["level"] == "none") == (result["kind"] != "fail")
        assert result["message"]["text"]
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9%/._-]+", physical["artifactLocation"]["uri"])
        assert physical["region"]["startLine"] >= 1
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    (invocation,) = run["invocations"]
    assert isinstance(invocation["executionSuccessful"], bool)
    for notice in invocation.get("toolExecutionNotifications", ()):
        assert notice["level"] in ("none", "note", "warning", "error")
        assert notice["message"]["text"]


def test_sarif_is_of_the_standards_shape() -> None:
    log = json.loads(sarif(FOUND))
    check_sarif(log)
    results = log["runs"][0]["results"]
    assert [(each["kind"], each["level"]) for each in results] == [
        ("fail", "error"), ("fail", "warning"), ("pass", "none"), ("fail", "note"),
        ("notApplicable", "none"),
    ]  # fmt: skip
    assert results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == (
        "my%20gate.toml"
    )


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in ("meta", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_shows_texts_as_they_are() -> None:
    text = html(FOUND)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert '<b>"nurse"</b> & a | b' in page.text
    assert page.tags.count("section") == 5
    assert page.tags.count("svg") == 4
    assert "prefers-color-scheme: dark" in text
    assert 'content="width=device-width' in text
    assert "does not show a model free of bias" in page.text


def test_markdown_keeps_its_table_whole() -> None:
    text = markdown(FOUND)
    assert text.startswith("## release against dense: blocked\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    head = next(line for line in rows if "wanted" in line)
    table = rows[rows.index(head) : rows.index(head) + 6]
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in table]
    assert len(set(cells)) == 1
    assert "<b>" not in text.replace("\\<b\\>", "")


@pytest.mark.parametrize("name", sorted(FILES))
def test_reports_are_the_same_every_time_and_say_nothing_absolute(name: str) -> None:
    text = FILES[name](FOUND)
    assert text == FILES[name](json.loads(json.dumps(FOUND)))
    assert text.endswith("\n")
    assert "unbiased" not in text
    alone = {**FOUND, "base": None}
    assert "dense" not in FILES[name](alone)
