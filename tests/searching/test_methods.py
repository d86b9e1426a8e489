"""Methods by hand: the figures that follow from their definitions, and what their models do wrong."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.searching.spaces import Blocks, drive, layers, space_of
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching import Annealing, Evolution, Milp, NetAdapt, Proposal, RandomSearch, Sensitivity, Uniform
from torchshear.searching._request import name_of
from torchshear.searching.methods import METHODS
from torchshear.searching.methods._sensitivity import cut_in_proportion


@pytest.fixture(scope="module")
def two():
    """Groups of 100 and 300 channels; 60 % are to go."""
    return space_of(layers(4, 100, 300, 2), torch.randn(2, 4), share=0.4)


@pytest.fixture(scope="module")
def blocks():
    return space_of(Blocks().eval(), torch.randn(2, 1, 6, 6), "macs", 0.5)


def worth(proposal: Proposal) -> float:
    """A score with a best that is not uniform: early groups are worth more."""
    return sum(math.sqrt(width) / (place + 1) for place, width in enumerate(proposal.widths))


def test_rescaling_of_annealing(two) -> None:
    assert two.names[0].startswith("0.")
    assert np.allclose(two.rescale(np.array([0.2, 0.6])), [0.24, 0.72], atol=1e-9)
    assert two.at([0.24, 0.72]) == (76, 84)
    assert two.rescale(np.array([0.9, 0.1])) is None  # the first would have to lose more than all
    assert two.rescale(np.zeros(2)) is None


def test_annealing_has_sixteen_moves_of_shrinking_size() -> None:
    found = Annealing().magnitudes()
    assert len(found) == 16
    assert found[0] == 0.35
    assert found[-1] == pytest.approx(0.072, abs=5e-4)
    assert 100 * found[-1] / 0.35 == pytest.approx(20.6, abs=0.05)


def test_annealing_gives_larger_groups_larger_shares_and_keeps_the_budget(two) -> None:
    batches = drive(Annealing(), two, worth, seed=3)
    assert two.sizes[0] < two.sizes[1]
    shares = [two.shares_of(proposal.widths) for ((proposal, _),) in batches]
    assert all(small <= large + 0.01 for small, large in shares)
    assert all(two.budget.holds(proposal.widths) for ((proposal, _),) in batches)
    moves = [float(proposal.label.split()[1]) for ((proposal, _),) in batches]
    assert sorted(set(moves), reverse=True) == pytest.approx(Annealing().magnitudes(), abs=6e-4)


def test_annealing_refuses_falls_at_the_end(two) -> None:
    """With accuracies in [0, 1] NNI accepts 95 % of all falls whatever the temperature, and so wanders at random."""
    accepted: dict[bool, list[bool]] = {True: [], False: []}
    for seed in range(20):
        noise = np.random.default_rng(seed)
        batches = drive(Annealing(), two, lambda _, noise=noise: 0.9 + 0.01 * noise.uniform(), seed=seed)
        current = batches[0][0][1].score
        for ((before, outcome),), ((after, _),) in pairwise(batches[1:]):
            was_accepted = before.label != after.label
            late = float(before.label.split()[1]) < 0.15
            if outcome.score < current:
                accepted[late].append(was_accepted)
            current = outcome.score if was_accepted else current
    assert np.mean(accepted[True]) < 0.35 < 0.45 < np.mean(accepted[False])


def test_sensitivity_cuts_in_proportion() -> None:
    space = space_of(layers(4, 100, 300, 2), torch.randn(2, 4), share=0.5)
    assert space.budget.load(space.widest) == 2.0
    cut = cut_in_proportion(space, space.widest, np.array([0.4, 0.2]), 2.0 - 0.1 * 2.0)
    assert cut == (84, 276)  # shares .16 and .08
    assert cut_in_proportion(space, space.widest, np.zeros(2), 1.8) is None


def test_sensitivity_takes_the_largest_safe_share_and_trims_the_last_round(two) -> None:
    """NNI takes the first share that is not safe, and cuts up to a whole step beyond the target."""

    def score(proposal: Proposal) -> float:
        gone = 1 - np.array(proposal.widths) / [100, 300]
        return 1.0 - 0.1 * gone[0] - 0.02 * gone[1]

    batches = drive(Sensitivity(threshold=0.035), two, score)
    first = [proposal.label for batch in batches[:10] for proposal, _ in batch if "round 1: 0." in proposal.label]
    assert first[-1].endswith("by 40%")  # the first that is not safe; 30 % is
    (cut, outcome) = batches[10][0]
    assert cut.label == "round 1: all"
    gone = 1 - np.array(cut.widths) / [100, 300]
    assert gone[0] / gone[1] == pytest.approx(0.3 / 0.9, abs=0.03)
    assert 1 - outcome.load * 0.4 == pytest.approx(0.1, abs=0.005)
    last, outcome = batches[-1][0]
    assert last.label.endswith(": all")
    assert 0.99 < outcome.load <= 1.0


def test_sensitivity_ends_where_nothing_is_safe(two) -> None:
    with pytest.raises(SearchError, match=r"no group can lose a tenth .* threshold=0\.05"):
        drive(Sensitivity(), two, lambda proposal: float(sum(proposal.widths)))


def test_netadapt_schedule_of_the_paper() -> None:
    paper = NetAdapt(step=0.025)
    assert [paper.reduction(rounds) for rounds in (10, 28, 60, 100)] == pytest.approx(
        [0.209, 0.426, 0.571, 0.614], abs=5e-4
    )
    assert paper.reduction(math.inf) == pytest.approx(0.625)


def test_netadapt_says_before_the_first_trial_that_its_steps_are_too_small() -> None:
    space = space_of(layers(4, 20, 20, 2), torch.randn(2, 4), share=0.25)
    with pytest.raises(ArgumentError, match=r"removes at most 62\.5% .* asks for 75\.0%. Use a step above 0\.03"):
        drive(NetAdapt(step=0.025), space, worth)


def test_netadapt_narrows_each_group_just_enough() -> None:
    """1,000 weights, a round of 50: the group whose layers have 200 and 300 of them loses a tenth."""
    model = layers(20, 10, 30, 16, 1, bias=False)  # 200 + 300 + 480 + 16 weights
    space = space_of(model, torch.randn(2, 20), "params", 0.5)
    batches = drive(NetAdapt(step=0.05), space, worth)
    assert [proposal.widths for proposal, _ in batches[1]] == [(9, 30, 16), (10, 28, 16), (10, 30, 14)]
    for before, after in pairwise(batches[1:]):
        assert {proposal.path[-1] for proposal, _ in after} <= {proposal.widths for proposal, _ in before}


@pytest.mark.parametrize("rule", ["ratio", "score"])
def test_netadapt_keeps_the_best_of_each_round_by_what_was_saved_for_real(rule, two) -> None:
    batches = drive(NetAdapt(rule=rule), two, worth)
    base = batches[0][0][1]
    for number, batch in enumerate(batches[1:], 1):
        outcomes = [outcome for _, outcome in batch]
        load = max(1.0, base.load - 2.5 * 0.05 * 0.96 ** (number - 1))
        assert all(outcome.load <= load + 1e-9 for outcome in outcomes)
        by = {"ratio": lambda one: (base.score - one.score + 1e-6) / (base.load - one.load + 1e-5)}  # noqa: B023
        best = min(outcomes, key=by.get(rule, lambda one: -one.score))
        if number + 1 < len(batches):
            assert batches[number + 1][0][0].path[-1] == best.widths
        base = best
    assert base.load <= 1.0


def test_netadapt_ends_where_no_group_can_meet_a_round() -> None:
    """NNI halves its step without computing it anew, and so never ends."""
    space = space_of(
        layers(4, 20, 20, 2), torch.randn(2, 4), share=0.05
    )  # together they can, alone none can in the end
    with pytest.raises(SearchError, match="no group alone can bring the cost down"):
        drive(NetAdapt(step=0.9, halvings=1), space, worth)


def test_evolution_keeps_its_best_and_gets_better() -> None:
    space = space_of(layers(4, 30, 20, 25, 16, 2), torch.randn(2, 4))
    batches = drive(Evolution(population=6), space, worth, most=60)
    assert {len(batch) for batch in batches} == {6}
    means = [np.mean([outcome.score for _, outcome in batch]) for batch in batches]
    assert means[-1] > means[0]


def test_the_allocation_is_one_trial_and_best_by_scores(blocks) -> None:
    ((pair,),) = drive(Milp(), blocks, worth)
    assert blocks.budget.holds(pair[0].widths)
    levels = {one.name: dict(zip(one.widths, one.losses, strict=True)) for one in blocks.levels()}

    def loss(widths) -> float:
        known = [levels[name][width] for name, width in zip(blocks.names, widths, strict=True)]
        return sum(known)

    others = [proposal.widths for batch in drive(RandomSearch(), blocks, worth, most=40) for proposal, _ in batch]
    assert loss(pair[0].widths) <= min(map(loss, others))


@pytest.mark.parametrize("name", METHODS)
def test_every_proposal_is_a_width_that_the_network_can_have(name, blocks) -> None:
    """Blocks of a grouped convolution lose equally many, a residual sum and its summands the same."""
    method = Sensitivity(threshold=10.0) if name == "sensitivity" else METHODS[name]()
    for batch in drive(method, blocks, worth, most=40):
        for proposal, _ in batch:
            assert all(w in allowed for w, allowed in zip(proposal.widths, blocks.allowed, strict=True))
            assert proposal.widths[blocks.names.index("grouped.weight[0]")] % 4 == 0


@pytest.mark.parametrize("name", ["random", "uniform", "milp", "annealing", "evolution"])
def test_one_shot_methods_stay_within_the_budget_and_repeat(name, blocks) -> None:
    runs = [drive(METHODS[name](), blocks, worth, most=24, seed=5) for _ in range(2)]
    widths = [[proposal.widths for batch in run for proposal, _ in batch] for run in runs]
    assert widths[0] == widths[1]
    assert all(blocks.budget.holds(one) for one in widths[0])
    assert name_of(METHODS[name]()) == name


def test_uniform_is_the_widest_network_within_the_budget(two) -> None:
    (((proposal, outcome),),) = drive(Uniform(), two, worth)
    assert proposal.widths == (40, 120)
    assert outcome.load == pytest.approx(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Annealing(start=10, stop=20),
        lambda: Annealing(cooling=1.0),
        lambda: Annealing(perturbation=0.0),
        lambda: NetAdapt(step=0.0),
        lambda: NetAdapt(decay=1.1),
        lambda: NetAdapt(rule="best"),  # type: ignore[arg-type]
        lambda: Sensitivity(threshold=0.0),
        lambda: Sensitivity(step=1.5),
        lambda: Evolution(population=1),
        lambda: Evolution(noise=0),
        lambda: RandomSearch(batch=0),
    ],
)
def test_settings_that_mean_nothing_are_refused(make) -> None:
    with pytest.raises(ArgumentError, match="expected|must be"):
        make()
