"""NNI's AutoCompress pruner: rounds, shares, and the plan for the original."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import torchshear
from tests.searching.spaces import layers
from torchshear.compat.nni import AutoCompressPruner
from torchshear.errors import ArgumentError, KeywordError

torch.manual_seed(0)
X, LABELS = torch.randn(64, 8), torch.randint(0, 3, (64,))
HALF = [{"sparsity": 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["4"]}]


def network() -> nn.Sequential:
    return layers(8, 40, 24, 3)


def closeness(model: nn.Module) -> float:
    assert not model.training
    with torch.no_grad():
        return -float(functional.cross_entropy(model(X), LABELS))


def trainer_noting(calls: list[Any]) -> Any:
    def trainer(model: Any, optimizer: Any, criterion: Any, epoch: int, callback: Any) -> None:
        assert model.training
        calls.append((epoch, model[0].out_features, model[2].out_features))
        optimizer.zero_grad()
        criterion(model(X), LABELS).backward()
        callback()
        optimizer.step()

    return trainer


def quick(model: nn.Module, calls: list[Any], **words: Any) -> AutoCompressPruner:
    options = {"num_iterations": 3, "cool_down_rate": 0.3, "admm_num_iterations": 2, "admm_epochs_per_iteration": 3}
    return AutoCompressPruner(model, HALF, trainer_noting(calls), closeness, **options | words)


def test_rounds_and_shares() -> None:
    """P = .5 in 3 rounds: .2063, .3700 and .5 of 64 channels are gone in the end of each, rounded to what is left."""
    model, calls = network(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = quick(model, calls)
    small = pruner.compress()
    assert small is pruner.compress() is pruner.shrink().model
    assert len(pruner.searches) == 3
    assert pruner.found is pruner.searches[-1]
    left = [a + b for _, a, b in calls[::6]] + [small[0].out_features + small[2].out_features]
    assert left == [64, int(64 * 0.5 ** (1 / 3)), int(64 * 0.5 ** (2 / 3)), 32]
    assert [1 - 0.5 ** (number / 3) for number in (1, 2, 3)] == pytest.approx([0.2063, 0.3700, 0.5], abs=5e-5)
    assert [epoch for epoch, *_ in calls] == [0, 1, 2] * 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_plan_is_one_for_the_original() -> None:
    pruner = quick(network(), [])
    result = pruner.shrink()
    assert result.verification.max_error < 1e-12
    assert [len(group.kept) for group in result.plan.groups] == [
        result.model[0].out_features,
        result.model[2].out_features,
    ]
    again = torchshear.shrink(network(), result.plan)
    assert [tuple(one.shape) for one in again.parameters()] == [tuple(one.shape) for one in result.model.parameters()]
    assert result.report.before.n_params == sum(one.numel() for one in network().parameters())
    assert result.report.after.n_params == sum(one.numel() for one in result.model.parameters())


def test_the_rounds_by_hand() -> None:
    """One round is an annealing, a session with ADMM at the widths that it found, and what that session gives."""
    calls: list[Any] = []
    pruner = quick(network(), calls, num_iterations=1, row=0.5, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    small = pruner.compress()
    widths = pruner.searches[0].best.widths
    twin = network().train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    session = torchshear.PruningSession(
        twin,
        X[:2],
        ratio={name: 1 - kept / {"0.weight[0]": 40, "2.weight[0]": 24}[name] for name, kept in widths.items()},
        criterion="l1",
        group_reduction="filters",
        schedule=torchshear.schedules.OneShot(at=6, by="epoch"),
        regularizer=torchshear.regularizers.ADMM(rho=0.5, every=3, by="epoch"),
        optimizer=optimizer,
    )
    session.on_train_begin()
    for epoch in range(6):
        session.on_epoch_begin(epoch)
        session.on_step_begin()
        optimizer.zero_grad()
        (functional.cross_entropy(twin(X), LABELS) + session.penalty()).backward()
        session.on_before_optimizer_step()
        optimizer.step()
        session.on_after_optimizer_step()
        session.on_step_end()
        session.on_epoch_end()
    session.on_train_end()
    expected = session.finish().model
    for name, value in expected.state_dict().items():
        np.testing.assert_allclose(small.state_dict()[name], value, atol=1e-6)


def test_words_of_other_versions_and_files(tmp_path: Any) -> None:
    calls: list[Any] = []
    pruner = AutoCompressPruner(
        network(), HALF, trainer_noting(calls), closeness, X[:2], total_iteration=1, admm_num_iterations=1,
        admm_training_epochs=2, cool_down_rate=0.3, experiment_data_dir="./", optimize_mode="maximize",
    )  # fmt: skip
    pruner.export_model(tmp_path / "model.pth", tmp_path / "masks.safetensors", tmp_path / "model.onnx")
    assert [epoch for epoch, *_ in calls] == [0, 1]
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in pruner.compress().state_dict().items())


def idle(model: nn.Module) -> None:
    model(X)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"trainer": 3}, "trainer is int"),
        ({"evaluator": "accuracy"}, "evaluator is str"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"admm_num_iterations": 0}, "admm_num_iterations"),
        ({"row": -1.0}, "rho"),
        ({"base_algo": "level"}, "single weights"),
        ({"speed": 1}, "no argument 'speed'"),
        ({"make_optimizer": 3}, "make_optimizer is int"),
    ],
)
def test_what_means_nothing_is_refused(words: dict[str, Any], expected: str) -> None:
    given = {"trainer": idle, "evaluator": closeness} | words
    with pytest.raises((ArgumentError, KeywordError), match=expected):
        AutoCompressPruner(network(), HALF, **given)


def test_a_trainer_that_does_not_train() -> None:
    pruner = AutoCompressPruner(network(), HALF, idle, closeness, num_iterations=1, admm_num_iterations=1)
    with pytest.raises(ArgumentError, match="made no step with the optimizer"):
        pruner.compress()
