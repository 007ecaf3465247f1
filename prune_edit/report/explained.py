"""An explanation as one HTML page that needs nothing else, and its parts for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from prune_edit.report import sections
from prune_edit.report.cells import Found, count, number
from prune_edit.report.chain_section import chain
from prune_edit.report.html import document

_COLOURS = """--up: #0072b2; --down: #d55e00; --third: #009e73; --fourth: #8a5a9e;"""
_DARK = """--up: #56b4e9; --down: #e69f00; --third: #3fd0a0; --fourth: #cc9ad6;"""
_STYLE = """
svg { margin-top: .4rem; }
svg text { font-size: 9px; }
svg text.tick { font-size: 8px; }
svg text.band { font-size: 8.5px; font-style: italic; paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; }
.at { stroke: var(--soft); stroke-width: .7; stroke-dasharray: 1.5 2; fill: none; }
svg text.name { font-size: 9px; fill: var(--ink); }
.up { fill: var(--up); } .down { fill: var(--down); }
.none { fill: none; stroke: var(--line); stroke-width: .5; }
.rule { stroke: var(--soft); stroke-width: .7; }
.bar0 { fill: var(--up); } .bar1 { fill: var(--down); }
.line0, .line1, .line2, .line3 { fill: none; stroke-width: 1.6; }
.line0 { stroke: var(--down); } .line1 { stroke: var(--up); }
.line2 { stroke: var(--fourth); stroke-dasharray: 5 3; }
.line3 { stroke: var(--third); stroke-dasharray: 2 3; }
.dot0 { fill: var(--down); } .dot1 { fill: var(--up); } .dot2 { fill: var(--fourth); }
.dot3 { fill: var(--third); }
.rises, .falls { fill: none; stroke-opacity: .6; }
.rises { stroke: var(--up); } .falls { stroke: var(--down); }
.node { fill: var(--back); stroke: var(--soft); stroke-width: .8; }
.predicts .node { stroke: var(--down); stroke-width: 1.8; }
.deep .node { stroke: var(--up); stroke-width: 1.4; }
.answer .node { stroke: var(--ink); stroke-width: 1.8; }
h3 { font-size: .95rem; margin: 1.1rem 0 0; }
p { margin: .5rem 0 0; }
q { quotes: none; background: color-mix(in srgb, var(--soft) 16%, transparent);
  border-radius: .2rem; padding: 0 .2rem; white-space: nowrap; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: .2rem 1rem; }
figure { margin: .4rem 0 0; } figcaption { color: var(--soft); font-size: .85rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; color: var(--soft); font-size: .85rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: .15rem; vertical-align: -.1rem; }
.key .up, .key .bar0 { background: var(--up); } .key .down, .key .bar1 { background: var(--down); }
.key .line0 { background: var(--down); } .key .line1 { background: var(--up); }
.key .line2 { background: var(--fourth); } .key .line3 { background: var(--third); }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem; }
.token { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .35rem;
  background: color-mix(in srgb, var(--up) calc(var(--a, 0) * 60%), transparent); }
.token small { display: block; font-size: .7rem; }
.note { border-left: .25rem solid var(--warning); padding-left: .6rem; }
.scroll table { overflow-wrap: normal; } th { white-space: nowrap; padding-right: .8rem; }
td data { white-space: nowrap; } .words { min-width: 12rem; }
@media (max-width: 30rem) { body { padding: 1rem .5rem; } section { padding: .7rem .6rem; } }
"""

_TITLES = {
    "depth": "Where in depth the answer arises",
    "heads": "Heads",
    "carries": "Memorised digits, and digits that need a carry",
    "attention": "What the top heads look at from the last position",
    "neurons": "Neurons",
    "chain": "The chain, in four stages",
    "curves": "Enough and needed: only the top neurons",
    "lowest": "The lowest neuron",
    "hidden": "Hidden-interpretable shallow neurons",
    "lora": "What the adapter changed",
}
"""The parts of an explanation, in the page's order."""
_SECTIONS: dict[str, Callable[[Found], str]] = {
    "question": sections.question,
    "heads": sections.heads,
    "carries": sections.carries,
    "attention": sections.attention,
    "neurons": sections.neurons,
    "depth": sections.depth,
    "chain": chain,
    "curves": sections.curves,
    "lowest": sections.lowest,
    "hidden": sections.hidden,
    "lora": sections.lora,
}


def page(found: Found) -> str:
    """explanation.json's content as a page."""
    title, lead = _title(found)
    body = f'<header class="info"><h1>{title}</h1>{lead}</header>' + "".join(_parts(found))
    return document(_plain_title(found), body, _page_style())


def fragment(kind: str, found: Found) -> str:
    """A part of an explanation, or a whole one, for a notebook."""
    if found.get("schema"):
        title, lead = _title(found)
        body = f"<h2>{title}</h2>{lead}" + "".join(_parts(found))
    elif kind in _SECTIONS:
        body = f"<section>{_SECTIONS[kind](found)}</section>"
    elif kind == "head map":
        body = f"<section>{sections.heads({'maps': [found]})}</section>"
    else:
        rows = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in found.items())
        body = f"<dl>{''.join(rows)}</dl>"
    return document("", body, _page_style(), whole=False)


def _page_style() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
    return f":root {{ {_COLOURS} }}\n{dark}\n{_STYLE}"


def _plain_title(found: Found) -> str:
    if found["kind"] == "prompt":
        return f"{found['question']['prompt']} {found['question']['answer']}"
    return f"{found['kind']}: {found['task']}"


def _title(found: Found) -> tuple[str, str]:
    """The heading and what stands under it, as HTML."""
    about = found["about"]
    model = f"Model: {escape(about['model'])}"
    if found["kind"] == "prompt":
        asked = found["question"]
        title = f"Why <q>{escape(asked['prompt'])}</q> gives <q>{escape(asked['answer'])}</q>"
        sure = number(asked["probability"], lambda p: f"{p:.4f}")
        lead = f"<p>{model}. Probability {sure}.</p>{_notes(asked['notes'])}"
        return title, lead + sections.question(asked)
    notes = _notes(found["notes"])
    if found["kind"] == "task":
        examples = number(found["examples"], count)
        return (
            f"How the model does {escape(found['task'])}",
            f"<p>{model}. {examples} test prompts.</p>{notes}",
        )
    examples = number(found["lora"]["examples"], count)
    return (
        f"What the adapter {escape(found['adapter'])} changed",
        f"<p>{model}. Over {escape(found['task'])}; prompts: {examples}.</p>{notes}",
    )


def _notes(notes: list[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}.</p>' for note in notes)


def _parts(found: Found) -> Iterator[str]:
    for name, title in _TITLES.items():
        part: Mapping[str, Any] | None = found.get(name)
        if part:
            yield f"<section><h2>{escape(title)}</h2>{_SECTIONS[name](part)}</section>"
    about = found["about"]
    made = ", ".join(f"{key} {value}" for key, value in about["environment"].items())
    yield (
        "<footer><p>Method: arXiv 2409.14144. Heads and neurons are named layer^head and "
        "layer_neuron, counted from 0 as in the base model. Log probabilities are in nats. Shades "
        "grow with the square root of the number; every number is in the JSON.</p>"
        f"<p>{escape(made)}</p></footer>"
    )
