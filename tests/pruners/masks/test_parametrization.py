"""Masks on a model: training, copies, checkpoints, two processes, half precision, and taking them off."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import torchshear
from tests.networks import Residual, Tied, image, randomise
from tests.processes import end_together
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners import masks as m


def network() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)))


def masked() -> tuple[nn.Module, m.Masks]:
    net = network()
    masks = m.choose_masks(net, "1xchannel", 0.5)
    m.apply(net, masks)
    return net, masks


def by_hand(net: nn.Module, masks: m.Masks) -> nn.Module:
    """A copy with zeros written where masks are."""
    zeroed = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.tensors.items():
            zeroed.get_parameter(name).mul_(mask)
    return zeroed


def test_the_masked_model_computes_with_zeros() -> None:
    net, masks = masked()
    assert set(masks.tensors) == {"0.weight", "0.bias", "3.weight"}
    x = image()
    for is_training in (True, False):
        expected = by_hand(network(), masks).train(is_training)(x)
        assert torch.equal(net.train(is_training)(x), expected)
        net[1].load_state_dict(network()[1].state_dict())
    assert isinstance(net[0].parametrizations.weight[0], m.Mask)


def test_gradients_are_zero_at_masked_positions_and_dense_weights_stay() -> None:
    net, masks = masked()
    dense = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(image()).square().sum().backward()
    grad = net[0].parametrizations.weight.original.grad
    assert (grad[~masks.tensors["0.weight"]] == 0).all()
    assert (grad[masks.tensors["0.weight"]] != 0).all()
    optimizer.step()
    gone = ~masks.tensors["0.weight"]
    assert torch.equal(net[0].parametrizations.weight.original[gone], dense[0].weight[gone])
    assert (net[0].weight[gone] == 0).all()


def test_a_masked_weight_that_is_infinite_gives_zero() -> None:
    net, masks = masked()
    with torch.no_grad():
        net[0].parametrizations.weight.original[~masks.tensors["0.weight"]] = torch.inf
    assert torch.isfinite(net.eval()(image())).all()


def test_deepcopy_and_state_dict() -> None:
    net, masks = masked()
    net.eval()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(image()), net(image()))
    twin[0].parametrizations.weight[0].mask.fill_(True)
    assert not net[0].parametrizations.weight[0].mask.all(), "the copy has masks of its own"
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = randomise(network(), seed=9)
    m.apply(fresh, m.choose_masks(fresh, "1xchannel", 0.25))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.eval()(image()), net(image()))
    found = m.applied_masks(fresh)
    assert found.tensors.keys() == masks.tensors.keys()
    assert all(torch.equal(found.tensors[name], mask) for name, mask in masks.tensors.items())


def test_a_copy_does_not_follow_what_becomes_of_the_original() -> None:
    net = randomise(nn.Linear(4, 4))
    x = torch.ones(1, 4)
    m.apply(net, m.choose_masks(net, "channelx1", 0.5))
    first, second = copy.deepcopy(net), copy.deepcopy(net)
    expected = net(x)
    m.apply(net, m.choose_masks(net, "1xchannel", 0.5))
    assert torch.equal(first(x), expected)
    m.remove(net)
    m.make_permanent(first)
    assert torch.equal(first(x), expected)
    assert torch.equal(second(x), expected)
    assert type(net) is type(first) is nn.Linear
    assert type(second).__name__ == "ParametrizedLinear"


@pytest.mark.parametrize("pattern", ["1x1", "1xchannel"])
@pytest.mark.parametrize("take_off", [m.make_permanent, m.remove])
def test_permanent_and_removed_models_are_what_they_were_before(take_off: Callable, pattern: str) -> None:
    net = network()
    masks = m.choose_masks(net, pattern, 0.5)
    parameters = {id(parameter) for parameter in net.parameters()}
    m.apply(net, masks)
    take_off(net)
    expected = by_hand(network(), masks) if take_off is m.make_permanent else network()
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    assert {id(parameter) for parameter in net.parameters()} == parameters, "optimizers know them still"
    assert list(net.state_dict()) == list(expected.state_dict()), "the order too, which optimizers save by"
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in net.state_dict().items())
    graphs = [torchshear.trace(one, (image(),)) for one in (net, expected)]
    assert graphs[0].fingerprint == graphs[1].fingerprint
    with pytest.raises(MaskError, match="no masks lie on this model"):
        take_off(net)


@pytest.mark.parametrize("existing", ["multiply", "replace"])
def test_a_second_mask(existing: str) -> None:
    net = randomise(nn.Linear(4, 4))
    rows, columns = m.choose_masks(net, "1xchannel", 0.5), m.choose_masks(net, "channelx1", 0.5)
    m.apply(net, rows)
    buffer = net.parametrizations.weight[0].mask
    m.apply(net, columns, existing)
    assert len(net.parametrizations.weight) == 1
    assert net.parametrizations.weight[0].mask is buffer
    both = columns.tensors["weight"] & (rows.tensors["weight"] if existing == "multiply" else True)
    assert torch.equal(buffer, both)
    assert torch.equal(net.parametrizations.bias[0].mask, rows.tensors["bias"])
    m.remove(net)
    assert list(net._parameters) == ["weight", "bias"]


def test_tied_weights_have_one_mask() -> None:
    net = randomise(Tied()).double().eval()
    tokens = torch.arange(11)[None]
    masks = m.choose_masks(net, "1x1", 0.5)
    expected = by_hand(net, masks)
    assert expected.head.weight is expected.embedding.weight
    m.apply(net, masks)
    assert torch.equal(net(tokens), expected(tokens))
    assert net.head.parametrizations.weight[0] is net.embedding.parametrizations.weight[0]
    m.apply(net, m.choose_masks(net, "1x1", 0.8, previous=masks))
    assert torch.equal(net.head.weight, net.embedding.weight)
    twin = copy.deepcopy(net)
    assert twin.head.parametrizations.weight.original is twin.embedding.parametrizations.weight.original
    assert torch.equal(twin(tokens), net(tokens))
    for one in (net, twin):
        before = one(tokens)
        m.make_permanent(one)
        assert one.head.weight is one.embedding.weight
        assert torch.equal(one(tokens), before)
    kept = {"head.weight": torch.ones(11, 16, dtype=torch.bool), "embedding.weight": torch.zeros(11, 16).bool()}
    with pytest.raises(MaskError, match="'embedding.weight' and 'head.weight'"):
        m.apply(net, m.Masks.of(kept))


def test_a_module_under_two_names() -> None:
    layer = randomise(nn.Linear(4, 4))
    net = nn.ModuleDict({"one": layer, "two": layer})
    m.apply(net, m.choose_masks(net, layers=["one"]))
    assert len(layer.parametrizations.weight) == 1
    with pytest.raises(ArgumentError, match="layer 'two' is not one"):
        m.choose_masks(net, layers=["two"])


def test_autocast() -> None:
    net, masks = masked()
    expected = by_hand(network(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = net(image()), expected(image())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    found.float().sum().backward()
    gone = ~masks.tensors["3.weight"]
    assert (net[3].parametrizations.weight.original.grad[gone] == 0).all()


def test_other_types() -> None:
    net, masks = masked()
    for dtype in (torch.float64, torch.bfloat16):
        net.to(dtype)
        assert net[0].weight.dtype == dtype
        assert net[0].parametrizations.weight[0].mask.dtype == torch.bool
        assert (net[0].weight[~masks.tensors["0.weight"]] == 0).all()


def test_a_masked_model_is_captured_and_exported_as_what_it_computes() -> None:
    net = randomise(Residual()).double().eval()
    m.apply(net, m.choose_masks(net, "1x1", 0.5))
    exported = torch.export.export(net, (image().double(),), strict=False).module()
    assert torch.equal(exported(image().double()), net(image().double()))
    m.make_permanent(net)
    small = torchshear.prune(net, (image().double(),), ratio=0.25).model
    assert small.stem.weight.shape == (6, 3, 3, 3)


def _train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, masks = masked()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step in range(3):
        if step == 1:
            m.apply(net, m.choose_masks(net, "1xchannel", 0.75, previous=masks))
        optimizer.zero_grad()
        wrapped(image(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    end_together(folder)


@pytest.mark.zoo
def test_two_processes_train_one_masked_model(tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first.items():
        if "running" not in name:
            assert torch.equal(value, second[name]), name
    mask = first["0.parametrizations.weight.0.mask"]
    assert (~mask.flatten(1).any(1)).sum() == 6
    dense = network()[0].weight
    assert torch.equal(
        first["0.parametrizations.weight.original"][~masked()[1].tensors["0.weight"]],
        dense[~masked()[1].tensors["0.weight"]],
    )


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.wieght": bools(8, 3, 3, 3)}, "name '0.wieght', which is no parameter.* Close to it: 0.weight"),
        ({"0.weight": bools(8, 3, 3, 3), "3.bias": bools(4)}, "'3.bias' is missing in its module or is computed"),
        ({"0.weight": bools(8, 3, 3, 3), "3.weight": bools(4, 8)}, r"'3.weight' is torch.bool of shape \(4, 8\)"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(tensors: dict[str, torch.Tensor], message: str) -> None:
    net = network()
    with pytest.raises(MaskError, match=message):
        m.apply(net, m.Masks.of(tensors))
    assert not any(parametrize.is_parametrized(module) for module in net.modules())


def test_bad_arguments() -> None:
    net, masks = masked()
    with pytest.raises(ArgumentError, match="existing='add'.*'multiply', 'replace'"):
        m.apply(net, masks, "add")
    with pytest.raises(ArgumentError, match="existing=.*ndarray"):
        m.apply(net, masks, np.zeros((2, 3)))
    with pytest.raises(ArgumentError, match="model is int"):
        m.apply(3, masks)
    with pytest.raises(MaskError, match="'0.weight' is on the meta device"):
        m.apply(network().to("meta"), masks)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(MaskError, match="'0.weight' is missing"):
        m.apply(normed, m.Masks.of({"0.weight": bools(3, 3)}))
