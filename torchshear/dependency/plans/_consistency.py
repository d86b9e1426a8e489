"""Check that a plan does not contradict itself: its tensors must follow from its groups."""

import numpy as np

from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._state_plan import Indices, StatePlan, make_state_plan
from torchshear.errors import PlanError


def check_consistency(plan: PruningPlan, groups: ChannelGroups) -> None:
    """Check that the kept positions of every parameter and buffer follow from the kept units of the groups.

    Args:
        plan: the plan.
        groups: the analysed network that it is for.

    Raises:
        PlanError: they do not, or a group or a constraint does not fit the network.
    """
    cut = Cut(groups, plan.kept)
    for name, entry in groups.graph.state.items():
        if entry.kind == "constant":
            continue
        follows = make_state_plan(cut, name)
        if not _are_equal(plan.state.get(name), follows):
            said = plan.state[name].new_shape if name in plan.state else entry.shape
            shape = entry.shape if follows is None else follows.new_shape
            raise PlanError(
                f"the plan contradicts itself: by its groups {name!r} becomes {shape}, and by its own entry {said}, or "
                f"other positions of it stay. A plan that was edited cannot be used: say what to keep with "
                f"torchshear.pruners.plan_from_kept."
            )
    unknown = sorted(plan.state.keys() - groups.graph.state.keys())
    if unknown:
        raise PlanError(f"the plan shrinks {unknown[0]!r}, which the network does not have; make a new plan for it.")


def _are_equal(left: StatePlan | None, right: StatePlan | None) -> bool:
    if left is None or right is None:
        return left is right
    lists: list[dict[int | str, Indices]] = []
    for entry in (left, right):
        lists.append({dim: kept for dim, kept in entry.kept.items()})  # noqa: C416 - a wider key
        if entry.numbers is not None:
            lists[-1][f"numbers of {entry.numbers.size}"] = entry.numbers.kept
    return (
        (left.shape, dict(left.blocks), left.is_saved) == (right.shape, dict(right.blocks), right.is_saved)
        and lists[0].keys() == lists[1].keys()
        and all(np.array_equal(kept, lists[1][key]) for key, kept in lists[0].items())
    )
