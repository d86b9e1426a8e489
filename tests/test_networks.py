"""Every small network of the registry: pruned by half, cut at random, and pruned again."""

import copy

import numpy as np
import pytest
import torch

import torchshear
from tests.networks import NETWORKS, Network, named
from tests.oracle import (
    assert_equals_masked,
    assert_is_slice,
    assert_outputs_equal,
    assert_outputs_of_same_form,
    check_random_pruning,
    fingerprint,
    n_elements,
)
from torchshear.errors import TorchshearError

PRUNABLE = [one for one in NETWORKS if "refused" not in one.tags]
REFUSED = [one for one in NETWORKS if "refused" in one.tags]
Pruned = tuple[torch.nn.Module, tuple, dict, torchshear.PruneResult]


@pytest.fixture(scope="module", params=PRUNABLE, ids=lambda one: one.name)
def network(request: pytest.FixtureRequest) -> Network:
    return request.param


@pytest.fixture(scope="module")
def pruned(network: Network) -> Pruned:
    """A network, its inputs, and what is left of it."""
    model, args, kwargs = network.build()
    before = fingerprint(model)
    result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5)
    assert fingerprint(model) == before
    return model, args, kwargs, result


def test_half_is_pruned(network: Network, pruned: Pruned) -> None:
    model, args, kwargs, result = pruned
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    groups = result.plan.analysis
    assert tuple(sorted(group.width for group in groups.prunable)) == network.widths
    for group in result.plan.groups:
        asked = -(-group.width // 2)
        is_near = abs(len(group.kept) - asked) < groups[group.name].n_blocks
        assert is_near or len(group.kept) == group.width, group.name
    masks = result.plan.masks()
    expected = sum(int(masks[name].sum()) if name in masks else n for name, n in sizes.items())
    assert sum(parameter.numel() for parameter in result.model.parameters()) == expected < sum(sizes.values())
    assert result.verification.dtype is torch.float64
    assert result.verification.max_error <= 1e-9
    assert_is_slice(model, result.model, result.plan)
    if "cross_channel" not in network.tags:
        assert_equals_masked(model, result.model, result.plan, args, kwargs)
    assert_outputs_of_same_form(result.model(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("kept_seed", [0, pytest.param(1, marks=pytest.mark.zoo)])
def test_random_units_are_cut(network: Network, pruned: Pruned, kept_seed: int) -> None:
    model, args, kwargs, result = pruned
    mixes = "cross_channel" in network.tags
    check_random_pruning(model, args, kwargs, kept_seed, is_cross_channel=mixes, groups=result.plan.analysis)


@pytest.mark.parametrize("network", REFUSED, ids=lambda one: one.name)
def test_refusal_gives_its_reason_and_changes_nothing(network: Network) -> None:
    model, args, kwargs = network.build()
    before, expected = fingerprint(model), model(*args, **kwargs)
    groups = torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    assert not any(group.is_prunable for group in groups)
    try:
        result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5)
    except TorchshearError as error:
        said = str(error)
    else:
        said = str(result.report)
        assert_outputs_equal(result.model(*args, **kwargs), expected, rtol=1e-12)
    assert f"aten.{network.name}" in said, "the operator that forbids it is named"
    assert fingerprint(model) == before


ITERATED = named(
    "split_iterated", "c2f", "residual", "grouped_bottleneck", "shuffle_view", "qkv_unbind_sdpa", "pad_shortcut"
)


@pytest.mark.parametrize("network", ITERATED, ids=lambda one: one.name)
def test_pruning_a_pruned_model_again(network: Network) -> None:
    model, args, kwargs = network.build()
    for _ in range(3):
        result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.25)
        assert n_elements(result.model) < n_elements(model)
        assert_equals_masked(model, result.model, result.plan, args, kwargs)
        model = result.model


def test_gated_unit_loses_what_was_asked() -> None:
    for network in named("glu_chunk", "swiglu", "glu_module"):
        model, args, kwargs = network.build()
        result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5)
        first = next(name for name, parameter in model.named_parameters() if parameter.ndim > 1)
        kept = result.plan.masks()[first].flatten(1).any(1)
        half = kept.numel() // 2
        assert kept[:half].sum() == half // 2, "half was asked"
        assert torch.equal(kept[:half], kept[half:]), "a value goes with its gate"


def test_a_call_that_fails_is_reported_with_its_own_error() -> None:
    model, args, kwargs = named("several_inputs")[0].build()
    before = fingerprint(model)
    wrong = {**kwargs, "context": torch.zeros(2, 7, 16, 16, dtype=torch.float64)}
    with pytest.raises(TorchshearError, match="7"):
        torchshear.prune(model, args=args, kwargs=wrong)
    with pytest.raises(TorchshearError, match="scale"):
        torchshear.prune(model, args=args)
    assert fingerprint(model) == before


@pytest.mark.parametrize("network", named("residual", "pad_shortcut"), ids=lambda one: one.name)
def test_pruned_model_trains(network: Network) -> None:
    model, args, kwargs = network.build()
    small = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5).model.train()
    before = copy.deepcopy(small.state_dict())
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    small(*args, **kwargs).square().mean().backward()
    optimiser.step()
    after = small.state_dict()
    moved = [name for name, tensor in after.items() if not np.array_equal(tensor.numpy(), before[name].numpy())]
    assert {name.split(".")[-1] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
