"""Polynomials in shares of units against costs and sizes of units that are really cut."""

import numpy as np
import pytest
import torch
from torch import nn

import torchshear
from tests.networks import NETWORKS, Network
from tests.strategies import RandomNetwork, example_input, kept_sets, random_description
from torchshear.dependency import Alignment, ChannelGroups
from torchshear.dependency.groups._aligned_widths import aligned_widths, first_units
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.groups._width_form import WidthForm, axis_forms
from torchshear.dependency.plans._cut import Cut
from torchshear.pruners import plan_from_kept


def shares_after(groups: ChannelGroups, kept: dict[str, np.ndarray]) -> np.ndarray:
    return np.array([len(kept.get(group.name, range(group.width))) / group.width for group in groups])


def assert_forms_are_exact(groups: ChannelGroups, seed: int) -> None:
    forms = WidthCost(groups).forms()
    params, macs = forms["n_params"], forms["macs"]
    kept = kept_sets(groups, seed)
    cut, shares = Cut(groups, kept), shares_after(groups, kept)
    cost = cut.cost()
    assert float(params.at(shares)) == pytest.approx(cost.n_params, abs=0.5)
    assert float(macs.at(shares)) == pytest.approx(cost.macs, abs=1)
    assert float(forms["size_bytes"].at(shares)) == pytest.approx(cost.size_bytes, abs=0.5)
    axes = [axis for found in groups.facts.axes.values() for axis in found or () if not isinstance(axis, tuple)]
    sizes = {int(cut.keep(axis).sum()) for axis in axes if cut.changes(axis)}
    assert sizes <= {round(float(form.at(shares))) for form in axis_forms(groups)}


@pytest.mark.parametrize("seed", range(10))
def test_random_networks(seed: int) -> None:
    description = random_description(seed)
    groups = torchshear.analyze(torchshear.trace(RandomNetwork(description), (example_input(description),)))
    assert_forms_are_exact(groups, seed)


@pytest.mark.parametrize("network", NETWORKS[2::6], ids=lambda one: one.name)
def test_small_networks(network: Network) -> None:
    model, args, kwargs = network.build()
    assert_forms_are_exact(torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs)), 0)


@pytest.mark.parametrize("network", NETWORKS[1::6], ids=lambda one: one.name)
def test_first_units_are_a_cut_at_every_aligned_width(network: Network) -> None:
    model, args, kwargs = network.build()
    groups = torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    for align in (Alignment.none(), Alignment(4, 2, "small")):
        for group in groups.prunable:
            widths = aligned_widths(group, align)
            assert widths[-1] == group.width
            for width in (widths[0], widths[len(widths) // 2]):
                assert (
                    len(plan_from_kept(groups, {group.name: first_units(group, int(width))}).kept[group.name]) == width
                )


def test_forms_add_and_multiply_as_polynomials_do() -> None:
    one, other = WidthForm({(): 2.0, (0,): 3.0}), WidthForm({(1,): 5.0})
    shares = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)).double().numpy()
    a, b = 2 + 3 * shares[0], 5 * shares[1]
    for form, values in ((one + other, a + b), (one * other, a * b), (2 * one / 4, a / 2), (1 + one, 1 + a)):
        assert form.at(shares) == pytest.approx(values)
    assert (one * one).terms == {(): 4.0, (0,): 12.0, (0, 0): 9.0}
    assert not one.is_constant
    assert WidthForm({(): 1.0}).is_constant


def test_sizes_that_no_width_changes_have_no_form() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 3),)))
    assert [dict(form.terms) for form in axis_forms(groups)] == [{(0,): 8.0}]
