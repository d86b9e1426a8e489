"""Matching the tensors of a checkpoint with the entries of a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._tensor_plans import StatePlan
from torchshear.dependency.rules._read_values import differing_value
from torchshear.errors import CheckpointError
from torchshear.storage._checkpoint import Checkpoint, match_names

UnknownTensors = Literal["refuse", "copy", "drop"]


@dataclass(frozen=True, slots=True)
class CheckpointMatch:
    """Tensors of a checkpoint with what a plan keeps of them.

    Attributes:
        entries: name in the checkpoint -> what is kept of the tensor, None for all of it; others are dropped.
        unknown: names in the checkpoint that the plan does not know.
        missing: names of the model that the checkpoint, which is of a part of it, does not have.
    """

    entries: Mapping[str, StatePlan | None]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def match_checkpoint(plan: PruningPlan, checkpoint: Checkpoint, unknown: UnknownTensors) -> CheckpointMatch:
    """Match a checkpoint with a plan.

    Raises:
        CheckpointError: a tensor has another shape than the plan expects, is unknown and is to be refused, or one that
            the model saves is missing; a buffer has other values than those that the plan depends on.
    """
    place = f"the checkpoint in {str(checkpoint.folder)!r}"
    matching = match_names(checkpoint, {**plan.state, **plan.whole, **plan.aliases})
    canonical = {given: plan.aliases.get(name, name) for given, name in matching.names.items()}
    for given, name in canonical.items():
        expected = plan.state[name].shape if name in plan.state else plan.whole[name]
        shape = checkpoint.entries[given].shape
        if shape != expected:
            raise CheckpointError(
                f"{given!r} has shape {shape} in {place}; the plan for {plan.model_type} expects {expected}. Give the "
                f"unpruned checkpoint of the model that the plan is for."
            )
    # Buffers must hold what the plan was made with; `shrink` checks those that no checkpoint holds.
    found = {name: checkpoint[given] for given, name in canonical.items() if name in plan.values}
    wrong = differing_value({name: plan.values[name] for name in found}, found)
    if wrong is not None:
        raise CheckpointError(
            f"{wrong} in {place}; the plan for {plan.model_type} was made with other values, which decide what "
            f"channels go together. Make the plan of a model that has the buffers of this checkpoint, or give a "
            f"checkpoint that holds those of the plan."
        )
    strange = tuple(name for name in checkpoint if name not in canonical)
    if strange and unknown == "refuse":
        raise CheckpointError(
            f"{place} holds {_list_some(strange)}, which the plan for {plan.model_type} does not know. Expected the "
            f'tensors of its state_dict; unknown="copy" keeps them as they are, unknown="drop" leaves them out.'
        )
    saved = [name for name, entry in plan.state.items() if entry.is_saved]
    missing = sorted({*saved, *plan.whole} - set(canonical.values()))
    outside = tuple(name for name in missing if matching.prefix and not name.startswith(matching.prefix))
    if len(outside) < len(missing):
        raise CheckpointError(
            f"{place} lacks {_list_some(sorted(set(missing) - set(outside)))}, which {plan.model_type} saves. Expected "
            f"the checkpoint of the model that the plan was made for."
        )
    entries: dict[str, StatePlan | None] = {given: plan.state.get(name) for given, name in canonical.items()}
    if unknown == "copy":
        entries |= dict.fromkeys(strange)
    return CheckpointMatch(entries, strange, outside)


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
