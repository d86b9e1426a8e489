"""Example inputs as plain data: what exercises a model survives the file, and damage is found."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch

from torchshear.graph import ExampleInputs


def again(*args: Any, **kwargs: Any) -> ExampleInputs:
    """Inputs after a way through JSON."""
    return ExampleInputs.from_json(json.loads(json.dumps(ExampleInputs(args, kwargs).to_json())))


def test_integers_and_truth_values_come_back_as_they_were() -> None:
    tokens, mask = torch.randint(50, (2, 9)), torch.rand(3, 1, 4) > 0.5
    bounds = torch.tensor([-(2**63), 2**63 - 1])
    made = again(tokens, (mask, [bounds, None]), length=torch.tensor(7, dtype=torch.int32), flag=True)
    assert torch.equal(made.args[0], tokens)
    assert torch.equal(made.args[1][0], mask)
    assert torch.equal(made.args[1][1][0], bounds)
    assert made.kwargs["length"].dtype == torch.int32
    assert made.kwargs["length"].shape == ()
    assert int(made.kwargs["length"]) == 7
    assert made.kwargs["flag"] is True


def test_values_that_are_too_many_are_drawn_in_their_range() -> None:
    tokens, mask = torch.randint(-3, 50, (2, 4096)), torch.rand(5000) > 0.5
    text = json.dumps(ExampleInputs((tokens, mask), {}).to_json())
    assert len(text) < 200
    made = again(tokens, mask)
    assert (int(made.args[0].min()), int(made.args[0].max())) == (-3, 49)
    assert made.args[0].shape == (2, 4096)
    assert made.args[1].unique().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_other_numbers_are_random_and_each_time_alike(dtype: torch.dtype) -> None:
    x = torch.zeros(40, 50, dtype=dtype)
    one, two = again(x, y=x), again(x, y=x)
    assert one.args[0].dtype == dtype
    assert torch.equal(one.args[0], two.args[0])
    assert not torch.equal(one.args[0], one.kwargs["y"])
    assert abs(float(one.args[0].to(torch.complex64).abs().square().mean()) - 1) < 0.1
    before = torch.random.get_rng_state()
    again(x)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_made_on_the_meta_device() -> None:
    description = ExampleInputs((torch.zeros(2, 3), torch.tensor([1, 2])), {}).to_json()
    assert description is not None
    description["args"][0]["tensor"] = [2**40, 2**20]
    made = ExampleInputs.from_json(description, "meta")
    assert all(tensor.is_meta for tensor in made.tensors())
    assert made.args[0].shape == (2**40, 2**20)


def test_dictionaries_keep_their_order_and_kind() -> None:
    made = again(OrderedDict(b=torch.tensor(1), a={"c": (2, 3.5, "x")}))
    assert type(made.args[0]) is OrderedDict
    assert list(made.args[0]) == ["b", "a"]
    assert made.args[0]["a"] == {"c": (2, 3.5, "x")}


def test_inputs_without_values_are_described_as_well() -> None:
    made = again(torch.empty(0, 3, dtype=torch.long), torch.empty(2, dtype=torch.long, device="meta"))
    assert made.args[0].shape == (0, 3)
    assert made.args[1].tolist() == [0, 0]


TENSOR = {"tensor": [2], "dtype": "int64", "values": "3 4"}


@pytest.mark.parametrize(
    "damage",
    [
        {"tensor": [3]},
        {"tensor": [-2]},
        {"tensor": ["2"]},
        {"tensor": 2},
        {"dtype": "nn"},
        {"dtype": 3},
        {"dtype": "bool"},
        {"dtype": "int8", "values": "3 400"},
        {"values": "3 x"},
        {"values": [3, 4]},
        {"values": ""},
    ],
)
def test_damage_is_found(damage: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        ExampleInputs.from_json({"args": [{**TENSOR, **damage}], "kwargs": {"dict": {}}}, "meta")


@pytest.mark.parametrize("damage", [{"low": 5, "high": 4}, {"low": True, "high": 4}, {"low": 0, "high": 2**64}])
def test_a_damaged_range_is_found(damage: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        ExampleInputs.from_json({"args": [{"tensor": [2], "dtype": "int64", **damage}], "kwargs": {"dict": {}}})


@pytest.mark.parametrize("document", [{"args": [], "kwargs": 5}, {"args": [{}], "kwargs": {"dict": {}}}, {"args": []}])
def test_a_damaged_description_is_found(document: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        ExampleInputs.from_json(document)
