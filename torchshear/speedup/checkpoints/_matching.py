"""Which entry of a plan each tensor of a checkpoint falls under, or why the checkpoint is not of the plan's model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchshear.dependency import PruningPlan, StatePlan
from torchshear.dependency.rules._read_values import differing_value
from torchshear.errors import CheckpointError
from torchshear.storage._checkpoint import Checkpoint, match_names

Unknown = Literal["refuse", "copy", "drop"]


@dataclass(frozen=True, slots=True)
class Fit:
    """What is to be done with a checkpoint.

    Attributes:
        entries: name in the checkpoint -> what is kept of the tensor, None for all of it; others are dropped.
        unknown: names that the plan does not know.
        missing: names of the model that a checkpoint of a part of it does not have.
    """

    entries: Mapping[str, StatePlan | None]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def fit(plan: PruningPlan, checkpoint: Checkpoint, unknown: Unknown) -> Fit:
    """Match a checkpoint with a plan.

    Raises:
        CheckpointError: a tensor has another shape than the plan expects, is unknown and is to be refused, or one that
            the model saves is missing; a buffer has other values than those that the plan rests on.
    """
    known = {**plan.state, **plan.whole, **plan.aliases}
    matching = match_names(checkpoint, known)
    canonical = {given: plan.aliases.get(name, name) for given, name in matching.names.items()}
    for given, name in canonical.items():
        _check_shape(plan, checkpoint, given, name)
    _check_values(plan, checkpoint, canonical)
    strange = tuple(name for name in checkpoint if name not in canonical)
    if strange and unknown == "refuse":
        raise CheckpointError(
            f"the checkpoint in {str(checkpoint.folder)!r} holds {_some(strange)}, which the plan for "
            f'{plan.model_type} does not know. Expected the tensors of its state_dict; say unknown="copy" to keep them '
            f'as they are or unknown="drop" to leave them out, if you know that they do not matter.'
        )
    missing = _missing(plan, set(canonical.values()))
    outside = tuple(name for name in missing if matching.prefix and not name.startswith(matching.prefix))
    if len(outside) < len(missing):
        raise CheckpointError(
            f"the checkpoint in {str(checkpoint.folder)!r} lacks {_some(sorted(set(missing) - set(outside)))}, which "
            f"{plan.model_type} saves. Expected the checkpoint of the model that the plan was made for."
        )
    entries: dict[str, StatePlan | None] = {given: plan.state.get(name) for given, name in canonical.items()}
    if unknown == "copy":
        entries |= dict.fromkeys(strange)
    return Fit(entries, strange, outside)


def _check_shape(plan: PruningPlan, checkpoint: Checkpoint, given: str, name: str) -> None:
    expected = plan.state[name].shape if name in plan.state else plan.whole[name]
    shape = checkpoint.entries[given].shape
    if shape != expected:
        raise CheckpointError(
            f"{given!r} has shape {shape} in the checkpoint in {str(checkpoint.folder)!r}; the plan for "
            f"{plan.model_type} expects {expected}. Give the unpruned checkpoint of the model that the plan is for."
        )


def _check_values(plan: PruningPlan, checkpoint: Checkpoint, canonical: Mapping[str, str]) -> None:
    """Raise unless buffers hold what the plan was made with; `shrink` checks those that no checkpoint holds."""
    found = {name: checkpoint[given] for given, name in canonical.items() if name in plan.values}
    wrong = differing_value({name: plan.values[name] for name in found}, found)
    if wrong is not None:
        raise CheckpointError(
            f"{wrong} in the checkpoint in {str(checkpoint.folder)!r}; the plan for {plan.model_type} was made with "
            f"values of it that say which channels go together. Make the plan of a model that has the buffers of this "
            f"checkpoint, or give a checkpoint that holds those of the plan."
        )


def _missing(plan: PruningPlan, present: set[str]) -> list[str]:
    saved = [name for name, entry in plan.state.items() if entry.is_saved]
    return sorted({*saved, *plan.whole} - present)


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
