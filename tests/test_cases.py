"""Every small model that breaks pruners: pruned by half, cut at random, and pruned twice."""

import copy

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import torchshear
from tests.cases import CASES, Case
from tests.oracle import (
    assert_equals_masked,
    assert_is_slice,
    assert_outputs_equal,
    check_random_pruning,
    fingerprint,
    n_elements,
)
from torchshear.errors import TorchshearError

PRUNABLE = [case for case in CASES if case.expect != "refused"]
REFUSED = [case for case in CASES if case.expect == "refused"]


def _named(number: int, name: str) -> Case:
    return next(case for case in CASES if (case.number, case.name) == (number, name))


def test_case_names_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.number for case in CASES} == set(range(42))


@pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: case.id)
def test_half_is_pruned(case: Case) -> None:
    model, args, kwargs = case.build()
    before = fingerprint(model)
    result = torchshear.prune(model, args=args, kwargs=kwargs, criterion="l1", ratio=0.5)
    assert fingerprint(model) == before
    assert n_elements(result.model) < n_elements(model), "nothing was cut"
    assert_is_slice(model, result.model, result.plan)
    if case.expect == "exact":
        assert_equals_masked(model, result.model, result.plan, args, kwargs)
    assert_same_output_shapes(model, result.model, args, kwargs)


def assert_same_output_shapes(model: torch.nn.Module, small: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    leaves, spec = pytree.tree_flatten(model(*args, **kwargs))
    small_leaves, small_spec = pytree.tree_flatten(small(*args, **kwargs))
    assert spec == small_spec
    for leaf, small_leaf in zip(leaves, small_leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert (leaf.shape, leaf.dtype) == (small_leaf.shape, small_leaf.dtype)
            assert torch.isfinite(small_leaf).all()
        else:
            assert leaf == small_leaf


@pytest.mark.parametrize("kept_seed", [0, 1])
@pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: case.id)
def test_random_units_are_cut(case: Case, kept_seed: int) -> None:
    model, args, kwargs = case.build()
    check_random_pruning(model, args, kwargs, kept_seed, is_cross_channel=case.expect == "mixed")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refusal_gives_its_reason_and_changes_nothing(case: Case) -> None:
    model, args, kwargs = case.build()
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
    assert f"aten.{case.name}" in said, "the operator that forbids it is named"
    assert fingerprint(model) == before


ITERATED = [
    _named(6, "split_iterated"),
    _named(5, "c2f"),
    _named(0, "residual"),
    _named(0, "grouped_bottleneck"),
    _named(8, "shuffle_view"),
    _named(17, "qkv_unbind_sdpa"),
    _named(39, "pad_shortcut"),
]


@pytest.mark.parametrize("case", ITERATED, ids=lambda case: case.id)
def test_pruning_a_pruned_model_again(case: Case) -> None:
    model, args, kwargs = case.build()
    for _ in range(3):
        result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.25)
        assert n_elements(result.model) < n_elements(model)
        assert_equals_masked(model, result.model, result.plan, args, kwargs)
        model = result.model


def test_gated_unit_loses_what_was_asked() -> None:
    for case in (_named(41, "glu_chunk"), _named(41, "swiglu"), _named(13, "glu_module")):
        model, args, kwargs = case.build()
        result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5)
        first = next(name for name, parameter in model.named_parameters() if parameter.ndim > 1)
        kept = result.plan.masks()[first].flatten(1).any(1)
        half = kept.numel() // 2
        assert kept[:half].sum() == half // 2, "half was asked"
        assert torch.equal(kept[:half], kept[half:]), "a value goes with its gate"


def test_ties_and_frozen_flags_survive() -> None:
    for name in ("tied_embedding", "tied_convolutions"):
        model, args, kwargs = _named(28, name).build()
        small = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5).model
        assert len(list(small.parameters())) == len(list(model.parameters())), "a tied weight was duplicated"
    model, args, kwargs = _named(26, "frozen_backbone").build()
    small = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5).model
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == flags


def test_heads_and_head_widths_are_separate_groups_of_one_weight() -> None:
    model, args, _ = _named(17, "qkv_unbind_sdpa").build()
    groups = torchshear.analyze(torchshear.trace(model, args=args))
    widths = sorted(group.width for group in groups if group.is_prunable)
    # Heads, head width, stream. Values are as wide as queries and keys: one reshape gives all three their width.
    assert widths == [4, 6, 24]


def test_a_call_that_fails_is_reported_with_its_own_error() -> None:
    model, args, kwargs = _named(40, "several_inputs").build()
    before = fingerprint(model)
    wrong = {**kwargs, "context": torch.zeros(2, 7, 16, 16, dtype=torch.float64)}
    with pytest.raises(TorchshearError, match="7"):
        torchshear.prune(model, args=args, kwargs=wrong)
    with pytest.raises(TorchshearError, match="scale"):
        torchshear.prune(model, args=args)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", [_named(0, "residual"), _named(39, "pad_shortcut")], ids=lambda case: case.id)
def test_pruned_model_trains(case: Case) -> None:
    model, args, kwargs = case.build()
    small = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5).model.train()
    before = copy.deepcopy(small.state_dict())
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    small(*args, **kwargs).square().mean().backward()
    optimiser.step()
    after = small.state_dict()
    moved = [name for name, tensor in after.items() if not np.array_equal(tensor.numpy(), before[name].numpy())]
    assert {name.split(".")[-1] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
