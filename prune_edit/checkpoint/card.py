"""The model card, README.md of a written checkpoint: what was kept, what it costs, how to load it.

It holds no timings and no paths, so that the same plan and input give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_edit.planning import Plan


def model_card(
    comparison: Mapping[str, Any] | None, plan: Plan, provenance: Mapping[str, Any]
) -> str:
    """The card of a checkpoint that holds `plan`.

    `comparison` is evaluation.json's content, without which the figures are left out. Of
    `provenance`, `base_model`, `tool_version`, `task`, `method`, `recover` and `format` are used
    where given.
    """
    facts = {**((comparison or {}).get("plan") or {}), **provenance}
    blocks = [
        _front_matter(facts, plan),
        _summary(facts, plan),
        *(_figures(comparison) if comparison else ()),
        _kept(plan),
        _loading(str(facts.get("format", "ragged"))),
        *((_adapter(facts),) if facts.get("adapter") else ()),
        _limits(facts, plan),
    ]
    return "\n\n".join(blocks) + "\n"


_REPORT = "<!-- prune-edit report -->"


def with_report(card: str, page: str) -> str:
    """The card with a line that links the page beside it; the same card where it has one."""
    if _REPORT in card:
        return card
    return (
        f"{card.rstrip()}\n\n{_REPORT}\nEverything known of this model on one page: "
        f"[{page}]({page}).\n"
    )


def _front_matter(facts: Mapping[str, Any], plan: Plan) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base := facts.get("base_model"):
        lines.append(f"base_model: {_yaml(base)}")
    lines += ["tags:", "- prune-edit", "- pruned"]
    lines += [f"- {_yaml(plan.task)}"] if plan.task else []
    return "\n".join([*lines, "---"])


def _yaml(value: object) -> str:
    """A scalar that YAML reads as this text: JSON's strings are YAML's."""
    return json.dumps(str(value))


def _summary(facts: Mapping[str, Any], plan: Plan) -> str:
    base = facts.get("base_model", "a base model")
    task = f" for the task `{plan.task}`" if plan.task else ""
    how = {
        "none": "by zero",
        "mean": "by their mean",
        "least-squares": "by their mean, and what stays is refitted by least squares",
        "lora": "by their mean, and what stays is tuned (LoRA, merged)",
        "full": "by their mean, and what stays is tuned in full",
    }
    heads, neurons = plan.n_heads * plan.n_layers, plan.n_neurons * plan.n_layers
    tool = " ".join(("prune-edit", str(facts.get("tool_version", "")))).strip()
    return (
        f"# {base}, pruned{task}\n\n"
        f"Made by {tool} from {base}: {_share(plan.kept_heads, heads)} heads and "
        f"{_share(plan.kept_neurons, neurons)} FFN neurons are kept, chosen by "
        f"`{plan.method}` (seed {plan.seed}). What was removed is replaced "
        f"{how[str(facts.get('recover', 'none'))]}."
    )


def _share(kept: int, total: int) -> str:
    return f"{kept:,} of {total:,} ({kept / total:.1%})"


def _figures(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Accuracy, size and what was lost; speed is left to evaluation.json."""
    dense, pruned = comparison["dense"], comparison["pruned"]
    rows = [
        (f"accuracy on {comparison['task']}", *(_accuracy(side) for side in (dense, pruned))),
        *(
            (f"task: {task}", *(_point(side["tasks"], task) for side in (dense, pruned)))
            for task in dense.get("tasks", {})
        ),
        *(
            (
                f"- {group or 'no group'}",
                *(_point(side["groups"], group) for side in (dense, pruned)),
            )
            for group in dense["groups"]
            if len(dense["groups"]) > 1
        ),
        *(
            (f"retained: {task}", *(_point(side["retained"], task) for side in (dense, pruned)))
            for task in dense["retained"]
        ),
        (
            "perplexity on plain text",
            *(_number(side["perplexity"], ".3f") for side in (dense, pruned)),
        ),
        ("parameters", *(_number(side["parameters"], ",") for side in (dense, pruned))),
        ("bytes of weights", *(_number(side["bytes"], ",") for side in (dense, pruned))),
        (
            f"FLOPs per token at context {dense['flops_context']}",
            *(_number(side["flops_per_token"], ",") for side in (dense, pruned)),
        ),
    ]
    yield "## Measured"
    yield _table(("", "dense", "pruned"), rows)
    yield (
        "Accuracies are on the test split, which neither scores nor budgets saw, with Wilson's "
        "95 % interval. Speed and memory, with the machine they were measured on, are in "
        "`evaluation.json`."
    )


def _accuracy(side: Mapping[str, Any]) -> str:
    low, high = side["accuracy_interval"]
    return f"{side['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _point(rows: Mapping[str, Mapping[str, Any]], name: str) -> str:
    return f"{rows[name]['accuracy']:.1%}" if name in rows else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _kept(plan: Plan) -> str:
    rows = [
        (str(layer), str(len(heads)), ranges(heads) or "none", str(len(neurons)))
        for layer, (heads, neurons) in enumerate(zip(plan.heads, plan.neurons, strict=True))
    ]
    return "## Kept\n\nNumbers are the base model's; the neurons' are in `plan.json`.\n\n" + _table(
        ("layer", f"heads of {plan.n_heads}", "which", f"neurons of {plan.n_neurons}"), rows
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines
    )


_STOCK = {
    "masked": "A stock architecture; what was removed is zero, so it is as large and as slow as "
    "the base model.",
    "uniform": "A stock architecture: every layer has the same sizes, padded with zeros to the "
    "widest, so no remote code is needed and serving engines take it.",
}


def _loading(form: str) -> str:
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if form in _STOCK:
        return f"## Load\n\n{_STOCK[form]}\n\n```python\n{lines}"
    return (
        "## Load\n\nEvery layer has its own sizes, so the modelling code comes along; with "
        "prune-edit installed, no remote code is needed.\n\n```python\n"
        "import prune_edit  # or pass trust_remote_code=True in both lines below\n"
        f"{lines}\n\n"
        "The sizes are in `per_layer_config`, as transformers' own schema has them, and tensors "
        "have their stock names. Once a transformers release builds this architecture from it, "
        "taking `pruned_` off `model_type` in `config.json` makes the folder a stock one, unless "
        "`attention_output_bias` or `ffn_output_bias` there asks for a bias that the stock modules "
        "lack."
    )


def _adapter(facts: Mapping[str, Any]) -> str:
    return (
        f"## Adapter\n\nThe last tuning's LoRA adapter is in `{facts['adapter']}/`, as peft saves "
        "it. It is merged into the weights here; its README says which base it belongs to, and how "
        "to get that back."
    )


def _limits(facts: Mapping[str, Any], plan: Plan) -> str:
    task = f"`{plan.task}`" if plan.task else "its task"
    return (
        f"## Limits\n\nThis model is made for {task}. Other skills of "
        f"{facts.get('base_model', 'the base model')} are reduced or gone: check them before use. "
        "Its biases and licence are the base model's."
    )
