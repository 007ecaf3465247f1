"""One HTML page that needs nothing else: light and dark, and on a telephone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from prune_edit.report.words import (
    VERDICTS,
    asked,
    failures,
    outcome,
    side,
    state,
    subject,
    tally,
    title,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d9dde2; --back: #fff;
  --card: #f6f7f9; --passed: #1a7f45; --blocked: #b3261e; --warning: #8a5a00; --info: #2459a8;
  --unmeasured: #6b4fa0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7af; --line: #3a3f46;
  --back: #14171a; --card: #1d2125; --passed: #57c785; --blocked: #ff8a80; --warning: #f0b84a;
  --info: #8ab4f8; --unmeasured: #c4a8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0; }
h2 { font-size: 1.05rem; margin: 0; }
header { border-left: .4rem solid var(--tone); padding: .2rem 0 .2rem 1rem; margin-bottom: 1.5rem; }
header p { margin: .2rem 0 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .9rem 1rem; margin: 0 0 1rem; }
.top { display: flex; gap: .6rem; align-items: baseline; justify-content: space-between;
  flex-wrap: wrap; }
.state { color: var(--tone); font-weight: 600; white-space: nowrap; }
.passed { --tone: var(--passed); } .blocked { --tone: var(--blocked); }
.warning { --tone: var(--warning); } .info { --tone: var(--info); }
.unmeasured { --tone: var(--unmeasured); }
.of { color: var(--soft); margin: 0; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: .6rem 0 0;
  font-variant-numeric: tabular-nums; }
dt { color: var(--soft); } dd { margin: 0; }
ul { margin: .6rem 0 0; padding-left: 1.2rem; }
svg { display: block; width: 100%; height: auto; margin-top: .7rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
summary { cursor: pointer; margin-top: .7rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: .4rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-top: 1px solid var(--line); }
td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
footer { color: var(--soft); font-size: .85rem; margin-top: 2rem; }
"""


def document(title: str, body: str, style: str = "", whole: bool = True) -> str:
    """A page of a body's HTML with more of a style; not `whole`, a part for another page.

    A part's style holds within it alone.
    """
    styles = _STYLE + style
    if not whole:
        inside = styles.replace(":root", "&").replace("\nbody {", "\n& {")
        return f'<div class="prune-edit"><style>.prune-edit {{{inside}}}</style>{body}</div>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{styles}</style>\n</head>\n<body>\n"
        + body
        + "\n</body>\n</html>\n"
    )


def html(found: Mapping[str, Any]) -> str:
    """gate.json's content as a page."""
    tone = found["verdict"]
    body = [
        f'<header class="{tone}"><h1>{escape(title(found))}</h1>'
        f"<p>{escape(tally(found))}</p></header>",
        *(_section(rule) for rule in found["rules"]),
        _foot(found),
    ]
    return document(f"Gate: {VERDICTS[tone]}", "\n".join(body))


def _section(rule: Mapping[str, Any]) -> str:
    what = state(rule)
    said = {"passed": "passed", "blocked": "blocks", "warning": "warning", "info": "info: missed",
            "unmeasured": "not measured"}[what]  # fmt: skip
    if what == "passed" and rule["level"] == "info" and not rule["checks"]:
        said = "reported"
    parts = [
        f'<div class="top"><h2>{escape(rule["name"])}</h2><span class="state">{said}</span></div>',
    ]
    if not rule["name"].startswith(subject(rule)):
        parts.append(f'<p class="of">{escape(subject(rule))}</p>')
    if rule["why"]:
        parts.append(f'<p class="of">{escape(rule["why"])}</p>')
    parts += ["<dl>", *_facts(rule), "</dl>"]
    parts += [picture(check, rule) for check in rule["checks"]]
    lines = [*failures(rule), *rule["notes"]]
    if lines:
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
    if rule["worst"]:
        parts.append(_examples(rule))
    return f'<section class="{what}">' + "\n".join(parts) + "</section>"


def _facts(rule: Mapping[str, Any]) -> Iterator[str]:
    rows = [(name, side(rule, name)) for name in ("model", "base", "change", "ratio", "reduction")]
    rows += [("wanted", asked(check, rule)) for check in rule["checks"]]
    rows += [("examples", f"{rule['examples']:,}")] if rule["examples"] else []
    for name, value in rows:
        if value != "-":
            yield f"<dt>{name}</dt><dd>{escape(value)}</dd>"


def _examples(rule: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(outcome(rule, each))}</td><td>{escape(each['text'])}</td></tr>"
        for each in rule["worst"]
    )
    head = "base, then model" if rule["worst"][0]["base"] is not None else "model"
    return (
        f"<details open><summary>Examples that speak most against it</summary>"
        f'<div class="scroll"><table><tr><th>{head}</th><th>example</th></tr>{rows}</table></div>'
        "</details>"
    )


def picture(check: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """The interval as a bar, the value as a dot, the allowed side shaded."""
    low, high = check["interval"]
    ends = allowed(check, rule)
    points = [low, high, check["value"], *(end for end in ends if end is not None)]
    left, right = min(points), max(points)
    margin = 0.12 * (right - left) or max(abs(left), 1.0) * 0.1
    left, right = left - margin, right + margin

    def x(value: float) -> float:
        return float(round(10 + 580 * (value - left) / (right - left), 1))

    start = 10.0 if ends[0] is None else x(ends[0])
    stop = 590.0 if ends[1] is None else x(ends[1])
    width = max(3.0, x(high) - x(low))
    marks = "".join(
        f'<line x1="{x(end)}" x2="{x(end)}" y1="4" y2="32" stroke="var(--soft)"/>'
        for end in ends
        if end is not None
    )
    label = f"{asked(check, rule)}: {'met' if check['met'] else 'missed'}"
    return (
        f'<svg viewBox="0 0 600 40" role="img" aria-label="{escape(label, quote=True)}">'
        f'<rect x="{start}" y="8" width="{max(0.0, stop - start):.1f}" height="20" '
        'fill="var(--passed)" opacity="0.16"/>'
        '<line x1="10" x2="590" y1="18" y2="18" stroke="var(--line)"/>'
        f'{marks}<rect x="{x(low)}" y="14" width="{width:.1f}" height="8" rx="2" '
        'fill="var(--tone)" opacity="0.55"/>'
        f'<circle cx="{x(check["value"])}" cy="18" r="6" fill="var(--tone)"/></svg>'
    )


def allowed(check: Mapping[str, Any], rule: Mapping[str, Any]) -> Sequence[float | None]:
    """The lowest and the highest value that meet a bound."""
    bound, limit = check["bound"], check["limit"]
    if bound == "max_distance":
        ideal = rule["ideal"] or 0.0
        return ideal - limit, ideal + limit
    if bound == "max_drop":
        return -limit, None
    return (limit, None) if bound.startswith("min") else (None, limit)


def _foot(found: Mapping[str, Any]) -> str:
    made = found["environment"]
    parts = [f"Rules: {found['rules_file']}.", *(f"{note}." for note in found["notes"])]
    parts.append(
        "Bars are 95 % intervals, of a change paired on the same examples; a rule is held against "
        "their worst side. Shaded is what the rule allows. What was measured holds for these "
        "texts; it does not show a model free of bias."
    )
    parts.append(", ".join(f"{key} {value}" for key, value in made.items()))
    return "<footer>" + "".join(f"<p>{escape(part)}</p>" for part in parts if part) + "</footer>"
