"""Scores of the trials of a search as a picture."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Final

from torchshear.errors import ArgumentError
from torchshear.searching._trial import SearchTrial
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path

_WITHIN: Final = "#1f4e79"
_BEYOND: Final = "#9db4cc"
_INK: Final = "#333333"
_SUFFIXES: Final = (".png", ".svg", ".pdf")


def draw_trials(title: str, trials: Sequence[SearchTrial], path: str | os.PathLike[str]) -> None:
    """Draw scores over the number of the trial; `SearchResult.draw` says how.

    Raises:
        ArgumentError: matplotlib is not installed, or `path` is no path or ends otherwise than it may.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    path = as_path(path, "the path of a picture")
    if path.suffix.lower() not in _SUFFIXES:
        raise ArgumentError(f"cannot draw into {str(path)!r}; expected a name that ends in {', '.join(_SUFFIXES)}.")
    figure = _figure(title, [one for one in trials if one.state == "complete"])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160)


def has_matplotlib() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(title: str, trials: Sequence[SearchTrial]) -> Any:
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ArgumentError(
            f"drawing needs matplotlib, which cannot be imported ({error}). Install torchshear[demo]."
        ) from error
    figure = figures.Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for is_within, color, label in ((False, _BEYOND, "above the budget"), (True, _WITHIN, "within the budget")):
        here = [one for one in trials if one.is_within == is_within]
        if here:
            axes.scatter([one.number for one in here], [one.score for one in here], s=14, color=color, label=label)
    best, line = None, []
    for one in trials:
        if one.is_within and one.score is not None and (best is None or one.score > best):
            best = one.score
        if best is not None:
            line.append((one.number, best))
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=_WITHIN, lw=1.2, label="best so far")
    axes.set_xlabel("trial", fontsize=9, color=_INK)
    axes.set_ylabel("score, higher is better", fontsize=9, color=_INK)
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
