"""The invariants of the design over random networks and random kept sets, and over mixed networks sliced by hand."""

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import torchshear
from tests.networks import analyzed, named, randomise
from tests.oracle import (
    FORMULAS,
    assert_equals_masked,
    assert_is_slice,
    assert_same_function,
    check_random_pruning,
    fingerprint,
    masked_copy,
    named_tensors,
)
from tests.strategies import BLOCKS, RandomNetwork, example_input, has_mixing, kept_sets, networks, random_description
from torchshear.dependency import ChannelGroups
from torchshear.pruners import plan_from_kept

N_CHUNKS, N_PER_CHUNK = 4, 20  # tens of thousands: `benchmarks/fuzz.py`

# Shrinking would repeat the capture hundreds of times; `benchmarks/fuzz.py --minimise` drops whole blocks instead.
PER_CHUNK = settings(
    max_examples=N_PER_CHUNK,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("chunk", [0, *(pytest.param(number, marks=pytest.mark.zoo) for number in range(1, N_CHUNKS))])
def test_random_networks_shrink_to_the_masked_network(chunk: int) -> None:
    n_cut: list[int] = []

    @seed(chunk)
    @PER_CHUNK
    @given(networks(), st.integers(0, 2**16))
    def check(description: dict, kept_seed: int) -> None:
        model = RandomNetwork(description)
        inputs = (example_input(description),)
        n_cut.append(check_random_pruning(model, inputs, None, kept_seed, has_mixing(description)).n_cut)

    check()
    assert sum(n > 0 for n in n_cut) > 0.6 * len(n_cut), "most random networks must have something to cut"


@functools.cache
def mixed(name: str) -> tuple[torch.nn.Module, tuple, ChannelGroups]:
    model, args, _ = named(name)[0].build()
    return model, args, analyzed(model, *args)


@pytest.mark.parametrize("kept_seed", range(4))
@pytest.mark.parametrize("name", FORMULAS)
def test_mixed_network_equals_hand_sliced_formula(name: str, kept_seed: int) -> None:
    model, args, groups = mixed(name)
    plan = plan_from_kept(groups, kept_sets(groups, kept_seed))
    small = torchshear.shrink(model, plan, verify=False)
    masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in named_tensors(model).items()} | plan.masks()
    assert_same_function(lambda *inputs: FORMULAS[name](model, masks, *inputs), small, args)
    torchshear.verify(model, small, plan, args=args)


@pytest.mark.parametrize("name", FORMULAS)
def test_hand_sliced_formula_is_the_model_where_nothing_is_cut(name: str) -> None:
    model, args, _ = mixed(name)
    masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in named_tensors(model).items()}
    with torch.no_grad():
        expected, actual = model(*args), FORMULAS[name](model, masks, *args)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_masked_copy_zeroes_what_is_cut_and_leaves_the_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    before = fingerprint(model)
    kept = torch.tensor([True, False, True, True])
    masks = {"0.weight": kept[:, None].expand(4, 3), "0.bias": kept, "1.weight": kept, "1.bias": kept}
    masked = masked_copy(model, masks | {"1.running_mean": kept, "1.running_var": kept})
    output = masked(torch.ones(2, 3, dtype=torch.float64))
    assert (output[:, 1] == 0).all()
    assert (output[:, 0] != 0).all()
    assert fingerprint(model) == before


@pytest.mark.parametrize("fault", ["value", "unit"])
def test_oracle_sees_a_wrong_weight_and_a_wrong_unit(fault: str) -> None:
    model = randomise(torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).double(), 0)
    plan = torchshear.prune(model.eval(), args=(torch.ones(2, 3, dtype=torch.float64),), ratio=0.5).plan
    small = torchshear.shrink(model, plan, verify=False)
    inputs = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    assert_equals_masked(model, small, plan, inputs)
    assert_is_slice(model, small, plan)
    weight = dict(small.named_parameters())["0.weight"]
    with torch.no_grad():
        if fault == "value":
            weight[0] *= 1 + 1e-6
        else:
            weight.copy_(model[0].weight[~plan.masks()["0.bias"]])
    with pytest.raises(AssertionError, match="relative error"):
        assert_equals_masked(model, small, plan, inputs)
    with pytest.raises(AssertionError, match="not a slice"):
        assert_is_slice(model, small, plan)


@pytest.mark.parametrize("number", range(30))
def test_description_survives_json_and_rebuilds_the_same_network(number: int) -> None:
    description = random_description(number)
    again = json.loads(json.dumps(description))
    assert again == description
    rng = torch.get_rng_state()
    first, second = RandomNetwork(description), RandomNetwork(again)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, dict(second.state_dict())[name]) for name, t in first.state_dict().items())
    values = torch.cat([torch.zeros(0), *(parameter.flatten() for parameter in first.parameters())])
    assert values.unique().numel() == values.numel(), "all weights are distinct"


def test_generator_reaches_every_kind_of_block() -> None:
    assert {item["kind"] for number in range(400) for item in random_description(number)["blocks"]} == set(BLOCKS)
