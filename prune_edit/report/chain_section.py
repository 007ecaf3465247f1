"""The section of an explanation's page about the chain: the graph, its nodes and its edges."""

from __future__ import annotations

from html import escape

from prune_edit.report.cells import Found, count, key, number, short, table, tokens
from prune_edit.report.chain_graph import graph
from prune_edit.report.svg import heat_map, nats, percent, rounded


def chain(found: Found) -> str:
    """The graph, its nodes and its edges."""
    shallow = [
        [
            f"<q>{each['name']} @{each['position']}</q>",
            f"<q>{escape(each['token'])}</q>",
            number(each["score"], percent),
            tokens(each["before"]),
            number(each["layer_after"], str),
            tokens(each["after"]),
            f"{number(each['concepts_before'], count)} to {number(each['concepts_after'], count)}"
            + (" hidden-interpretable" if each["hidden"] else ""),
        ]
        for each in found["shallow"]
    ]
    deep = [
        [
            each["name"] + (" root" if each["root"] else ""),
            number(each["change"], short),
            number(each["importance"], short),
            number(each["coefficient"], short),
            tokens(each["says"]),
        ]
        for each in found["deep"]
    ]
    names = found["tokens"]
    carriers = heat_map(
        found["carriers"],
        "What layers bring from which token",
        lambda i, j: f"layer {i}, {names[j]} @{j}",
        percent,
        names,
    )
    return (
        f"{_path(found)}{key(up='brings', down='takes')}{graph(found)}"
        f"<h3>Shallow neurons: what they say before and after attention</h3>"
        "<p>Brings: what the neuron brings the deep neurons' keys through attention, as a share of "
        f"the sizes of all that heads bring. Concepts ({escape(found['concepts'])}) among the top "
        f"{number(found['tokens_read'], count)} tokens.</p>"
        + table(
            ["neuron", "at", "brings", "says", "layer", "after its value-output map", "concepts"],
            shallow,
        )
        + f"<h3>Layers and tokens that carry it to the last position</h3>{carriers}"
        + "<h3>Deep neurons</h3>"
        + table(["neuron", "change", "importance", "m", "says"], deep)
        + f"<h3>Edges</h3>{_edges(found)}"
    )


def _edges(found: Found) -> str:
    columns = ["stage", "from", "to", "share", "product"]
    columns += ["share when cut", "answer loses"] if found["verified"] else []
    rows = []
    for edge in found["edges"]:
        cells = [
            edge["stage"],
            f"<q>{escape(edge['source'])}</q>",
            f"<q>{escape(edge['target'])}</q>",
            number(edge["share"], percent),
            number(edge["product"], short),
        ]
        if found["verified"]:
            cells += [
                number(edge["measured_share"], percent),
                number(edge["measured_drop"], lambda v: f"{rounded(v, 4)} nats"),
            ]
        rows.append(cells)
    said = (
        "<p>Share: the part of a neuron's key products, or of what a head brings the deep neurons' "
        "keys, that comes by this edge alone, read off the weights; above 100 % where others take. "
        "Product: the inner product itself; into the answer, the neuron's importance in nats."
    )
    if found["verified"]:
        said += (
            " When cut: this edge alone taken away, the share that the target then lacks, and what "
            "the answer's log probability loses."
        )
    return f"{said}</p>{table(columns, rows)}"


def _path(found: Found) -> str:
    """The strongest way back from the answer, in words."""
    edges = found["edges"]

    def strongest(target: str, kinds: tuple[str, ...]) -> Found | None:
        own = [e for e in edges if e["target"] == target and e["share"] and e["stage"] in kinds]
        return max(own, key=lambda edge: edge["share"], default=None)

    last = max(
        (e for e in edges if e["target"] == found["answer"] and e["share"] is None),
        key=lambda edge: edge["product"],
        default=None,
    )
    if last is None:
        return ""
    steps = [f"<q>{escape(found['answer'])}</q>"]
    steps.append(f"<b>{escape(last['source'])}</b> ({number(last['product'], nats)})")
    head = strongest(last["source"], ("feature predicting",))
    if head is not None:
        steps.append(f"head <b>{head['source']}</b> ({number(head['share'], percent)})")
        token = strongest(head["source"], ("feature transferring",))
        if token is not None:
            steps.append(
                f"token <b>{escape(token['source'])}</b> ({number(token['share'], percent)})"
            )
    return f"<p>Followed back along its strongest edges: {' &#8592; '.join(steps)}</p>"
