"""Settings of one pruner of Neural Compressor for a training: its schedule, its stages and its regularizer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torchshear.configs._entry import Entry
from torchshear.configs._values import Reader, flag, fraction, integer, one_of, refuse, text
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.schedules import Cos, Cube, Exp, Linear, OneShot, Schedule
from torchshear.training._progressive import N_STAGES, block_size, has_stages
from torchshear.training._training_config import LOCK, pattern_of_blocks

_CURVES: Final[Mapping[str, type[Schedule]]] = {"exp": Exp, "cos": Cos, "cube": Cube, "linear": Linear}
_PROGRESSIVE: Final = "_progressive"
_LOCK: Final = "pattern_lock"
_LASSO: Final = "group_lasso"
_COEFFICIENT: Final = "reg_coeff"


def _regularizer(place: str, value: Any) -> str | None:
    return None if value is None else one_of((_LASSO,))(place, value)


def _parameters(place: str, value: Any) -> float:
    """Read the parameters of a regularizer, of which there is one."""
    if not isinstance(value, Mapping) or set(value) - {_COEFFICIENT}:
        raise ArgumentError(f"{place}={value!r}; expected a mapping with {_COEFFICIENT!r} alone.")
    found = value.get(_COEFFICIENT, 0.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < float("inf"):
        raise ArgumentError(f"{place}: {_COEFFICIENT}={found!r}; expected a number of at least 0.")
    return float(found)


_KEYS: Final[dict[str, Reader]] = {
    "start_step": integer(0),
    "end_step": integer(0),
    "pruning_frequency": integer(1),
    "pruning_frequence": integer(1),  # as examples of Neural Compressor have it
    "sparsity_decay_type": one_of(tuple(_CURVES)),
    "initial_sparsity": fraction,
    "start_epoch": integer(0),
    "end_epoch": integer(0),
    "update_frequency": integer(1),
    "reg_type": _regularizer,
    "parameters": _parameters,
    "reg_coeff": refuse("it belongs into parameters={'reg_coeff': ...}, beside reg_type='group_lasso'."),
    "low_memory_usage": flag,
}
_OF_STEPS: Final = ("start_step", "end_step", "pruning_frequency", "pruning_frequence", "sparsity_decay_type")
_OF_EPOCHS: Final = ("start_epoch", "end_epoch", "update_frequency")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Settings of a pruner that concern the training, as they were written.

    Attributes:
        label: where the pruner stands.
        keys: checked values by key.
        is_progressive: whether its blocks go little by little.
        is_locked: whether it keeps the zeros that its layers have.
    """

    label: str
    keys: Mapping[str, Any]
    is_progressive: bool
    is_locked: bool

    def of(self, entry: Entry) -> "PrunerSettings":
        """Return all settings of a pruner.

        Args:
            entry: what the pruner says beside these.

        Raises:
            ArgumentError: the settings contradict each other.
        """
        keys, notes = self.keys, list(entry.notes)
        if "pruning_frequence" in keys:
            notes.append("pruning_frequence is read as pruning_frequency")
        if keys.get("low_memory_usage"):
            notes.append("low_memory_usage has no effect: scores are kept in float32")
        schedule = self._by_epochs() if any(key in keys for key in _OF_EPOCHS) else self._by_steps(entry, notes)
        if self.is_locked:
            if schedule.n_steps:
                raise ArgumentError(f"{self.label}: pattern_lock locks once; expected start_step to be end_step.")
            entry = replace(entry, pattern=LOCK, criterion="l1")
        stage = self._stage(entry, schedule, notes) if self.is_progressive else 0
        coefficient = self._coefficient(entry, notes)
        return PrunerSettings(
            entry=replace(entry, notes=tuple(notes)), schedule=schedule, stage=stage, coefficient=coefficient
        )

    def _by_epochs(self) -> Schedule:
        """The schedule of version 1: at epoch e the share floor((e - start + 1) / f) f / (end - start + 1) has gone."""
        keys = self.keys
        mixed = [key for key in _OF_STEPS if key in keys]
        if mixed or "start_epoch" not in keys or "end_epoch" not in keys:
            what = f"{mixed[0]} counts steps" if mixed else "one of start_epoch and end_epoch is missing"
            raise ArgumentError(
                f"{self.label}: {what}; expected start_epoch and end_epoch, or start_step and end_step."
            )
        start, end = keys["start_epoch"], keys["end_epoch"]
        if start > end:
            raise ArgumentError(f"{self.label}: start_epoch={start} is behind end_epoch={end}; expected it not to be.")
        if self.is_progressive:
            raise ArgumentError(
                f"{self.label}: blocks go little by little between steps; give start_step and end_step."
            )
        initial = keys.get("initial_sparsity", 0.0)
        return Linear(start=start - 1, end=end, frequency=keys.get("update_frequency", 1), initial=initial, by="epoch")

    def _by_steps(self, entry: Entry, notes: list[str]) -> Schedule:
        keys, start, end = self.keys, self.keys.get("start_step", 0), self.keys.get("end_step", 0)
        if start > end:
            raise ArgumentError(f"{self.label}: start_step={start} is behind end_step={end}; expected it not to be.")
        is_by_gradients = bool(needs_of(entry.criterion or "l1")) and not self.is_locked
        if is_by_gradients and not end:
            if "start_step" in keys or "end_step" in keys:
                raise ArgumentError(
                    f"{self.label}: start_step=0 and end_step=0 with {entry.criterion}, which is made of gradients, of "
                    f"which there are none before the first step; expected an end_step of at least 1."
                )
            start = end = 1
            notes.append("no steps are given, and its criterion is made of gradients: all goes at step 1")
        if start == end:
            if keys.get("initial_sparsity"):
                raise ArgumentError(
                    f"{self.label}: initial_sparsity with start_step=end_step; expected a later end_step."
                )
            return OneShot(at=start)
        frequency = keys.get("pruning_frequency", keys.get("pruning_frequence", 1))
        curve, initial = _CURVES[keys.get("sparsity_decay_type", "exp")], keys.get("initial_sparsity", 0.0)
        return curve(start=start, end=end, frequency=frequency, initial=initial)

    def _stage(self, entry: Entry, schedule: Schedule, notes: list[str]) -> int:
        """Positions from one stage to the next; 0 where there is no room for stages, as in Neural Compressor."""
        if block_size(pattern_of_blocks(entry)) < N_STAGES:
            raise ArgumentError(
                f"{self.label}: progressive pruning lets blocks go little by little, and the pattern has none of at "
                f"least {N_STAGES} weights; expected NxM, as '4x1', channelx1 or 1xchannel."
            )
        if has_stages(schedule):
            return schedule.frequency // N_STAGES
        notes.append(f"blocks go at once: between events of {schedule!r} there is no room for {N_STAGES} stages")
        return 0

    def _coefficient(self, entry: Entry, notes: list[str]) -> float:
        """The coefficient of the group lasso; 0 without one."""
        coefficient = float(self.keys.get("parameters", 0.0))
        if self.keys.get("reg_type") is None:
            if coefficient:
                notes.append("parameters have no effect without a reg_type")
            return 0.0
        if ":" in entry.pattern or entry.pattern in ("heads", LOCK):
            raise ArgumentError(
                f"{self.label}: reg_type='group_lasso' presses blocks, and the pattern has none; expected NxM, "
                f"channelx1 or 1xchannel."
            )
        if not coefficient:
            notes.append("group_lasso has no effect: its reg_coeff is 0, or not in parameters")
        return coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunerSettings:
    """Settings of a pruner.

    Attributes:
        entry: which layers lose how much, in what units, by what criterion.
        schedule: when.
        stage: steps from one stage to the next, if blocks go little by little; else 0.
        coefficient: of the group lasso; 0 without one.
    """

    entry: Entry
    schedule: Schedule
    stage: int
    coefficient: float

    def __str__(self) -> str:
        entry = self.entry
        if entry.pattern == LOCK:
            return f"zeros are kept from step {self.schedule.start} on"
        return f"{entry.ratio:g} of {entry.pattern} by {entry.criterion}, {self.schedule!r}"


def read_settings(label: str, said: Mapping[str, Any]) -> tuple[TrainingSettings, dict[str, Any]]:
    """Take what concerns the training out of what a pruner says.

    Args:
        label: where the pruner stands.
        said: its keys, the common ones included.

    Returns:
        The settings, and the other keys.

    Raises:
        ArgumentError: a value is of another kind or out of range.
    """
    keys = {key: _KEYS[key](f"{label}: {key}", value) for key, value in said.items() if key in _KEYS}
    others = {key: value for key, value in said.items() if key not in _KEYS}
    word = others.get("pruning_type")
    is_progressive, is_locked = False, word == _LOCK
    if isinstance(word, str) and word.endswith(_PROGRESSIVE):
        is_progressive = True
        others["pruning_type"] = text(f"{label}: pruning_type", word).removesuffix(_PROGRESSIVE)
    if is_locked:
        del others["pruning_type"]
    settings = TrainingSettings(label=label, keys=keys, is_progressive=is_progressive, is_locked=is_locked)
    return settings, others
