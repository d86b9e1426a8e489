"""Pictures: a figure of matplotlib to draw on, and its file."""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from torchshear.errors import ArgumentError
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path

_SUFFIXES: Final = (".png", ".svg", ".pdf")


def has_matplotlib() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def picture_path(path: str | os.PathLike[str]) -> Path:
    """Check the name of a picture before it is drawn.

    Raises:
        ArgumentError: it is no path, or ends otherwise than in .png, .svg or .pdf.
    """
    path = as_path(path, "the path of a picture")
    if path.suffix.lower() not in _SUFFIXES:
        raise ArgumentError(f"cannot draw into {str(path)!r}; expected a name that ends in {', '.join(_SUFFIXES)}.")
    return path


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure that belongs to no window.

    Args:
        width: inches.
        height: inches.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ArgumentError(
            f"drawing needs matplotlib, which cannot be imported ({error}). Install torchshear[demo]."
        ) from error
    return figures.Figure(figsize=(width, height), layout="constrained")


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure, of the kind that the name of the file ends in.

    Raises:
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160)
