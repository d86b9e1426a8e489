"""How the code reads: docstrings open with a verb or a noun, and public names are those of the reference page."""

import ast
import re
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
