"""Import what a user names: a factory of a model with its example inputs, or any other object."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from torch import Tensor, nn

from torchshear.errors import ArgumentError

_EXPECTED: Final = "a function without arguments that returns (model, args) or (model, args, kwargs)"
_EVALUATED: Final = (
    "a function without arguments that returns (model, args, evaluate) or (model, args, kwargs, evaluate), where "
    "evaluate(model) gives a number, the higher the better"
)

Target = Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help=f"Names {_EXPECTED}.")]
EvaluatedTarget = Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help=f"Names {_EVALUATED}.")]
Example = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]


def load_example(target: str) -> Example:
    """Import a factory, with the current folder importable, and call it: gives model, args and kwargs.

    Args:
        target: "package.module:factory"; the part after the colon may have dots.

    Raises:
        ArgumentError: there is no such factory, it fails, or it returns something else than it should.
    """
    made = _call_factory(target, _EXPECTED, (2, 3))
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    return _check_example(target, _EXPECTED, model, args, kwargs)


def load_evaluated(target: str) -> tuple[Example, Callable[[nn.Module], float]]:
    """Import a factory that gives an evaluation function, too, and call it: gives the example, and that function.

    Args:
        target: "package.module:factory"; the part after the colon may have dots.

    Raises:
        ArgumentError: there is no such factory, it fails, or it returns something else than it should.
    """
    *made, evaluate = _call_factory(target, _EVALUATED, (3, 4))
    if not callable(evaluate) or isinstance(evaluate, nn.Module):
        raise ArgumentError(f"{target} returned {kind_of(evaluate)} as its evaluate, the last. Expected {_EVALUATED}.")
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    return _check_example(target, _EVALUATED, model, args, kwargs), evaluate


def _call_factory(target: str, expected: str, lengths: tuple[int, int]) -> tuple[Any, ...]:
    """Call a factory, which returns a tuple of one of some lengths."""
    factory = find_object(target, "factory", expected)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(f"{target} is {kind_of(factory)}. Expected {expected}.")
    made = call(target, factory, expected)
    if not isinstance(made, tuple) or len(made) not in lengths:
        kinds = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else kind_of(made)
        raise ArgumentError(f"{target} returned {kinds}. Expected {expected}.")
    return made


def _check_example(target: str, expected: str, model: Any, args: Any, kwargs: Any) -> Example:
    args = (args,) if isinstance(args, Tensor) else args
    for name, value, kind in (("model", model, nn.Module), ("args", args, tuple), ("kwargs", kwargs, Mapping)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{target} returned {kind_of(value)} as its {name}. Expected {expected}.")
    return model, args, kwargs


def call(target: str, function: Callable[[], Any], expected: str) -> Any:
    """Call what a user named.

    Raises:
        ArgumentError: it fails.
    """
    try:
        return function()
    except Exception as error:  # it can raise anything
        raise ArgumentError(f"{target} fails: {failure_of(error)} Expected {expected}.") from error


def find_object(target: str, kind: str, expected: str) -> Any:
    """Import what a user names as "package.module:name", with the current folder importable.

    Args:
        target: the name; the part after the colon may have dots.
        kind: what it is, in a word.
        expected: what is expected there, for messages.

    Raises:
        ArgumentError: the name cannot be read, importing the module fails, or it has nothing of that name.
    """
    module_name, _, path = target.partition(":")
    if not (path and all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")])):
        raise ArgumentError(f"cannot read {target!r}. Expected package.module:{kind}, as in nets.small:make.")
    found: Any = _import_name(module_name, kind)
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{target}: {module_name!r} has no {part!r}.{hint} Expected {expected}.")
        found = getattr(found, part)
    return found


def _import_name(name: str, kind: str) -> object:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ArgumentError(
                f"no module {error.name!r} in {folder} or among the installed packages. "
                f"Expected package.module:{kind}; run in the folder that holds the package."
            ) from error
        raise ArgumentError(f"importing {name!r} fails: {failure_of(error)}") from error


def failure_of(error: Exception) -> str:
    """Exception and innermost line of the source, for a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})."


def kind_of(value: object) -> str:
    """Describe the type of an object for a message."""
    return f"an object of type {type(value).__name__}"
