"""Faults for tests of compensation."""

import pytest

from torchshear.speedup.compensation._fold_search import FoldSearch


def spoil_folds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a search fold a little too much into one tensor."""
    run = FoldSearch.run

    def wrong(search: FoldSearch, inputs: list[list[object]]) -> object:
        decisions = run(search, inputs)
        decisions.changes[name] = decisions.changes[name] * 1.0001
        return decisions

    monkeypatch.setattr(FoldSearch, "run", wrong)
