"""NNI's ADMM pruner against its iterations written out by hand."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.loops import images, perceptron, residual, vectors
from torchshear.compat.nni import ADMMPruner
from torchshear.errors import ArgumentError
from torchshear.pruners import masks

LEVEL = [{"sparsity": 0.6, "op_types": ["Linear"]}]
RHO = 0.5


def with_callback(calls: list[Any]) -> Any:
    def trainer(model: Any, criterion: Any, optimizer: Any, epoch: int, callback: Any) -> None:
        calls.append((epoch, model.training))
        for step in range(2):
            x, target = vectors(step)
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            callback()
            optimizer.step()

    return trainer


def without_callback(calls: list[Any]) -> Any:
    def trainer(net: Any, opt: Any, loss: Any) -> None:  # as NNI 2.5 calls it, by place
        calls.append((None, net.training))
        for step in range(2):
            x, target = vectors(step)
            opt.zero_grad()
            loss(net(x), target).backward()
            opt.step()

    return trainer


def by_hand(n_iterations: int, n_epochs: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """SGD on loss + rho / 2 ||W - Z + U||^2; Z a copy of W at first, later the weights of greatest |W + U|."""
    model = perceptron()
    weights = {name: one for name, one in model.named_parameters() if one.ndim == 2}
    z = {name: one.detach().clone() for name, one in weights.items()}
    u = {name: torch.zeros_like(one) for name, one in z.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def nearest(value: torch.Tensor) -> torch.Tensor:
        flat = value.flatten().clone()
        flat[flat.abs().argsort(stable=True)[: int(flat.numel() * 0.6 + 1e-9)]] = 0
        return flat.reshape(value.shape)

    for _ in range(n_iterations):
        for _ in range(n_epochs):
            for step in range(2):
                x, target = vectors(step)
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), target)
                for name, one in weights.items():
                    loss = loss + RHO / 2 * (one - z[name] + u[name]).square().sum()
                loss.backward()
                optimizer.step()
        for name, one in weights.items():
            z[name] = nearest(one.detach() + u[name])
            u[name] = u[name] + one.detach() - z[name]
    return model, {name: nearest(one.detach()) != 0 for name, one in weights.items()}


@pytest.mark.parametrize("make", [with_callback, without_callback])
def test_iterations_are_those_by_hand(make: Any) -> None:
    """The penalty acts in the first iteration as well, where Z of NNI is W itself; it is a squared norm."""
    model, calls = perceptron(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = ADMMPruner(
        model, LEVEL, make(calls), num_iterations=3, training_epochs=2, row=RHO, base_algo="level", optimizer=optimizer
    )
    model.eval()
    assert pruner.compress() is model is pruner.compress()
    assert not model.training
    assert len(calls) == 6
    assert all(training for _, training in calls)
    if make is with_callback:
        assert [epoch for epoch, _ in calls] == [0, 1, 0, 1, 0, 1]
    hand, kept = by_hand(3, 2)
    for name, mask in masks.applied_masks(model).tensors.items():
        assert torch.equal(mask, kept[name])
    for number in (0, 2, 4):
        weight = model[number].parametrizations.weight.original
        torch.testing.assert_close(weight, hand[number].weight, rtol=1e-9, atol=1e-11)
        assert int((model[number].weight == 0).sum()) == int(weight.numel() * 0.6 + 1e-9)
    without_callback([])(model, optimizer, functional.cross_entropy)  # and on, with the same optimizer
    residuals = pruner.history.residuals
    assert len(residuals) == 3
    x = vectors(9)[0]
    torch.testing.assert_close(pruner.shrink().model(x), model(x), rtol=1e-12, atol=1e-12)


def test_one_iteration_differs_from_plain_training() -> None:
    """In the first iteration of NNI 2.0 the penalty is zero, since its Z is W itself."""
    trained, plain = by_hand(1, 3)[0], perceptron()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        without_callback([])(plain, optimizer, functional.cross_entropy)
    assert not torch.allclose(trained[0].weight, plain[0].weight, rtol=1e-6)


def test_channels_and_what_nni_trains_with() -> None:
    model, seen = residual(), {}

    def trainer(model: nn.Module, **given: Any) -> None:
        seen.update(given)
        for step in range(2):
            x, target = images(step)
            given["optimizer"].zero_grad()
            given["criterion"](model(x), target).backward()
            given["optimizer"].step()

    config = [{"sparsity": 0.5, "op_types": ["Conv2d"], "rho": 0.01}]
    pruner = ADMMPruner(model, config, trainer, iterations=2, epochs_per_iteration=1, granularity="coarse-grained")
    pruner.compress()
    group = seen["optimizer"].param_groups[0]
    assert (type(seen["optimizer"]), group["lr"], group["weight_decay"]) == (torch.optim.Adam, 1e-3, 5e-5)
    assert isinstance(seen["criterion"], nn.CrossEntropyLoss)
    assert seen["epoch"] == 0
    result = pruner.shrink()
    assert result.model.stem.out_channels == 4
    assert result.verification.max_error < 1e-12
    assert len(result.history.residuals) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # masked retraining, as NNI's pages say
    kept = model.state_dict()["norm.parametrizations.bias.0.mask"].clone()
    trainer(model, optimizer=optimizer, criterion=functional.cross_entropy)
    assert torch.equal(model.norm.bias != 0, kept)


def test_defaults_are_those_of_nni() -> None:
    parameters = inspect.signature(ADMMPruner).parameters
    assert list(parameters)[:7] == [
        "model", "config_list", "trainer", "num_iterations", "epochs_per_iteration", "row", "base_algo"]  # fmt: skip
    assert parameters["num_iterations"].default == 30
    assert parameters["base_algo"].default == "l1"
    calls: list[Any] = []

    def trainer(model: nn.Module, optimizer: Any) -> None:
        calls.append(1)
        model(vectors(0)[0]).sum().backward()
        optimizer.step()

    model = perceptron()
    pruner = ADMMPruner(model, LEVEL, trainer, num_iterations=1, base_algo="level")
    pruner.compress()
    assert len(calls) == 5
    assert "rho=0.0001" in repr(pruner._regularizer)


def ignoring(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    model(vectors(0)[0]).sum().backward()
    other.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trainer": None}, "trainer is NoneType"),
        ({"trainer": ignoring}, "made no step with the optimizer"),
        ({"trainer": lambda model, optimizer: None}, "has not been called yet"),
        ({"base_algo": "slim"}, "base_algo='slim'"),
        ({"granularity": "coarse"}, "granularity='coarse'"),
        ({"row": 0.1, "rho": 0.1}, "row and rho say the same"),
        ({"row": -1}, "row=-1; expected a positive number"),
        ({"training_epochs": 1, "epochs_per_iteration": 1}, "say the same"),
        ({"num_iterations": 0}, "num_iterations must be"),
        (
            {"num_iterations": torch.optim.SGD(perceptron().parameters()), "iterations": 2},
            "optimizer= and criterion= by",
        ),
        ({"config_list": [{**LEVEL[0], "rho": 1.0}], "row": 0.1}, "row and rho in the entries"),
        ({"total_iteration": 3}, "no argument 'total_iteration'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"config_list": LEVEL, "trainer": with_callback([]), "base_algo": "level", **options}
    with pytest.raises(ArgumentError, match=said):
        ADMMPruner(perceptron(), **given).compress()
