"""AMC: the wall of its budget by hand, what its agent sees, and that it learns."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import torchshear
from tests.searching.spaces import Blocks, drive, layers, space_of
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching import AMC, Proposal
from torchshear.searching.methods._amc import Walk
from torchshear.searching.methods._ddpg import Agent, Step


@pytest.fixture(scope="module")
def space():
    """Three layers of 1, 2 and 1 times 5,000 operations, of which half may be left."""
    return space_of(layers(50, 100, 100, 50), torch.randn(2, 50), "macs", 0.5)


def test_the_wall_of_the_budget(space) -> None:
    """MACs 100, 200, 100 of which 200 may stay, at least .2 of each: (200 - 20) / 140, then (200 - 60) / 220."""
    asked = iter([0.6, 1.0])
    widths, steps = Walk(space, 0.2).episode(lambda _: next(asked))
    assert widths == (60, 63)  # .636
    assert [step.action for step in steps] == [0.6, 0.63]
    assert [step.is_last for step in steps] == [False, True]
    asked = iter([1.0, 1.0])
    assert Walk(space, 0.2).episode(lambda _: next(asked))[0] == (100, 33)  # the first is free: its bound is 1.29
    assert Walk(space, 0.2).episode(lambda _: 0.0)[0] == (20, 20)


def test_the_agent_sees_the_group_that_it_decides_on(space) -> None:
    """NNI shows it the group before, with the cost behind that."""
    seen = []

    def choose(state):
        seen.append(state)
        return 0.6

    _, steps = Walk(space, 0.2).episode(choose)
    assert [state.shape for state in seen] == [(11,), (11,)]
    assert all(np.array_equal(step.state, state) for step, state in zip(steps, seen, strict=True))
    assert np.array_equal(steps[0].following, seen[1])
    place, (gone, rest, kept) = [state[0] for state in seen], np.array(seen)[:, 8:].T
    assert place == [0.0, 1.0]
    assert gone == pytest.approx([0.0, 0.3])  # 3,000 + 6,000 + 5,000 of 20,000 are left
    assert rest == pytest.approx([0.5, 0.0])  # both layers have as many operations that depend on their units
    assert kept.tolist() == [1.0, 0.6]


def test_numbers_of_layers() -> None:
    space = space_of(Blocks().eval(), torch.randn(2, 1, 6, 6), "macs", 0.5)
    features = dict(zip(space.names, Walk(space, 0.2).features, strict=True))
    stem, grouped = features["stem.weight[0]"], features["grouped.weight[0]"]
    assert stem[1] < grouped[1]  # 16 units and 24
    assert stem[2] < grouped[2]  # 1 input and 4
    model = nn.Sequential(nn.Conv2d(2, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(200, 2)).eval()
    strided = Walk(space_of(model, torch.randn(2, 2, 17, 17), "macs", 0.5), 0.2).features
    height, width, stride, kernel = strided[:, 3:7].T
    assert height.tolist() == width.tolist() == [1.0, 0.0]  # maps of 7 x 7 and 5 x 5
    assert stride.tolist() == [1.0, 0.0]
    assert kernel.tolist() == [1.0, 0.0]  # 25 and 9 positions


def last_is_worth(proposal: Proposal) -> float:
    """A score by which the second group is all that counts."""
    return 1000.0 + 5.0 * proposal.widths[1]


def test_it_learns_what_counts(space) -> None:
    batches = drive(AMC(episodes=75, warm_up=30, updates=4), space, last_is_worth)
    assert [len(batch) for batch in batches] == [30] + [1] * 45
    random = [outcome.score for _, outcome in batches[0]]
    learned = [batch[0][1].score for batch in batches[-15:]]
    assert np.mean(learned) > np.mean(random) + 5 * np.std(random) / math.sqrt(len(random))
    assert all(space.budget.holds(proposal.widths) for batch in batches for proposal, _ in batch)


def test_the_noise_falls_behind_the_random_episodes(space) -> None:
    batches = drive(AMC(episodes=13, warm_up=10), space, last_is_worth)
    assert [batch[0][0].label for batch in batches[1:]] == [
        "episode 10: noise 0.500",
        "episode 11: noise 0.475",
        "episode 12: noise 0.451",
    ]


def test_the_same_seed_gives_the_same_episodes(space) -> None:
    method = AMC(episodes=16, warm_up=8)
    runs = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        state = torch.get_rng_state()
        runs.append(drive(method, space, last_is_worth, seed=4))
        assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers are left alone
    first, second = ([one.widths for batch in run for one, _ in batch] for run in runs)
    assert first == second


def test_worth_of_steps() -> None:
    """The last step of an episode is worth its reward, 1 or -1; the one before that and what the last is worth."""
    agent = Agent(1, capacity=10, random=np.random.default_rng(0))
    for start, reward in ((0.0, 1.0), (2.0, -1.0)):
        first, last = np.array([start]), np.array([start + 1])
        agent.remember([Step(first, 0.5, last, is_last=False), Step(last, 0.5, last, is_last=True)], reward)
    agent.learn(300, 0.5)
    with torch.no_grad():
        worth = agent._critic(torch.arange(4.0).double()[:, None], torch.full((4, 1), 0.5).double())
    assert worth.flatten().tolist() == pytest.approx([2.0, 1.0, -2.0, -1.0], abs=0.4)


def test_an_agent_is_drawn_from_its_generator() -> None:
    actions = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        actions.append(Agent(3, capacity=10, random=np.random.default_rng(0)).act(np.ones(3)))
    assert actions[0] == actions[1]


@pytest.mark.parametrize("every", [1, 2])
def test_failed_episodes_teach_nothing(every: int, space) -> None:
    numbers = iter(range(1000))
    batches = drive(
        AMC(episodes=20, warm_up=5),
        space,
        lambda proposal: -math.inf if next(numbers) % every == 0 else last_is_worth(proposal),
    )
    assert len(batches) == 16


def test_a_budget_that_least_forbids(space) -> None:
    with pytest.raises(ArgumentError, match=r"least=0\.8 leaves 1\.\d+ times what the budget allows"):
        drive(AMC(least=0.8), space, last_is_worth)


@pytest.mark.parametrize("wrong", [{"warm_up": 0}, {"episodes": 5}, {"least": 1.0}, {"noise": 0}, {"updates": 0}])
def test_settings_that_mean_nothing_are_refused(wrong) -> None:
    with pytest.raises(ArgumentError, match="expected|must be"):
        AMC(**wrong)


def test_a_search_without_gradients() -> None:
    """A user's own `no_grad` does not reach the agent."""
    torch.manual_seed(0)
    model, x = layers(6, 12, 12, 2), torch.randn(64, 6)
    with torch.no_grad():
        found = torchshear.search(
            model,
            x[:2],
            evaluate=lambda small: -float((small(x) - model(x)).square().mean()),
            method=AMC(episodes=12, warm_up=6),
            target_macs=0.6,
            progress=False,
        )
    assert found.best.is_within
    assert found.method == "amc"
    assert len(found.trials) + found.n_reused == 12
    with pytest.raises(SearchError):
        torchshear.search(model, x[:2], evaluate=lambda _: math.nan, method="amc", target_macs=0.6, progress=False)
