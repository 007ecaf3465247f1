"""Imports point one way along the flow, and only the command line draws on the terminal."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prune_edit

ROOT = Path(prune_edit.__file__).parent
MODULES = {
    ".".join(("prune_edit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
FLOW = (
    "tasks", "scoring", "planning", "recover", "editing", "gating", "report", "explain", "plots",
    "verbs", "cli",
)  # fmt: skip
"""Rooms in the order of the flow: none imports one that stands behind it."""


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions, but for type checkers only."""

    def walk(nodes: list[ast.AST]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:  # beside it: the code that travels with a checkpoint
                    module = ".".join(("prune_edit", *path.parent.relative_to(ROOT).parts, module))
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    yield whole if whole in MODULES else module
            yield from walk(list(ast.iter_child_nodes(node)))

    yield from walk([ast.parse(path.read_text())])


GRAPH = {name: set(imports(path)) for name, path in MODULES.items()}


def room(module: str) -> str:
    """`prune_edit.scoring.cache` -> `scoring`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def own(name: str) -> set[str]:
    return {module for module in GRAPH[name] if module in MODULES}


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        list(
            TopologicalSorter({name: own(name) - {"prune_edit"} for name in MODULES}).static_order()
        )
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_follow_the_flow() -> None:
    places = {name: i for i, name in enumerate(FLOW)}
    assert set(FLOW) <= {room(name) for name in MODULES}
    wrong = [
        f"{name} imports {module}"
        for name in MODULES
        if room(name) in places
        for module in own(name)
        if places.get(room(module), -1) > places[room(name)]
    ]
    assert not wrong


def test_what_stands_between_the_rooms_knows_none_behind_it() -> None:
    """A module of no room, such as decoder.py, brings a room nothing that stands behind that."""
    places = {name: i for i, name in enumerate(FLOW)}

    def reach(name: str, seen: set[str]) -> set[str]:
        for module in own(name) - {"prune_edit"}:
            if module not in seen:
                seen.add(module)
                reach(module, seen)
        return seen

    for name in MODULES:
        if (place := places.get(room(name))) is not None:
            behind = {m for m in reach(name, set()) if places.get(room(m), -1) > place}
            assert not behind, f"{name} reaches {sorted(behind)}"


def test_only_the_command_line_imports_click_and_rich() -> None:
    users = {
        name for name, found in GRAPH.items() for module in found
        if module.split(".")[0] in ("click", "rich")
    }  # fmt: skip
    assert {room(name) for name in users} == {"cli"}
    assert {name for name in users if any(m.startswith("rich") for m in GRAPH[name])} == {
        "prune_edit.cli.render"
    }


def test_the_code_that_travels_with_a_checkpoint_stands_alone() -> None:
    for name in MODULES:
        if room(name) == "modeling":
            assert {room(module) for module in own(name)} <= {"modeling"}, name


def test_module_names_of_models_stand_in_the_table_alone() -> None:
    spelled = ("self_attn", "c_proj", "down_proj", "o_proj", "gate_proj", "up_proj", "c_attn")
    home = ("prune_edit.families", "prune_edit.modeling")
    for name, path in MODULES.items():
        if name.startswith(home):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found = [word for word in spelled if any(word in text for text in strings)]
        assert not found, f"{name} spells {found}"
