"""AMC: an agent that learns by reinforcement how much of each group to keep, one group after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import fx

from torchshear._arguments import check_count, check_number, quote
from torchshear.errors import ArgumentError
from torchshear.graph._nodes import shape_of
from torchshear.graph._operator_record import operator_of
from torchshear.graph._run import arguments_by_name
from torchshear.searching._method import Proposal, Proposals
from torchshear.searching._space import Floats, SearchSpace, WidthVector
from torchshear.searching.methods._ddpg import Agent, Step

_DECAY_OF_BASELINE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class AMC:
    """A DDPG agent walks through the groups in order and says of each which share of its units stays.

    It sees eleven numbers of each group: its place, units, inputs, height and width of the map, stride and kernel of
    the first layer that makes it, its cost, the cost that is gone so far, the cost of all groups behind it, and the
    share that it kept of the group before. What it says is narrowed to the widest width with which the budget can still
    be met if all groups behind it are cut to the least, so that every episode ends within the budget. The score at the
    end is the reward of every step of an episode, less a moving mean.

    The first episodes are drawn at random and proposed together, so that several processes share them; each later one
    depends on those before. Departures from the paper: an action is one of a channel group, not of the inputs of a
    layer, so that layers that hang together never disagree; cost is that of the tightest budget; and rewards are
    divided by the spread of the random episodes' scores, so that any number will do as a score. The agent sees the
    group that it decides on and the share that was really kept, where NNI shows it the group before and repeats cuts.

    Attributes:
        episodes: how many vectors of widths are proposed; the paper has 400.
        warm_up: how many of them are drawn at random; the paper has 100.
        least: smallest share of a group's units that may stay, in (0, 1).
        noise: standard deviation of what is added to an action in the first episode behind the random ones.
        decay: factor of the noise from episode to episode.
        updates: how often the agent learns for each step.

    Reference: He et al., AMC, ECCV 2018, arXiv:1802.03494; Lillicrap et al., DDPG, ICLR 2016, arXiv:1509.02971.
    """

    default_trials: ClassVar[int | None] = None
    episodes: int = 100
    warm_up: int = 25
    least: float = 0.2
    noise: float = 0.5
    decay: float = 0.95
    updates: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("least", "noise", "decay"):
            check_number(name, getattr(self, name))
        check_count("warm_up", self.warm_up)
        check_count("episodes", self.episodes, least=self.warm_up)
        check_count("updates", self.updates)
        if not (0 < self.least < 1 and 0 < self.noise <= 1 and 0 < self.decay <= 1):
            raise ArgumentError(
                f"AMC has least={quote(self.least)}, noise={quote(self.noise)} and decay={quote(self.decay)}; expected "
                f"a share between 0 and 1, and a noise and a decay above 0 and at most 1."
            )

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose the random episodes together, then one after another.

        Raises:
            ArgumentError: the budget cannot be met with `least` of each group; said before the first trial.
        """
        walk = Walk(space, self.least)
        agent = Agent(walk.features.shape[1] + 3, capacity=100 * len(space.names), random=random)
        first = [walk.episode(lambda _: random.uniform(self.least, 1.0)) for _ in range(self.warm_up)]
        outcomes = yield [Proposal(one[0], label=f"episode {number}: random") for number, one in enumerate(first)]
        scores = [one.score for one in outcomes if not one.has_failed]
        middle, spread = (float(np.mean(scores)), float(np.std(scores))) if scores else (0.0, 0.0)
        for (_, steps), outcome in zip(first, outcomes, strict=True):
            if not outcome.has_failed:
                agent.remember(steps, (outcome.score - middle) / (spread or 1.0))
        for number in range(self.warm_up, self.episodes):
            sigma = self.noise * self.decay ** (number - self.warm_up)
            widths, steps = walk.episode(partial(_noisy_action, agent, random, sigma))
            (outcome,) = yield [Proposal(widths, label=f"episode {number}: noise {sigma:.3f}")]
            if not outcome.has_failed:
                agent.remember(steps, (outcome.score - middle) / (spread or 1.0))
            agent.learn(len(steps) * self.updates, _DECAY_OF_BASELINE)


class Walk:
    """Walk through the groups, each of which gets a width that the budget allows.

    Args:
        space: the space of the search.
        least: smallest share of a group's units that may stay.

    Attributes:
        features: what an agent sees of each group whatever was decided, scaled to [0, 1], shape (n_groups, 8).

    Raises:
        ArgumentError: the budget cannot be met so.
    """

    def __init__(self, space: SearchSpace, least: float) -> None:
        self._space = space
        self._allowed = [
            tuple(width for width in allowed if width >= least * dense - 1e-9) or allowed[-1:]
            for allowed, dense in zip(space.allowed, space.dense.tolist(), strict=True)
        ]
        self._narrowest = tuple(allowed[0] for allowed in self._allowed)
        if not space.budget.holds(self._narrowest):
            raise ArgumentError(
                f"AMC with least={least} leaves {space.budget.load(self._narrowest):.3g} times what the budget allows; "
                f"use a smaller least."
            )
        self._dense_load = space.budget.load(space.widest)
        alone = [self._load((*space.widest[:i], low, *space.widest[i + 1 :])) for i, low in enumerate(self._narrowest)]
        costs = 1 - np.array(alone)
        self._rest = np.append(np.cumsum(costs[::-1])[::-1], 0.0)[1:] / max(float(costs.sum()), 1e-12)
        seen = np.column_stack([np.arange(len(costs)), space.dense, list(_first_layers(space)), costs])
        span = np.ptp(seen, axis=0)
        self.features = (seen - seen.min(axis=0)) / np.where(span > 0, span, 1.0)

    def episode(self, choose: Callable[[Floats], float]) -> tuple[WidthVector, list[Step]]:
        """Go through all groups.

        Args:
            choose: gives the share of units to keep for a state, of shape (11,).

        Returns:
            The widths, within the budget, and the steps with the shares that were really kept.
        """
        widths: WidthVector = ()
        states, kept = [self._state(widths, 1.0)], list[float]()
        for place, (allowed, dense) in enumerate(zip(self._allowed, self._space.dense.tolist(), strict=True)):
            low, high = 0, len(allowed) - 1  # the widest width with which the rest can still be met
            while low < high:
                middle = (low + high + 1) // 2
                holds = self._space.budget.holds((*widths, allowed[middle], *self._narrowest[place + 1 :]))
                low, high = (middle, high) if holds else (low, middle - 1)
            wanted = choose(states[-1]) * dense
            nearest = int(np.argmin(np.abs(np.array(allowed[: low + 1]) - wanted)))
            widths = (*widths, allowed[nearest])
            kept.append(widths[-1] / dense)
            states.append(self._state(widths, kept[-1]))
        is_last = [False] * (len(kept) - 1) + [True]
        return widths, [Step(*step) for step in zip(states[:-1], kept, states[1:], is_last, strict=True)]

    def _load(self, widths: WidthVector) -> float:
        """Return what is left of the dense model's cost."""
        return self._space.budget.load(widths) / self._dense_load

    def _state(self, widths: WidthVector, kept: float) -> Floats:
        """Return what an agent sees before it decides on the group behind some widths; of the last there is none."""
        place = min(len(widths), len(self._allowed) - 1)
        gone = 1 - self._load((*widths, *self._space.widest[len(widths) :]))
        return np.array([*self.features[place], gone, self._rest[place], kept])


def _first_layers(space: SearchSpace) -> Iterator[tuple[float, ...]]:
    """Yield inputs, height and width of the map, stride and kernel of the first layer that makes each group's units."""
    graph = space.budget.groups.graph
    calls: dict[str, fx.Node] = {}
    for node in graph:
        if (product := operator_of(node).product) is not None:
            weight = arguments_by_name(node.target, node.args, node.kwargs).get(product.right)
            if isinstance(weight, fx.Node):
                calls.setdefault(str(weight.target), node)
    for name in space.names:
        group = space.budget.groups[name]
        made = [member.name for member in group.members if "out" in member.purposes and member.name in graph.state]
        shape = tuple(graph.state[made[0]].shape) if made else (group.width, 0)
        call = calls.get(made[0]) if made else None
        size, stride = (1, 1), 1
        if call is not None and len(shape) > 2:
            size = tuple(shape_of(call)[-2:])
            strides = arguments_by_name(call.target, call.args, call.kwargs).get("stride") or [1]
            stride = max(strides) if isinstance(strides, Sequence) else int(strides)
        yield float(shape[1] if len(shape) > 1 else 0), *map(float, size), float(stride), float(np.prod(shape[2:]))


def _noisy_action(agent: Agent, random: np.random.Generator, sigma: float, state: Floats) -> float:
    """Draw an action near that of the agent, from a normal distribution that is cut off outside of [0, 1]."""
    mean = agent.act(state)
    while not 0 <= (found := random.normal(mean, sigma)) <= 1:
        pass
    return float(found)
