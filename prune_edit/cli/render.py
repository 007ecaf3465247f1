"""What the terminal shows: tables on standard output, progress and notes on standard error.

The only importer of rich.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from prune_edit.planning import Plan
from prune_edit.report.measures import PERPLEXITY, change, compared, kind_of, measures, show
from prune_edit.tasks.task import SPLITS, Task

_FILE_WIDTH = 100  # where there is no terminal to ask
_WIDEST_MAP = 64  # columns of the heat map
_SHADES = " ░▒▓█"
_PLAIN_SHADES = " .-+#"  # for terminals that cannot show the others
_WORDS = ("about", "promotes")  # columns of text


@contextmanager
def working() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """`progress(what, done, total)` and `note(text)` while a verb works.

    Whatever a library prints meanwhile goes to standard error, so that standard output holds the
    result alone. The bar is shown on terminals only, and vanishes.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )

    def progress(what: str, done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(what)
        bar.update(bar.tasks[0].id, description=what, completed=done, total=total)

    def note(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with redirect_stdout(sys.stderr), bar:
        yield progress, note


def line(text: str) -> None:
    """One line on standard output, as it is."""
    _out().print(text, markup=False, highlight=False, soft_wrap=True)


def rows(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table of text: the first column folds, figures never."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        least = None if place else 24
        table.add_column(column, no_wrap=place > 0, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*map(Text, row))
    _out().print(table)


def frontier(found: Mapping[str, Any]) -> None:
    """Every point of a frontier, the dense model first, the knee marked."""
    title = f"task: {found['task']}, units by {found['method']}, recovery: {found['recover']}"
    fast = "prefill batch_32", "decode batch_32"
    columns = ["heads", "neurons", "accuracy", "95 % interval", "parameters"]
    timed = any(point["speed"] for point in found["points"])
    columns += ["prefill", "decode"] if timed else []
    chance = any(point["random"] for point in found["points"])
    columns += ["random units"] if chance else []
    table = _table(title, "", *columns)
    for point in (found["dense"], *found["points"]):
        low, high = point["interval"]
        cells = [
            f"{point['heads']:,}",
            f"{point['neurons']:,}",
            f"{point['accuracy']:.1%}",
            f"{low:.1%}-{high:.1%}",
            show(point["parameters"], "count"),
        ]
        if timed:
            cells += [f"x{point['speed'][name]:.2f}" if point["speed"] else "" for name in fast]
        if chance:
            cells.append(", ".join(f"{value:.1%}" for value in point["random"]))
        mark = "dense" if point is found["dense"] else ""
        table.add_row("knee" if point == found["knee"] else mark, *cells)
    _out().print(table)
    dense = found["dense"]
    names = [(kind, name) for kind in ("tasks", "retained") for name in dense.get(kind, {})]
    if not names:
        return
    heads = [f"retained: {name}" if kind == "retained" else name for kind, name in names]
    table = _table("accuracy by task", "heads, neurons", *heads)
    for point in (dense, *found["points"]):
        cells = [f"{point[kind][name]:.1%}" for kind, name in names]
        table.add_row(f"{point['heads']:,}, {point['neurons']:,}", *cells)
    _out().print(table)


def comparison(found: Mapping[str, Any]) -> None:
    """Dense beside pruned, and the change: evaluation.json's content."""
    pruned = found["pruned"]
    table = _table(f"task: {found['task']}", "", "dense", "pruned", "change")
    for row in compared(found):
        table.add_row(*row)
    _out().print(table)
    low, high = pruned["accuracy_interval"]
    line(f"95 % interval of the pruned accuracy: {low:.1%} to {high:.1%}")
    if random := found.get("random"):
        values = ", ".join(f"{value:.1%}" for value in random["accuracies"])
        line(f"as many random units, recovered alike ({random['recover']}): {values}")


def evaluation(found: Mapping[str, Any]) -> None:
    """One model's figures."""
    table = _table(f"task: {found['task']}", "", "value")
    for name, value in measures(found):
        table.add_row(name, show(value, kind_of(name)))
    _out().print(table)
    low, high = found["accuracy_interval"]
    line(f"95 % interval of the accuracy: {low:.1%} to {high:.1%}")


def edit(found: Mapping[str, Any]) -> None:
    """Bias, what should stay, and chance beside it: edit.json's content."""
    before, after = found["before"], found["after"]
    line(f"concept: {found['concept']}")
    table = _table(
        "bias in nats, 95 % intervals", "pairs", "before", "after", "gone", "p", "chance"
    )
    for name, then in before["bias"].items():
        now, test, random = after["bias"][name], found["tests"][name], found["random"][name]
        cells = [
            f"{s['nats']:.3f} ({s['interval'][0]:.2f}-{s['interval'][1]:.2f})" for s in (then, now)
        ]
        table.add_row(
            name,
            *cells,
            f"{test['reduction']:.0%}",
            f"{test['p']:.4f}",
            f"{min(random):.2f} to {max(random):.2f}",
        )
    _out().print(table)
    table = _table("what should stay", "", "before", "after", "change")
    rows = [
        (f"accuracy: {task}", *(row and row["accuracy"] for row in (was, after["tasks"][task])))
        for task, was in before["tasks"].items()
    ]
    rows.append((PERPLEXITY, before["perplexity"], after["perplexity"]))
    mass = [side["plausible_mass"] for side in (before, after)]
    rows.append(("mass on plausible answers", *mass))
    told = [found["generation"][side]["follows"] for side in ("before", "after")]
    rows.append(("stereotyped of the counted words it writes", *told))
    for name, then, now in rows:
        kind = "share" if name.startswith(("mass", "stereo")) else kind_of(name)
        table.add_row(name, show(then, kind), show(now, kind), change(then, now, kind))
    _out().print(table)
    table = _table("changed most", "unit", "factor", "constant", "score", "promotes")
    for row in found["units"][:10]:
        words = "  ".join(repr(word) for word, _ in row.get("promotes", ())[:5])
        table.add_row(
            row["name"], f"{row['factor']:.2f}", f"{row['constant']:+.2f}", f"{row['score']:+.4f}",
            Text(words),
        )  # fmt: skip
    _out().print(table)
    counts = {
        kind: sum(row["kind"] == kind for row in found["units"]) for kind in ("neuron", "head")
    }
    line(
        f"{counts['neuron']} of {found['of']['neurons']:,} neurons and {counts['head']} of "
        f"{found['of']['heads']:,} heads changed ({found['suppress']}); chance: 20 random choices "
        "of as many, changed alike"
    )


def edited_bias(found: Mapping[str, Any]) -> None:
    """Bias of the dense, the edited, the edited and pruned model: evaluation.json's `edit`."""
    sides = found["bias"]
    table = _table(f"bias in nats, concept: {found['concept']}", "pairs", *sides)
    for name in sides["dense"]:
        cells = [
            f"{side[name]['nats']:.3f} ({side[name]['interval'][0]:.2f}-"
            f"{side[name]['interval'][1]:.2f})"
            for side in sides.values()
        ]
        table.add_row(name, *cells)
    _out().print(table)
    line(f"{found['units']} units edited before pruning; the model card and edit.json say which")


def heat_map(plan: Plan) -> None:
    """The kept heads, a line a layer, and how many neurons stay beside them."""
    console = _out()
    shades = _SHADES if console.encoding.startswith("utf") else _PLAIN_SHADES
    total = plan.n_layers * plan.n_heads
    line(f"kept heads: {plan.kept_heads} of {total}; a line a layer, neurons behind it")
    for layer, (heads, neurons) in enumerate(zip(plan.heads, plan.neurons, strict=True)):
        cells = heat_row(heads, plan.n_heads, shades)
        line(f"{layer:>4} |{cells}| {len(neurons)} of {plan.n_neurons}")


def heat_row(kept: Sequence[int], width: int, shades: str = _SHADES) -> str:
    """One character a head, or a few heads where there are many, darker with more kept."""
    step = -(-width // _WIDEST_MAP)
    cells = []
    for start in range(0, width, step):
        size = min(step, width - start)
        count = sum(start <= head < start + size for head in kept)
        # Rounded up: a kept head is never invisible.
        cells.append(shades[-(-count * (len(shades) - 1) // size)])
    return "".join(cells)


def top_units(found: Mapping[str, Any], unit: str) -> None:
    """The top heads and neurons as the paper names them, and the tokens they promote.

    The scores' column is headed by their `unit`.
    """
    for kind, cells in (("heads", ("head", unit)), ("neurons", ("neuron", unit, "mean m"))):
        if not found[kind]:
            continue
        table = _table(f"top {kind}", *cells, "promotes")
        for each in found[kind]:
            mean = each["coefficient"]
            numbers = [f"{number:.4f}" for number in (each["score"], mean) if number is not None]
            tokens = "  ".join(f"{word!r} {chance:.3f}" for word, chance in each["tokens"])
            table.add_row(each["name"], *numbers, Text(tokens))
        _out().print(table)


def table(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], words: Sequence[int] = ()
) -> None:
    """A table of text; the columns of these numbers fold, the others never."""
    made = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        folds = place in words
        left = folds or place == 0 or column in ("edge",)
        made.add_column(
            column, no_wrap=not folds, overflow="fold", justify="left" if left else "right"
        )
    for row in cells:
        made.add_row(*map(Text, row))
    _out().print(made)


def grid(found: Sequence[Sequence[float | None]]) -> None:
    """A number for every layer and column: darker is more, `-` well below zero, blank none.

    Shades grow with the square root; where there are many columns, the largest of a few is shown.
    """
    console = _out()
    shades = _SHADES if console.encoding.startswith("utf") else _PLAIN_SHADES
    largest = max((abs(v) for row in found for v in row if v is not None), default=0.0) or 1.0
    for layer, row in enumerate(found):
        step = -(-len(row) // _WIDEST_MAP)
        cells = []
        for start in range(0, len(row), step):
            some = [value for value in row[start : start + step] if value is not None]
            value = max(some, key=abs, default=0.0)
            level = round((abs(value) / largest) ** 0.5 * (len(shades) - 1))
            cells.append("-" if value < 0 and level else shades[level])
        line(f"{layer:>4} |{''.join(cells)}|")


def tasks(found: Sequence[Task]) -> None:
    """The built-in tasks: what they are, examples a split, groups."""
    table = _table("built-in tasks", "task", *SPLITS, "about")
    for task in found:
        sizes = [f"{len(task.split(split)):,}" for split in SPLITS]
        groups = f" [{' '.join(filter(None, task.groups))}]" if len(task.groups) > 1 else ""
        table.add_row(task.name, *sizes, Text(task.about + groups))
    _out().print(table)


def _out() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if place == 0 or column in _WORDS else "right",
            no_wrap=place > 0 and column not in _WORDS,  # names fold, figures never
            overflow="fold",
        )
    return table
