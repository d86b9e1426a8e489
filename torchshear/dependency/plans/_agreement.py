"""Whether what a plan says of single tensors is what follows from its groups, by the network that it is for."""

import numpy as np

from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._state_plan import Indices, StatePlan, make_state_plan
from torchshear.errors import PlanError


def check_agreement(plan: PruningPlan, groups: ChannelGroups) -> None:
    """See that the kept positions of every parameter and buffer follow from the kept units of the groups.

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
    (sizes, lists), (other_sizes, other_lists) = _content(left), _content(right)
    return sizes == other_sizes and all(np.array_equal(lists[key], other_lists[key]) for key in lists)


def _content(entry: StatePlan) -> tuple[tuple[object, ...], dict[int | str, Indices]]:
    """All of an entry: what compares by itself, and index lists."""
    lists: dict[int | str, Indices] = {dim: kept for dim, kept in entry.kept.items()}  # noqa: C416 - a wider key
    if entry.numbers is not None:
        lists[f"numbers of {entry.numbers.size}"] = entry.numbers.kept
    return (entry.shape, dict(entry.blocks), entry.is_saved, lists.keys()), lists
