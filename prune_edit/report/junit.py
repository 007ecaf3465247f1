"""JUnit XML: a test case a rule, as CI systems read it.

A rule of level block that failed is a failure, one that could not be measured an error; warnings
pass, and say so in their output, since JUnit has no third state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from prune_edit.report.words import asked, failures, got, outcome, state

_SUITE = "prune-edit gate"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(found: Mapping[str, Any]) -> str:
    """gate.json's content as JUnit XML."""
    rules = found["rules"]
    failed = sum(state(rule) == "blocked" for rule in rules)
    broken = sum(_is_error(rule) for rule in rules)
    counts = {
        "tests": str(len(rules)), "failures": str(failed), "errors": str(broken), "skipped": "0"
    }  # fmt: skip
    suites = ElementTree.Element("testsuites", {"name": _SUITE, **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _SUITE, **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for name in ("model", "base"):
        if found[name]:
            about = {"name": name, "value": _clean(found[name]["name"])}
            ElementTree.SubElement(properties, "property", about)
    for rule in rules:
        _case(suite, rule)
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _is_error(rule: Mapping[str, Any]) -> bool:
    return bool(rule["status"] == "unmeasured" and rule["level"] != "info")


def _case(suite: ElementTree.Element, rule: Mapping[str, Any]) -> None:
    names = {"classname": f"gate.{rule['level']}", "name": _clean(rule["name"])}
    case = ElementTree.SubElement(suite, "testcase", names)
    said = list(failures(rule))
    text = "\n".join([*said, *(f"{outcome(rule, e)}  {e['text']}" for e in rule["worst"])])
    if state(rule) == "blocked":
        about = {"message": _clean(said[0]), "type": "blocked"}
        ElementTree.SubElement(case, "failure", about).text = _clean(text)
    elif _is_error(rule):
        about = {"message": _clean(said[0]), "type": "unmeasured"}
        ElementTree.SubElement(case, "error", about).text = _clean(text)
    else:
        met = [f"{got(check, rule)}, wanted {asked(check, rule)}" for check in rule["checks"]]
        lines = [f"{state(rule).upper()}: {text}"] if said else met
        if lines:
            ElementTree.SubElement(case, "system-out").text = _clean("\n".join(lines))


def _clean(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return _FORBIDDEN.sub("�", text)
