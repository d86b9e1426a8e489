"""Options of the command line that choose what may shrink, and what they turn into."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from torchshear.api import Choice
from torchshear.errors import ArgumentError
from torchshear.pruners import SCOPES


def _check_ratio(given: list[str] | None) -> list[str] | None:
    """Refuse what cannot be read as the command line refuses any such value."""
    try:
        parse_ratio(given or [])
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from error
    return given


_RATIO = typer.Option(
    metavar="[KEY=]SHARE",
    callback=_check_ratio,
    help="Share of each group's channels to remove, in [0, 1); or KEY=SHARE, once or more, where KEY is a role, a "
    "pattern of module or parameter names, a group, or * for all others. Default: 0.5, or what a target asks.",
)
_AXES = typer.Option(metavar="ROLE", help="Role that may shrink, as ffn or heads; once or more. Default: all.")
_EXCLUDE = typer.Option(metavar="PATTERN", help="Modules or parameters that keep their shapes; once or more.")
_SCOPE = typer.Option(
    help=f"Which units are ranked against one another: {'; '.join(f'{word}: {what}' for word, what in SCOPES.items())}."
)
_MACS = typer.Option(
    metavar="AMOUNT", help="MACs that may be left, in place of a ratio: a share of the dense model's, or a number."
)
_PARAMS = typer.Option(metavar="AMOUNT", help="Parameters that may be left, in place of a ratio; likewise.")
_LEAST = typer.Option(metavar="[KEY=]SHARE", callback=_check_ratio, help="Share that each group loses in any case.")
_MOST = typer.Option(metavar="[KEY=]SHARE", callback=_check_ratio, help="Largest share that a group may lose.")
_OUTPUT = typer.Option("--prunable-output", metavar="NAME", help="Output that may shrink; once or more. Default: none.")

_SUBMODULE = typer.Option(
    "--submodule",
    metavar="NAME",
    help="Module to take inside the model, for models that cannot be captured whole; once or more. Default: the model.",
)

Submodules = Annotated[list[str] | None, _SUBMODULE]

_OPTIONS: Final[dict[str, Any]] = {
    "ratio": Annotated[list[str] | None, _RATIO],
    "scope": Annotated[str, _SCOPE],
    "target_macs": Annotated[float | None, _MACS],
    "target_params": Annotated[float | None, _PARAMS],
    "min_ratio": Annotated[list[str] | None, _LEAST],
    "max_ratio": Annotated[list[str] | None, _MOST],
    "axes": Annotated[list[str] | None, _AXES],
    "exclude": Annotated[list[str] | None, _EXCLUDE],
    "prunable_outputs": Annotated[list[str] | None, _OUTPUT],
    "submodules": Submodules,
}


def takes_choice(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that choose what may shrink.

    Args:
        command: a function with the keyword arguments `ratio`, a number, a mapping or None, and `choice`, a `Choice`.

    Returns:
        A function with the options in place of these two.
    """
    own = inspect.signature(command)
    kept = [parameter for name, parameter in own.parameters.items() if name not in ("ratio", "choice")]
    defaults = dict.fromkeys(_OPTIONS) | {"scope": "local"}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        ratio = parse_ratio(given.pop("ratio") or [])
        choice: Choice = {
            "scope": given.pop("scope"),
            "target_macs": given.pop("target_macs"),
            "target_params": given.pop("target_params"),
            "min_ratio": parse_ratio(given.pop("min_ratio") or []) or 0.0,
            "max_ratio": parse_ratio(given.pop("max_ratio") or []),
            "axes": given.pop("axes") or None,
            "exclude": given.pop("exclude") or (),
            "prunable_outputs": given.pop("prunable_outputs") or (),
            "submodules": given.pop("submodules") or None,
        }
        command(**given, ratio=ratio, choice=choice)

    with_options.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *added]}
    return with_options


def parse_ratio(given: list[str]) -> float | dict[str, float] | None:
    """Turn values of the option into a number, or into a mapping if they have keys; None if there are none.

    Raises:
        ArgumentError: a share is no number, a key is given twice, or shares with and without keys are mixed.
    """
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    ratios: dict[str, float] = {}
    for text in given:
        key, equals, share = text.rpartition("=")
        if not equals or not key:
            raise ArgumentError(f"{text!r} among several; expected KEY=SHARE, with * as KEY for all others.")
        if key in ratios:
            raise ArgumentError(f"two shares for {key!r}: {ratios[key]} and {share}. Give one.")
        ratios[key] = _number(share)
    return ratios


def _number(share: str) -> float:
    try:
        return float(share)
    except ValueError as error:
        raise ArgumentError(f"{share!r} is no number. Expected SHARE or KEY=SHARE, as in ffn=0.5.") from error


def parse_align(text: str) -> int | str | None:
    """Turn the option for aligned widths into what `torchshear.prune` takes."""
    number = re.fullmatch(r"-?[0-9]+", text)
    return None if text == "none" else int(text) if number else text
