"""How the code reads: docstrings open with a verb or a noun, and public names are those of the reference page."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import torchshear

ROOT = Path(torchshear.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
QUESTION_WORDS = {"What", "Which", "Whether", "Where", "How", "That", "Who", "Whose", "When", "Why", "If"}


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Return name and docstring of a file's module, classes and functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                found.append((getattr(node, "name", "module"), text))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    asking = [name for name, text in docstrings(path) if text.split()[0].rstrip(",:;.") in QUESTION_WORDS]
    assert not asking, f"{path.name}: {', '.join(asking)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banner_comments(path: Path) -> None:
    assert not [line for line in path.read_text().splitlines() if re.search(r"#.*[-=*#]{6,}\s*$", line)]


REFERENCE = ROOT.parent / "docs" / "reference.md"


def reference() -> dict[str, list[str]]:
    """Return package -> names, as the reference page lists them."""
    pages = re.split(r"^## `([\w.]+)`$", REFERENCE.read_text(), flags=re.M)[1:]
    return {name: re.findall(r"^\| `(\w+)` \|", text, re.M) for name, text in zip(pages[::2], pages[1::2], strict=True)}


def names_of(package: str) -> list[str]:
    """Return the public names; of modules of integrations, whose libraries may be missing, as they are written."""
    if not package.startswith("torchshear.integrations."):
        return import_module(package).__all__
    text = (ROOT.parent / f"{package.replace('.', '/')}.py").read_text()
    return ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S).group(1))


def test_the_reference_page_lists_the_public_names() -> None:
    found = reference()
    for package, names in found.items():
        assert sorted(names) == sorted(names_of(package)), package
    public = {path.parent for path in ROOT.rglob("__init__.py") if "__all__" in path.read_text()}
    inner = {ROOT / "cli", ROOT / "dependency" / "rules", ROOT / "pruners" / "criteria"}
    listed = {ROOT.parent / name.replace(".", "/") for name in found}
    assert public - inner == {path for path in listed if path.is_dir()}


def test_every_public_name_has_one_path() -> None:
    places: dict[str, list[str]] = {}
    for package, names in reference().items():
        for name in names:
            places.setdefault(name, []).append(package)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    trainers = ["torchshear.integrations.lightning", "torchshear.integrations.transformers"]
    assert twice == {"TorchshearError": ["torchshear", "torchshear.errors"], "PruningCallback": trainers}


@pytest.mark.parametrize("package", [name for name in reference() if "integrations" not in name])
def test_public_functions_say_what_they_take_give_and_raise(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        one = getattr(module, name)
        if not inspect.isfunction(one):
            continue
        text = inspect.getdoc(one) or ""
        assert not inspect.signature(one).parameters or "Args:" in text, name
        gives = inspect.signature(one).return_annotation
        is_clear = gives in (None, "None") or text.startswith(("Return ", "Register ")) or "Iterator" in str(gives)
        assert is_clear or "Returns:" in text, name


def test_the_twelve_verbs_have_examples() -> None:
    verbs = [name for name in torchshear.__all__ if inspect.isfunction(getattr(torchshear, name))]
    without = [name for name in verbs if ">>> " not in (inspect.getdoc(getattr(torchshear, name)) or "")]
    assert not without
