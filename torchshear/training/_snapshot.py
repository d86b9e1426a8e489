"""Snapshots of a session, between its hooks."""

from torch import nn

from torchshear.configs import ResolvedConfig
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError
from torchshear.training._config_goal import ConfigGoal
from torchshear.training._session import PruningSession


def plan_now(session: PruningSession) -> PruningPlan:
    """Plan the removal of the channels that are gone by now.

    Raises:
        ArgumentError: single weights are masked, of which no plan speaks.
    """
    renewer = session._renewer
    plan = renewer.goal.plan(renewer.choice, {"schedule": repr(renewer.schedule), "events": renewer.n_done})
    if plan is None:
        raise ArgumentError("the session masks single weights; only channels have a plan.")
    return plan


def resolved_config(session: PruningSession) -> ResolvedConfig:
    """Return what the config of a session asks of each layer and group."""
    goal = session._renewer.goal
    assert isinstance(goal, ConfigGoal), "a session with a config"
    return goal.resolved


def zeroed_copy(session: PruningSession) -> nn.Module:
    """A copy of the model that trains, without masks, with zeros where they are."""
    return session._masked.dense_copy()
