"""The configuration of UniPruning, a pruner of MindSpore Golden Stick."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torchshear.configs._values import Reader, integer, kept_fraction, one_of, read_keys, text
from torchshear.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class UniPruningConfig:
    """Configuration of UniPruning.

    Attributes:
        params_kept: fraction of the counted parameters that is left, in (0, 1].
        run: channels that go together, next to each other in the order of their importance.
        min_width: the fewest channels that a layer keeps; layers that have no more stay whole.
        frequency: epochs between two searches, where the model is trained in between.
        input_size: shape of the example input.
        is_on: whether anything is to be pruned.
        rank: number in the names of files.
        exp_name: name of the folder and of the files that a `UniPruner` writes.
        output_path: folder in which it makes that folder; None to write nothing.
        notes: what was read in another way than its name says, or has no effect.
    """

    params_kept: float
    run: int = 32
    min_width: int = 32
    frequency: int = 9
    input_size: tuple[int, ...] = (16, 3, 224, 224)
    is_on: bool = True
    rank: int = 0
    exp_name: str = "unipruning"
    output_path: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def params_ratio(self) -> float:
        """Fraction of the counted parameters that goes."""
        return 1 - self.params_kept

    def __str__(self) -> str:
        """The settings and notes, a line each."""
        lines = [
            f"parameters  {self.params_kept:.1%} kept, {self.params_ratio:.1%} removed",
            f"run         {self.run} channels at a time",
            f"min_width   {self.min_width}",
            f"frequency   every {self.frequency} epochs",
            f"input_size  {self.input_size}",
            *(() if self.is_on else ("prune_flag  0: nothing is pruned",)),
        ]
        return "\n".join([*lines, *(f"note        {note}" for note in self.notes)])


def _sizes(place: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if not sizes:
        raise ArgumentError(f"{place}={value!r}; expected the shape of an example input, as [16, 3, 224, 224].")
    return tuple(integer(1)(place, size) for size in sizes)


def _zero_or_one(place: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise ArgumentError(f"{place}={value!r}; expected 0 or 1.")
    return bool(value)


def _file_name(place: str, value: Any) -> str:
    name = text(place, value)
    if any(sign in name for sign in "/\\\0") or name.startswith("."):
        raise ArgumentError(f"{place}={name!r}; expected a name of files, without slashes and no dot in front.")
    return name


KEYS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "target_sparsity": kept_fraction,
        "keep_ratio": kept_fraction,
        "frequency": integer(1),
        "pruning_step": integer(1),
        "filter_lower_threshold": integer(1),
        "input_size": _sizes,
        "prune_flag": _zero_or_one,
        "rank": integer(0),
        "device_target": one_of(("Ascend", "GPU", "CPU")),
        "exp_name": _file_name,
        "output_path": text,
    }
)
_OWN_NAMES: Final = {
    "pruning_step": "run",
    "filter_lower_threshold": "min_width",
    "frequency": "frequency",
    "input_size": "input_size",
    "prune_flag": "is_on",
    "rank": "rank",
    "exp_name": "exp_name",
    "output_path": "output_path",
}
_NO_EFFECT: Final = ("device_target",)


def read_unipruning_config(config: Mapping[str, Any]) -> UniPruningConfig:
    """Read a configuration of UniPruning.

    Its target_sparsity says how much is *kept*: size to reach = parameters * target_sparsity. So it is read here, and a
    note says so; `keep_ratio` is a clearer word for the same.

    Args:
        config: target_sparsity or keep_ratio, and any of frequency (9), pruning_step (32), filter_lower_threshold (32),
            input_size ([16, 3, 224, 224]), prune_flag (1), rank (0), exp_name ("unipruning") and output_path, which
            name the files of a `UniPruner`; device_target is read and has no effect. Not changed.

    Returns:
        The settings under names that say what they are.

    Raises:
        ArgumentError: an unknown key, a value of another kind or out of range, no target or two.

    Example:
        >>> read_unipruning_config({"target_sparsity": 0.75, "pruning_step": 16}).params_ratio
        0.25

    Reference: MindSpore Golden Stick, UniPruning.
    """
    keys = read_keys("config", config, KEYS, "a UniPruning config")
    targets = [word for word in ("target_sparsity", "keep_ratio") if word in keys]
    if len(targets) != 1:
        said = " and ".join(targets) or "neither"
        raise ArgumentError(f"config has {said}; expected exactly one of target_sparsity and keep_ratio.")
    kept = keys[targets[0]]
    notes = [f"{word} has no effect here" for word in _NO_EFFECT if word in keys]
    if "target_sparsity" in keys:
        notes.insert(0, f"target_sparsity={kept} keeps {kept:.1%} of the parameters, as UniPruning reads it")
    own = {name: keys[word] for word, name in _OWN_NAMES.items() if word in keys}
    return UniPruningConfig(params_kept=kept, notes=tuple(notes), **own)
