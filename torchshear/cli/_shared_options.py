"""Options of the command line that choose what may shrink, and what they turn into."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import torchshear
from torchshear.cli._data import LOSS_NAMES, NamedLoader, load_loss
from torchshear.errors import ArgumentError
from torchshear.pruners import registered_criteria
from torchshear.pruners.selection._request import SCOPES
from torchshear.pruners.selection._scoring import GROUP_REDUCTIONS


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
_GROUP_REDUCTION = typer.Option(
    metavar="WORD", help=f"How scores of a group's members become one: {', '.join(GROUP_REDUCTIONS)}."
)
_NORMALIZE = typer.Option(
    metavar="WORD",
    help="Whether scores are divided by their mean over the group before groups are ranked together: mean, none or "
    "auto (where they mean nothing outside of their group).",
)
_ROLES = typer.Option(metavar="ROLE", help="Role that may shrink, as ffn or heads; once or more. Default: all.")
_EXCLUDE = typer.Option(metavar="PATTERN", help="Modules or parameters that keep their shapes; once or more.")
_WORDS = "; ".join(f"{word}: {what}" for word, what in SCOPES.items())
_SCOPE = typer.Option(
    help=f"Which units are ranked against one another. {_WORDS}. Default: {next(iter(SCOPES))}.",
    metavar="WORD",
)
_MACS = typer.Option(
    metavar="AMOUNT", help="MACs that may be left, in place of a ratio: a share of the dense model's, or a number."
)
_PARAMS = typer.Option(metavar="AMOUNT", help="Parameters that may be left, in place of a ratio; likewise.")
_SIZE = typer.Option(
    metavar="AMOUNT",
    help="Bytes that the ONNX file may have, in place of a ratio: a share of the dense model's file, or a size, as "
    "2.5MB, 800KB or 1MiB.",
)
_LATENCY = typer.Option(
    metavar="AMOUNT",
    help="Time that may be left, in place of a ratio: a share of the dense model's, or milliseconds, as "
    "3.5ms. Measured on this machine, with --runtime, --threads and --batch.",
)
Runtime = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="What runs the models that are measured: onnxruntime, torch (eagerly) or torch.compile."
    ),
]
Provider = Annotated[
    str, typer.Option(metavar="NAME", help="Execution provider of onnxruntime, as CUDAExecutionProvider.")
]
_WORDS_OF_TRUTH: Final = {"true": True, "false": False}


def _check_truth(given: str | None) -> str | None:
    if given is not None and given.lower() not in _WORDS_OF_TRUTH:
        raise typer.BadParameter(f"{given!r} is neither true nor false.")
    return given


_FASTER = typer.Option(
    metavar="[true|false]",
    callback=_check_truth,
    help="Whether to refuse a result that is not measurably faster. Default: true with a target of latency.",
)
_LEAST = typer.Option(metavar="[KEY=]SHARE", callback=_check_ratio, help="Share that each group loses in any case.")
_MOST = typer.Option(metavar="[KEY=]SHARE", callback=_check_ratio, help="Largest share that a group may lose.")
_OUTPUT = typer.Option("--prunable-output", metavar="NAME", help="Output that may shrink; once or more. Default: none.")
_CONFIG = typer.Option(
    metavar="FILE",
    help="Config list of NNI or Neural Compressor, in YAML or JSON, in place of shares, targets and what may shrink. "
    "With a target of latency its shares are the most that may go.",
)
_DATA = typer.Option(
    metavar="PACKAGE.MODULE:LOADER",
    help="Iterable of batches, or a function without arguments that returns one: for criteria that look at data, and "
    "for --compensate. Targets are for the former alone.",
)
_LOSS = typer.Option(
    "--loss",
    metavar="NAME",
    help=f"Loss for criteria that look at gradients: {LOSS_NAMES}, or package.module:function of output and target. "
    "'dense' takes the dense model's own outputs as targets, 'output' the loss that the model itself gives.",
)
_BATCHES = typer.Option(
    metavar="N", help="How many batches to run. Default: the first 32, or all where there are fewer."
)
_FORM = typer.Option(
    metavar="[auto|native|traced]",
    help="The model's own class, where it costs little at most, or the rewritten graphs. Default: auto.",
)
_COMPENSATE = typer.Option(
    metavar="METHOD",
    help="How the shrunk model, once proved, is brought nearer to its original without training: refit (every layer "
    "fitted to give what it gave; some hundred samples do), statistics (new ones of batch norms), means or constants "
    "(what removed channels hold on average, or without input, goes into biases). All but constants need --data. "
    "Default: none.",
)

_MEMORY = typer.Option(
    metavar="BYTES",
    help="Memory that --compensate refit may take for activations; those beyond go to files. Default: 2000000000.",
)

_SUBMODULE = typer.Option(
    "--submodule",
    metavar="NAME",
    help="Module to take inside the model, for models that cannot be captured whole; once or more. Default: the model.",
)

Submodules = Annotated[list[str] | None, _SUBMODULE]
CRITERIA: Final = ", ".join(registered_criteria())


@dataclass(frozen=True, slots=True)
class _Option:
    """An option of the command line, and what its value turns into as a keyword of `torchshear.prune`."""

    annotation: Any
    read: Callable[[Any], Any]


_OPTIONS: Final[Mapping[str, _Option]] = {
    "ratio": _Option(Annotated[list[str] | None, _RATIO], lambda given: parse_ratio(given)),
    "scope": _Option(Annotated[str | None, _SCOPE], str),
    "target_macs": _Option(Annotated[float | None, _MACS], float),
    "target_params": _Option(Annotated[float | None, _PARAMS], float),
    "target_size": _Option(Annotated[str | None, _SIZE], str),
    "target_latency": _Option(Annotated[str | None, _LATENCY], str),
    "must_be_faster": _Option(Annotated[str | None, _FASTER], lambda given: _WORDS_OF_TRUTH[given.lower()]),
    "min_ratio": _Option(Annotated[list[str] | None, _LEAST], lambda given: parse_ratio(given)),
    "max_ratio": _Option(Annotated[list[str] | None, _MOST], lambda given: parse_ratio(given)),
    "group_reduction": _Option(Annotated[str | None, _GROUP_REDUCTION], str),
    "normalize": _Option(Annotated[str | None, _NORMALIZE], str),
    "roles": _Option(Annotated[list[str] | None, _ROLES], list),
    "exclude": _Option(Annotated[list[str] | None, _EXCLUDE], list),
    "prunable_outputs": _Option(Annotated[list[str] | None, _OUTPUT], list),
    "submodules": _Option(Submodules, list),
    "config": _Option(Annotated[Path | None, _CONFIG], Path),
    "data": _Option(Annotated[str | None, _DATA], NamedLoader),
    "loss_fn": _Option(Annotated[str | None, _LOSS], load_loss),
    "batches": _Option(Annotated[int | None, _BATCHES], int),
    "compensate": _Option(Annotated[str | None, _COMPENSATE], str),
    "memory": _Option(Annotated[int | None, _MEMORY], int),
    "form": _Option(Annotated[str | None, _FORM], str),
}
EVERY: Final = tuple(_OPTIONS)
_OTHER_FLAGS: Final = {"loss_fn": "loss", "submodules": "submodule", "prunable_outputs": "prunable-output"}
_WORDS_OF_VERBS: Final = {
    word for verb in (torchshear.prune, torchshear.prune_family) for word in inspect.signature(verb).parameters
}
_NAMES: Final = "|".join(_WORDS_OF_VERBS - {"model", "args", "kwargs"} | {"unknown"})
_PARAMETER: Final = re.compile(rf"(?<![\w.])({_NAMES})=(\['[^\]]*'\])?")


def name_flags(message: str) -> str:
    """Name the flags of the command line in a message of the library, which names its parameters.

    >>> name_flags("give a loss as loss_fn=, and ratio=0.5, or submodules=['one', 'two']")
    'give a loss as --loss, and --ratio 0.5, or --submodule one --submodule two'
    """

    def flag(match: re.Match[str]) -> str:
        name = _OTHER_FLAGS.get(match[1], match[1].replace("_", "-"))
        if match[2]:
            return " ".join(f"--{name} {value}" for value in re.findall(r"'([^']*)'", match[2]))
        is_followed = message[match.end() : match.end() + 1].strip(" .,;:)")
        return f"--{name} " if is_followed else f"--{name}"

    return _PARAMETER.sub(flag, message)


def takes_choice(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options that choose what may shrink, how much goes where, and by which data.

    Args:
        names: which options, of `EVERY`.

    Returns:
        A decorator for a function with the keyword argument `choice`, a dictionary. It gives a function with the
        options in its place, of which `choice` holds those that were given, as keywords of `torchshear.prune`. If it
        has an argument `said`, that holds them as they were written.
    """
    return functools.partial(_with_options, names)


def read_choice(said: Mapping[str, Any]) -> dict[str, Any]:
    """Turn options as they were written into keywords of `torchshear.prune`.

    Raises:
        ArgumentError: one of them cannot be read.
    """
    return {name: _OPTIONS[name].read(value) for name, value in said.items()}


def _with_options(names: tuple[str, ...], command: Callable[..., None]) -> Callable[..., None]:
    own = inspect.signature(command)
    kept = [parameter for name, parameter in own.parameters.items() if name not in ("choice", "said")]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_OPTIONS[name].annotation,
        )
        for name in names
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        asked = {name: given.pop(name) for name in names}
        said = {name: value for name, value in asked.items() if value is not None and value != []}
        command(**given, choice=read_choice(said), **({"said": said} if "said" in own.parameters else {}))

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
