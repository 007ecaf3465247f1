"""What is known of a checkpoint as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from prune_edit.editing.card import figure_rows
from prune_edit.report.charts import accuracy_bars, bias_lines, kept_map
from prune_edit.report.html import document
from prune_edit.report.measures import compared, show
from prune_edit.report.words import VERDICTS, failures, side, state, subject, tally

MARK = "<!-- prune-edit report -->"
"""In every page of this kind."""
_OWN = """
main { display: block; } section > h2 + p { margin: .2rem 0 .4rem; }
figure { margin: .8rem 0 0; } figcaption { color: var(--soft); font-size: .85rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child { white-space: normal; } .scroll :is(td, th) { overflow-wrap: normal; }
.known { --tone: var(--info); }
"""


def page(found: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """`gather`'s content; `images` are the pictures as data URIs, by digest.

    Every number shown is one of `found`.
    """
    heading = f"{found['name']}: {_what(found)}"
    tone = found["gates"][0]["verdict"] if len(found["gates"]) == 1 else "known"
    parts = [
        f'<header class="{escape(tone)}"><h1>{escape(heading)}</h1>'
        f"<p>{escape(_summary(found))}</p></header>",
        *_sections(found, images),
        _foot(),
    ]
    return document(heading, "\n".join((MARK, *parts)), _OWN)


def _what(found: Mapping[str, Any]) -> str:
    made = found["provenance"].get("base_model")
    if found["kind"] == "model":
        return f"a {found['model'].get('model_type', 'model')}"
    return f"{made or 'a model'}, {found['kind']}"


def _summary(found: Mapping[str, Any]) -> str:
    model, parts = found["model"], []
    if model.get("parameters") is not None:
        parts.append(f"{model['parameters']:,} parameters")
    if model.get("bytes") is not None:
        parts.append(f"{show(model['bytes'], 'count')}B of weights")
    if plan := found["plan"]:
        parts.append(
            f"{plan['kept_heads']:,} of {plan['of_heads']:,} heads and {plan['kept_neurons']:,} of "
            f"{plan['of_neurons']:,} neurons kept"
        )
    parts += [f"gate: {VERDICTS[each['verdict']]}" for each in found["gates"]]
    return ", ".join(parts)


def _sections(found: Mapping[str, Any], images: Mapping[str, str]) -> Iterator[str]:
    for gate in found["gates"]:
        yield _gate(gate, images)
    if found["evaluation"]:
        yield _evaluation(found["evaluation"])
    if found["edit"]:
        yield _edit(found["edit"])
    if found["plan"]:
        yield _plan(found["plan"])
    for frontier in found["frontiers"]:
        yield _frontier(frontier, found, images)
    if found["explanations"]:
        yield _explanations(found["explanations"])
    if found["pictures"]:
        yield _section("Pictures", _figures(found["pictures"], images))
    yield _section("Origin", _facts(found["provenance"]) or "<p>The folder names none.</p>")
    yield _section("Model", _facts(found["model"]))
    if found["manifest"]:
        yield _manifest(found["manifest"])
    if found["notes"]:
        items = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
        yield _section("What is not known", f"<ul>{items}</ul>")


def _gate(gate: Mapping[str, Any], images: Mapping[str, str]) -> str:
    rows = [
        (rule["name"] if rule["name"].startswith(subject(rule)) else
         f"{rule['name']}: {subject(rule)}", state(rule), side(rule, "model"), side(rule, "base"),
         side(rule, "change"))
        for rule in gate["rules"]
    ]  # fmt: skip
    said = [text for rule in gate["rules"] for text in failures(rule)]
    lines = "".join(f"<li>{escape(text)}</li>" for text in (*said, *gate["notes"]))
    body = (
        f'<p class="of">{escape(tally(gate))}; rules in {escape(gate["rules_file"])}</p>'
        + table(("rule", "", "model", "base", "change"), rows, numbers=False)
        + (f"<ul>{lines}</ul>" if lines else "")
        + _figures(gate["pictures"], images)
    )
    return _section(f"Gate: {VERDICTS[gate['verdict']]}", body, gate["verdict"])


def _evaluation(found: Mapping[str, Any]) -> str:
    random = found.get("random")
    chance = ""
    if random:
        values = ", ".join(f"{value:.1%}" for value in random["accuracies"])
        chance = f"<p>As many random units, recovered alike: {values}.</p>"
    made = found.get("environment") or {}
    measured = ", ".join(f"{key} {value}" for key, value in made.items())
    body = (
        accuracy_bars(found)
        + '<p class="of">Grey: dense, blue: pruned; thin lines are 95 % intervals.</p>'
        + chance
        + table(("", "dense", "pruned", "change"), list(compared(found)))
        + f'<p class="of">On the test split, with 95 % intervals. {escape(measured)}</p>'
    )
    return _section(f"Figures: {found['task']}", body)


def _edit(report: Mapping[str, Any]) -> str:
    units = [
        (row["name"], f"{row['factor']:g}", f"{row['constant']:g}", f"{row['score']:+.4f}",
         ", ".join(word.strip() for word, _ in row.get("promotes", ())[:5]))
        for row in report["units"]
    ]  # fmt: skip
    body = (
        table(("", "before", "after", "20 random choices"), list(figure_rows(report)))
        + bias_lines(report["answers"])
        + '<p class="of">Bias of each answer before (ring) and after (dot).</p>'
        + _details(
            f"{len(units)} changed units",
            table(("unit", "factor", "constant", "score", "promotes"), units, numbers=False),
        )
    )
    return _section(f"Edit: {report['concept']}", body)


def _plan(plan: Mapping[str, Any]) -> str:
    about = {key: value for key, value in plan.items() if not isinstance(value, list)}
    rows = [
        (str(layer), str(len(row["heads"])), ", ".join(map(str, row["heads"])) or "none",
         f"{row['neurons']:,}")
        for layer, row in enumerate(plan["layers"])
    ]  # fmt: skip
    heads = ("layer", f"heads of {plan['n_heads']}", "which", f"neurons of {plan['n_neurons']:,}")
    body = kept_map(plan) + _facts(about) + _details("every layer", table(heads, rows))
    return _section("Plan: what is kept", body)


def _frontier(
    frontier: Mapping[str, Any], found: Mapping[str, Any], images: Mapping[str, str]
) -> str:
    own = (found["plan"] or {}).get("digest")
    rows = [
        (f"{point['heads']:,}", f"{point['neurons']:,}", f"{point['accuracy']:.1%}",
         f"{point['parameters']:,}", "this plan" if point["plan_digest"] == own else "")
        for point in frontier["points"]
    ]  # fmt: skip
    body = table(("heads", "neurons", "accuracy", "parameters", ""), rows)
    about = f"{frontier['task']}, units by {frontier['method']}, recovery {frontier['recover']}"
    body = f'<p class="of">{escape(about)}</p>{body}{_figures(frontier["pictures"], images)}'
    return _section(f"Frontier of the same base: {frontier['folder']}", body)


def _explanations(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (each["of"], each["kind"], each["answer"] or "", f"{each['probability']:.4f}"
         if each["probability"] is not None else "", each["file"])
        for each in found
    ]  # fmt: skip
    heads = ("of", "", "it says", "probability", "file beside")
    return _section("Explanations of these weights", table(heads, rows, numbers=False))


def _manifest(manifest: Mapping[str, Any]) -> str:
    files = manifest["files"]
    said = (
        f"{len(files)} files are as the manifest says" if manifest["ok"] else "Files have changed"
    )
    said += "; signed" if manifest["signed"] else ""
    body = f"<p>{escape(said)}.</p>"
    if manifest["differences"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in manifest["differences"])
        body += f"<ul>{items}</ul>"
    body += _details("files", f"<p>{escape(', '.join(files))}</p>")
    return _section("Manifest", body, "passed" if manifest["ok"] else "blocked")


def _figures(rows: Sequence[Mapping[str, Any]], images: Mapping[str, str]) -> str:
    return "".join(
        f'<figure><img src="{images[row["sha256"]]}" alt="{escape(row["name"], quote=True)}">'
        f"<figcaption>{escape(row['name'])}</figcaption></figure>"
        for row in rows
        if row["sha256"] in images
    )


def _section(title: str, body: str, tone: str = "known") -> str:
    return f'<section class="{escape(tone)}"><h2>{escape(title)}</h2>\n{body}</section>'


def _facts(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_shown(value))}</dd>"
        for key, value in values.items()
        if value not in (None, "", [], {})
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _shown(value: object, most: int = 400) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_shown(each, 80)}" for key, each in value.items())
    elif isinstance(value, list):
        text = ", ".join(_shown(each, 80) for each in value)
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table that scrolls where the screen is narrow; all columns but the first are numbers."""
    kind = ["", *(' class="number"' if numbers else "" for _ in heads[1:])]
    top = "".join(f"<th{k}>{escape(cell)}</th>" for k, cell in zip(kind, heads, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _foot() -> str:
    said = (
        "Gathered from the folder's files and from what stands beside it; nothing was measured for "
        "this page. Figures hold for their tests and texts; they do not show a model free of bias."
    )
    return f"<footer><p>{escape(said)}</p></footer>"
