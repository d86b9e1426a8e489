"""Forms of every small network of the registry: its own class where that can be, and a graph that computes the same."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import Network, randomise, third
from tests.oracle import assert_is_slice, assert_same_function
from torchshear import PruningPlan
from torchshear.speedup import TracedModule, shrink_to_form


@dataclass(frozen=True, slots=True)
class Forms:
    """A network, a plan that cuts half of it, and what that makes.

    Attributes:
        network: of the registry.
        model: the one that was cut.
        plan: the plan.
        traced: the graph that the plan makes of the model.
        found: the form that is found for a model of other weights, by the plan from a file; it has loaded the weights
            of `traced` from a file.
        reason: for that form.
    """

    network: Network
    model: nn.Module
    plan: PruningPlan
    traced: nn.Module
    found: nn.Module
    reason: str


@pytest.fixture(scope="module", params=third(0))
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    model, args, kwargs = request.param.build()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs)), ratio=0.5)
    traced = shrink_to_form(model, plan, form="traced", verify=False).model
    folder = tmp_path_factory.mktemp(request.param.name)
    plan.save(folder / "plan.json")
    torch.save(traced.state_dict(), folder / "weights.pt")
    other = randomise(request.param.build()[0], seed=99)
    found = shrink_to_form(other, PruningPlan.load(folder / "plan.json"), verify=False)
    found.model.load_state_dict(torch.load(folder / "weights.pt"))
    return Forms(request.param, model, plan, traced, found.model, found.reason)


def test_its_own_class_is_kept_unless_its_code_holds_sizes(forms: Forms) -> None:
    model, is_traced = forms.model, "traced" in forms.network.tags
    assert type(forms.found) is (TracedModule if is_traced else type(model))
    assert forms.reason or not is_traced
    assert type(forms.traced) is TracedModule
    for small in (forms.found, forms.traced):
        assert_is_slice(model, small, forms.plan)
        assert len(list(small.parameters())) == len(list(model.parameters())), "a tied weight was duplicated"


def test_both_forms_compute_the_same(forms: Forms) -> None:
    _, args, kwargs = forms.network.build()
    assert_same_function(forms.found, forms.traced, args, kwargs, rtol=1e-12)
    for is_training in (False, True):
        found, traced = (_run(small, args, kwargs, is_training) for small in (forms.found, forms.traced))
        torch.testing.assert_close(traced, found, rtol=1e-9, atol=1e-10)


def _run(small: nn.Module, args: tuple, kwargs: dict, is_training: bool) -> tuple:
    """Outputs, gradients and what is left in the state, after one call of a copy with the same chance."""
    small, (args, kwargs) = copy.deepcopy(small).train(is_training), copy.deepcopy((args, kwargs))
    torch.manual_seed(0)
    outputs = small(*args, **kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    sum(leaf.square().sum() for leaf in leaves).backward()
    gradients = {name: parameter.grad for name, parameter in small.named_parameters()}
    return outputs, gradients, dict(small.state_dict())
