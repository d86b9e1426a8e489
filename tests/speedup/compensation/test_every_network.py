"""Compensation of every small network of the registry: nothing gets worse, and nothing that is given changes."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import nn

import torchshear
from tests.networks import Network, third
from tests.oracle import assert_outputs_of_same_form, fingerprint, fresh_inputs
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.options import CompensationMethod
from torchshear.pruners import plan_from_kept
from torchshear.speedup import refit, shrink_to_form

N_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """A network, what a plan makes of it, and random batches for it."""

    network: Network
    model: nn.Module
    groups: ChannelGroups
    plan: torchshear.PruningPlan
    small: nn.Module
    loader: list[Any]


@pytest.fixture(scope="module", params=third(1))
def cut(request: pytest.FixtureRequest) -> Cut:
    model, args, kwargs = request.param.build()
    groups = torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    plan = torchshear.plan(groups, ratio=0.5)
    loader = [fresh_inputs((args, kwargs), seed) for seed in range(N_BATCHES)]
    if kwargs:
        loader = [dict(inspect.signature(model.forward).bind(*one, **named).arguments) for one, named in loader]
    else:
        loader = [one for one, _ in loader]
    return Cut(request.param, model, groups, plan, shrink_to_form(model, plan, verify=False).model, loader)


@pytest.fixture(autouse=True)
def _nothing_given_changes(cut: Cut) -> Iterator[None]:
    def given() -> tuple[object, ...]:
        return fingerprint(cut.model), fingerprint(cut.small), repr(cut.plan)

    before = given()
    yield
    assert given() == before


def assert_finite_and_of_same_form(cut: Cut, result: nn.Module) -> None:
    _, args, kwargs = cut.network.build()
    with torch.no_grad():
        assert_outputs_of_same_form(result(*args, **kwargs), cut.model(*args, **kwargs))


def test_a_refit_makes_nothing_worse(cut: Cut) -> None:
    result, record = refit(cut.model, cut.small, cut.plan, cut.loader, batches=N_BATCHES, progress=False)
    assert_finite_and_of_same_form(cut, result)
    is_fitted = any(layer.method for layer in record.layers)
    assert record.error_after < record.error_before or not record.is_kept or not is_fitted
    assert all(layer.error_after <= layer.error_before for layer in record.layers)
    assert record.n_samples == 3 * record.n_held_out > 0


def test_a_refit_without_a_cut_changes_nothing(cut: Cut) -> None:
    plan = plan_from_kept(cut.groups, {})
    same = shrink_to_form(cut.model, plan, verify=False).model
    result, record = refit(cut.model, same, plan, cut.loader, batches=N_BATCHES, progress=False)
    assert record.error_before == record.error_after == 0
    for name, tensor in cut.model.state_dict().items():
        assert torch.equal(result.state_dict()[name], tensor), name


@pytest.mark.parametrize("method", [one for one in get_args(CompensationMethod) if one != "refit"])
def test_other_methods_give_a_model_that_computes(cut: Cut, method: CompensationMethod) -> None:
    loader = None if method == "constants" else cut.loader
    has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in cut.model.modules())
    with nullcontext() if method != "statistics" or has_norms else pytest.raises(ArgumentError):
        result = torchshear.compensate(
            cut.model, cut.small, cut.plan, loader, method, batches=N_BATCHES, progress=False
        )
        assert_finite_and_of_same_form(cut, result)
