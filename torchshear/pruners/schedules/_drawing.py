"""Lines over the steps of a training as a picture."""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torchshear.errors import ArgumentError
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path

_INK: Final = "#333333"
_FAINT: Final = "#777777"
_COLORS: Final = ("#1f4e79", "#b4552d", "#3a7d44", "#7a5195", "#8a6d3b", "#5b8a9a")
_SUFFIXES: Final = (".png", ".svg", ".pdf")
_MOST_NAMED: Final = 8  # lines with a name in the legend


@dataclass(frozen=True, slots=True)
class Line:
    """A line in a picture.

    Attributes:
        name: what it is called in the legend.
        positions: where on the horizontal axis.
        values: how high.
        is_step: whether a value holds up to the next position.
    """

    name: str
    positions: Sequence[float]
    values: Sequence[float]
    is_step: bool = False


def draw_lines(title: str, along: str, panels: Mapping[str, Sequence[Line]], path: str | os.PathLike[str]) -> None:
    """Draw panels of lines one below the other.

    Args:
        title: what stands above.
        along: what the horizontal axis counts.
        panels: what the vertical axis is -> its lines.
        path: the file to write, .png, .svg or .pdf.

    Raises:
        ArgumentError: matplotlib is not installed, or `path` is no path or ends otherwise than it may.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    path = as_path(path, "the path of a picture")
    if path.suffix.lower() not in _SUFFIXES:
        raise ArgumentError(f"cannot draw into {str(path)!r}; expected a name that ends in {', '.join(_SUFFIXES)}.")
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ArgumentError(
            f"drawing needs matplotlib, which cannot be imported ({error}). Install torchshear[demo]."
        ) from error
    figure = figures.Figure(figsize=(7.0, 0.9 + 2.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        _draw(ax, label, lines)
    axes[-1].set_xlabel(along, fontsize=9, color=_INK)
    figure.suptitle(title, fontsize=10, color=_INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160)


def _draw(panel: Any, label: str, lines: Sequence[Line]) -> None:
    for number, line in enumerate(lines):
        style = {"drawstyle": "steps-post"} if line.is_step else {}
        name = line.name if number < _MOST_NAMED else None
        panel.plot(line.positions, line.values, color=_COLORS[number % len(_COLORS)], lw=1.2, label=name, **style)
    panel.set_ylabel(label, fontsize=9, color=_INK)
    panel.tick_params(labelsize=8, colors=_FAINT)
    panel.grid(color="#e6e6e6", lw=0.6)
    panel.set_axisbelow(True)
    if len(lines) > 1:
        panel.legend(frameon=False, fontsize=7, loc="best")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
