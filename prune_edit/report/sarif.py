"""SARIF 2.1.0 (OASIS standard), as code scanning reads it: a rule each, and a result each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from prune_edit.report.words import asked, failures, got, outcome, subject

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"block": "error", "warn": "warning", "info": "note"}


def sarif(found: Mapping[str, Any]) -> str:
    """gate.json's content as SARIF: what failed by its level, what passed of kind `pass`."""
    rules = found["rules"]
    run = {
        "tool": {
            "driver": {
                "name": "prune-edit gate",
                "version": str(found["environment"].get("prune_edit", "")),
                "rules": [_descriptor(rule) for rule in rules],
            }
        },
        "invocations": [_invocation(found)],
        "results": [_result(rule, number, found) for number, rule in enumerate(rules)],
        "columnKind": "utf16CodeUnits",
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1, ensure_ascii=False) + "\n"


def _identifier(rule: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", rule["name"].lower()).strip("-") or "rule"


def _descriptor(rule: Mapping[str, Any]) -> dict[str, Any]:
    wanted = "; ".join(asked(check, rule) for check in rule["checks"])
    text = f"{subject(rule)}: {wanted}" if wanted else subject(rule)
    return {
        "id": _identifier(rule),
        "shortDescription": {"text": rule["name"]},
        "fullDescription": {"text": text},
        **({"help": {"text": rule["why"]}} if rule["why"] else {}),
        "defaultConfiguration": {"level": _LEVELS[rule["level"]]},
        "properties": {"figure": rule["figure"], "of": rule["of"], "unit": rule["unit"]},
    }


def _result(rule: Mapping[str, Any], number: int, found: Mapping[str, Any]) -> dict[str, Any]:
    status = rule["status"]
    kind = {"passed": "pass", "failed": "fail", "unmeasured": "notApplicable"}[status]
    # The standard: a result of another kind than `fail` has level `none`.
    said = list(failures(rule)) or [
        f"{subject(rule)}: {got(check, rule)}, wanted {asked(check, rule)}"
        for check in rule["checks"]
    ]
    examples = [f"{outcome(rule, each)}  {each['text']}" for each in rule["worst"]]
    text = "\n".join([*(said or [f"{subject(rule)}: reported"]), *examples])
    model = str(found["model"]["name"])
    return {
        "ruleId": _identifier(rule),
        "ruleIndex": number,
        "kind": kind,
        "level": _LEVELS[rule["level"]] if kind == "fail" else "none",
        "message": {"text": text},
        "locations": [
            {
                # Code scanning shows only results that lie in a file: the rules are the one there.
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(found["rules_file"])},
                    "region": {"startLine": 1},
                },
                "logicalLocations": [{"fullyQualifiedName": model, "kind": "module"}],
            }
        ],
        "partialFingerprints": {
            "ruleAndModel/v1": hashlib.sha256(f"{rule['name']}\0{model}".encode()).hexdigest()
        },
        "properties": {
            key: rule[key] for key in ("model", "base", "change", "ratio", "reduction", "checks")
        },
    }


def _uri(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="/.-_")


def _invocation(found: Mapping[str, Any]) -> dict[str, Any]:
    notices = [
        {"level": "error", "message": {"text": f"{rule['name']}: {rule['error']}"}}
        for rule in found["rules"]
        if rule["error"]
    ] + [{"level": "note", "message": {"text": note}} for note in found["notes"]]
    return {
        "executionSuccessful": found["verdict"] != "unmeasured",
        "exitCode": found["exit_code"],
        **({"toolExecutionNotifications": notices} if notices else {}),
    }
