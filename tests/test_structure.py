"""The layout of the package: imports run one way, files stay readable, the library prints nothing."""

import ast
from pathlib import Path

import networkx as nx
import pytest

import torchshear

ROOT = Path(torchshear.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


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


# A layer imports itself and those above it in this list; parts on one line do not know each other.
LAYERS = (
    ("errors",),
    ("storage", "_arguments", "_tables", "_other_tools"),
    ("_pictures", "_evaluation"),
    ("graph",),
    ("dependency",),
    ("calibration",),
    ("pruners", "speedup"),
    ("configs",),
    ("options", "report"),
    ("compensation", "distillation", "latency_target"),
    ("_making",),
    ("_file_size",),
    ("api",),
    ("searching", "training"),
    ("compat", "integrations", "comparison", "inspection", "family"),
    ("cli",),
)
INNER_LAYERS = {
    "torchshear.dependency": (("algebra",), ("rules",), ("groups",), ("plans",)),
    "torchshear.graph": (("model",), ("numerics", "masked"), ("capture",)),
    "torchshear.pruners": (("criteria", "masks", "allocation", "schedules"), ("selection", "regularizers")),
    "torchshear.searching": (("methods",),),
    "torchshear.speedup": (
        ("rewriting",),
        ("_relative_error", "checkpoints"),
        ("_random_values",),
        ("native",),
        ("shrinking", "onnx"),
        ("latency",),
        ("verification",),
        ("compensation",),
    ),
}


def place(module: str, package: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    """The layer of a module within a package; None of one that is in no layer, as the package itself."""
    part = module.removeprefix(f"{package}.").split(".")[0]
    return next((number for number, names in enumerate(layers) if part in names), None)


def test_every_part_has_a_layer() -> None:
    files = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts = files - {"__init__", "__pycache__"}
    assert parts == {name for names in LAYERS for name in names}
    for package, layers in INNER_LAYERS.items():
        folder = ROOT.parent / package.replace(".", "/")
        folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
        layered = {name for names in layers for name in names}
        assert folders == {name for name in layered if not name.startswith("_")}
        assert all((folder / f"{name}.py").is_file() for name in layered - folders)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    own = module_of(path)
    for package, layers in {"torchshear": LAYERS, **INNER_LAYERS}.items():
        here = place(own, package, layers)
        if not own.startswith(f"{package}.") or here is None:
            continue
        for other in imports_of(path):
            there = place(other, package, layers) if other.startswith(f"{package}.") else None
            is_inner = own.removeprefix(f"{package}.").split(".")[0] == other.removeprefix(f"{package}.").split(".")[0]
            assert there is None or is_inner or there < here, f"{own} imports {other}"


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


def test_no_test_imports_another_test_or_private_names() -> None:
    """What several test files use has a file of its own, whose private parts only its folder reads."""
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        own = ".".join(path.relative_to(folder.parent).parent.parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "tests":
                continue
            for alias in node.names:
                parts = f"{node.module}.{alias.name}".split(".")
                assert not any(part.startswith("test_") for part in parts), f"{path.name} imports {'.'.join(parts)}"
                is_private = any(part.startswith("_") for part in parts)
                assert not is_private or node.module.startswith(own), f"{path.name} imports {'.'.join(parts)}"
