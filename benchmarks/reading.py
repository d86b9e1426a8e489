"""Count the functions that one `torchshear.prune` of a three-layer network runs through, and how the code reads.

    python benchmarks/reading.py

A reader follows each of these functions once; fewer and longer ones read faster than many short ones.
"""

import ast
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import torchshear

ROOT = Path(torchshear.__file__).parent
QUESTION_WORDS = ("What", "Which", "Whether", "Where", "How", "That", "Who", "If")


def functions_run() -> set[tuple[str, str, int]]:
    """Return (file, name, line) of every function of the package that a small `prune` calls."""
    seen: set[tuple[str, str, int]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            seen.add((code.co_filename, code.co_qualname, code.co_firstlineno))

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    sys.setprofile(note)
    try:
        torchshear.prune(model, torch.randn(2, 4), ratio=0.5)
    finally:
        sys.setprofile(None)
    return seen


def called_once() -> tuple[int, int]:
    """Return how many private functions of a module there are, and how many of them are named once besides."""
    n_private = n_once = 0
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        private = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("_")]
        named = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        n_private += len(private)
        n_once += sum(named[name] == 1 for name in private)
    return n_private, n_once


def question_docstrings() -> list[str]:
    """List docstrings that open with a question word, as file:line."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if text.split(" ")[0].rstrip(",:") in QUESTION_WORDS:
                    found.append(f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}")
    return found


def main() -> None:
    """Print the counts."""
    run = functions_run()
    n_private, n_once = called_once()
    n_functions = sum(
        isinstance(node, ast.FunctionDef)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    print(f"one prune runs through   {len(run)} functions in {len({file for file, _, _ in run})} files")
    print(f"functions in all         {n_functions}")
    print(f"private, called once     {n_once} of {n_private}")
    print(f"docstrings that ask      {len(question_docstrings())}")
    by_part = Counter("/".join(Path(file).relative_to(ROOT).parts[:-1]) or "(top)" for file, _, _ in run)
    for part, count in by_part.most_common():
        print(f"  {part:28} {count}")


if __name__ == "__main__":
    main()
