"""Deep deterministic policy gradient: an agent that learns one number per step from rewards at the end of episodes."""

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchshear.searching._space import Floats

_HIDDEN: Final = 300
_BATCH: Final = 64
_ACTOR_RATE, _CRITIC_RATE = 1e-4, 1e-3
_SOFT: Final = 0.01  # share of the networks that targets take over at each update
_LAST_WEIGHTS: Final = 3e-3  # largest weight of last layers at the beginning, so that first actions are near 0.5


class Step(NamedTuple):
    """One step of an episode.

    Attributes:
        state: what the agent saw, shape (n_inputs,).
        action: what was done, in [0, 1].
        following: what it saw then.
        is_last: whether the episode ended there.
    """

    state: Floats
    action: float
    following: Floats
    is_last: bool


class _Actor(nn.Sequential):
    def __init__(self, n_inputs: int) -> None:
        last = nn.Linear(_HIDDEN, 1)
        super().__init__(
            nn.Linear(n_inputs, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), last, nn.Sigmoid()
        )
        nn.init.uniform_(last.weight, -_LAST_WEIGHTS, _LAST_WEIGHTS)


class _Critic(nn.Module):
    """Worth of an action in a state; the embeddings of both are added."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.state, self.action = nn.Linear(n_inputs, _HIDDEN), nn.Linear(1, _HIDDEN)
        self.hidden, self.last = nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, 1)
        nn.init.uniform_(self.last.weight, -_LAST_WEIGHTS, _LAST_WEIGHTS)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        found: Tensor = self.last(self.hidden((self.state(state) + self.action(action)).relu()).relu())
        return found


class Agent:
    """Actor and critic with their slow copies, and the steps that they learn from.

    All in float64, and drawn from one generator, so that a sequence repeats itself.

    Args:
        n_inputs: size of a state.
        capacity: how many steps are remembered; older ones are forgotten.
        random: where everything is drawn from.
    """

    def __init__(self, n_inputs: int, capacity: int, random: np.random.Generator) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.integers(2**31)))
            self._actor, self._critic = _Actor(n_inputs).double(), _Critic(n_inputs).double()
            self._slow_actor, self._slow_critic = _Actor(n_inputs).double(), _Critic(n_inputs).double()
        self._slow_actor.load_state_dict(self._actor.state_dict())
        self._slow_critic.load_state_dict(self._critic.state_dict())
        self._actor_rule = torch.optim.Adam(self._actor.parameters(), _ACTOR_RATE)
        self._critic_rule = torch.optim.Adam(self._critic.parameters(), _CRITIC_RATE)
        self._steps: deque[tuple[Step, float]] = deque(maxlen=capacity)
        self._random = random
        self._baseline: float | None = None

    def act(self, state: Floats) -> float:
        """Return the action for a state, in (0, 1)."""
        with torch.no_grad():
            return float(self._actor(torch.from_numpy(state)))

    def remember(self, steps: Sequence[Step], reward: float) -> None:
        """Remember the steps of an episode, each with the reward at its end."""
        self._steps.extend((step, reward) for step in steps)

    @torch.enable_grad()
    def learn(self, times: int, baseline_decay: float) -> None:
        """Update both networks from steps drawn at random; nothing happens while there are none.

        Args:
            times: how often.
            baseline_decay: share of the mean reward before that is kept with each update.
        """
        for _ in range(times if self._steps else 0):
            places = self._random.integers(len(self._steps), size=_BATCH).tolist()
            drawn = [self._steps[place] for place in places]
            states, following = (
                torch.from_numpy(np.stack(one))
                for one in ([step.state for step, _ in drawn], [step.following for step, _ in drawn])
            )
            actions, rewards, goes_on = torch.tensor(
                [(step.action, reward, not step.is_last) for step, reward in drawn], dtype=torch.float64
            ).T.unsqueeze(2)
            mean = float(rewards.mean())
            before = mean if self._baseline is None else self._baseline
            self._baseline = baseline_decay * before + (1 - baseline_decay) * mean
            with torch.no_grad():
                later = self._slow_critic(following, self._slow_actor(following))
                target = rewards - self._baseline + goes_on * later
            self._critic_rule.zero_grad()
            torch.autograd.backward(functional.mse_loss(self._critic(states, actions), target))
            self._critic_rule.step()
            self._actor_rule.zero_grad()
            torch.autograd.backward(-self._critic(states, self._actor(states)).mean())
            self._actor_rule.step()
            with torch.no_grad():
                for slow, fast in ((self._slow_actor, self._actor), (self._slow_critic, self._critic)):
                    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                        old.lerp_(new, _SOFT)
