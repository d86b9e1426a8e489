"""The layout of the package: imports run one way, files stay readable, the library prints nothing."""

import ast
from pathlib import Path

import networkx as nx
import pytest

import torchshear

ROOT = Path(torchshear.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = {"graph": 0, "dependency": 1, "pruners": 2, "speedup": 2}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "torchshear"}


def layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else "(top)"
    lowest = ("_arguments", "_batches", "_checkpoint", "_distributed", "_files", "_other_tools", "_tables")
    low = {"errors": -3, "_reading": -2, **dict.fromkeys(lowest, -1)}
    return LAYERS.get(part, low.get(part, 3))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    own = module_of(path)
    for other in imports_of(path):
        same_package = own.split(".")[1:2] == other.split(".")[1:2]
        assert same_package or layer(other) < layer(own) or layer(own) == 3, f"{own} imports {other}"


def test_no_cycles() -> None:
    modules = {module_of(path) for path in FILES}
    graph = nx.DiGraph((module_of(path), other) for path in FILES for other in imports_of(path) if other in modules)
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    inner = graph.subgraph(graph.nodes - packages)
    assert nx.is_directed_acyclic_graph(inner), list(nx.simple_cycles(inner))[:3]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 400


def test_no_import_hides_in_a_function() -> None:
    for path in FILES:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                hidden = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not hidden, f"{path.name}: {function.name}"
