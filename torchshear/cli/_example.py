"""Import a user's factory and call it: gives a model with its example inputs."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from torch import nn

from torchshear.errors import ArgumentError

_EXPECTED: Final = "a function without arguments that returns (model, args) or (model, args, kwargs)"

Target = Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help=f"Names {_EXPECTED}.")]


def load_example(target: str) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    """Import a factory, with the current folder importable, and call it: gives model, args and kwargs.

    Args:
        target: "package.module:factory"; the part after the colon may have dots.

    Raises:
        ArgumentError: there is no such factory, it fails, or it returns something else than it should.
    """
    factory = _find_factory(target)
    try:
        made = factory()
    except Exception as error:  # a factory can raise anything
        raise ArgumentError(f"{target} fails: {_failure(error)} Expected {_EXPECTED}.") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        kinds = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else _kind(made)
        raise ArgumentError(f"{target} returned {kinds}. Expected {_EXPECTED}.")
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    for name, value, kind in (("model", model, nn.Module), ("args", args, tuple), ("kwargs", kwargs, Mapping)):
        if not isinstance(value, kind):
            hint = " Write (x,) for a single argument x." if name == "args" else ""
            raise ArgumentError(f"{target} returned {_kind(value)} as its {name}. Expected {_EXPECTED}.{hint}")
    return model, args, kwargs


def _find_factory(target: str) -> Callable[[], Any]:
    module_name, _, path = target.partition(":")
    if not (path and all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")])):
        raise ArgumentError(f"cannot read {target!r}. Expected package.module:factory, as in nets.small:make.")
    found: Any = _imported(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{target}: {module_name!r} has no {part!r}.{hint} Expected {_EXPECTED}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ArgumentError(f"{target} is {_kind(found)}. Expected {_EXPECTED}.")
    return found  # type: ignore[no-any-return]


def _imported(name: str) -> object:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ArgumentError(
                f"no module {error.name!r} in {folder} or among the installed packages. "
                f"Expected package.module:factory; run in the folder that holds the package."
            ) from error
        raise ArgumentError(f"importing {name!r} fails: {_failure(error)}") from error


def _failure(error: Exception) -> str:
    """Exception and innermost line of the source, for a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})."


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"
