"""NNI's lottery ticket pruner, in rounds that the user trains."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.training.loops import images, perceptron, residual, sgd, vectors
from torchshear.compat.nni import LotteryTicketPruner
from torchshear.errors import ArgumentError
from torchshear.pruners import masks

CONFIG = [{"prune_iterations": 5, "sparsity": 0.8, "op_types": ["default"]}]
RATIOS = [0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8]  # 1 - 0.2^(k / 5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, n_steps: int = 3) -> None:
    model.train()
    for step in range(n_steps):
        x, target = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


@pytest.mark.parametrize("eager", [True, False])
def test_the_example_of_nni_runs_and_does_by_hand_the_same(eager: bool) -> None:
    """Without example inputs the first batch of the training is one."""
    model, hand = perceptron(), perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-2)
    pruner = LotteryTicketPruner(model, CONFIG, optimizer, **({"args": vectors(0)[0]} if eager else {}))
    assert pruner.compress() is model
    start = copy.deepcopy(hand.state_dict())
    kept = {name: torch.ones_like(one) for name, one in hand.named_parameters() if one.ndim == 2}
    assert list(pruner.get_prune_iterations()) == [0, 1, 2, 3, 4, 5]
    for number in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        for name, one in kept.items():
            weight = dict(hand.named_parameters())[name].detach() * one
            n_gone = int(one.numel() * RATIOS_EXACT[number] + 1e-9)
            flat = torch.ones(one.numel(), dtype=one.dtype)
            flat[weight.abs().flatten().argsort(stable=True)[:n_gone]] = 0
            kept[name] = flat.reshape(one.shape)
        hand.load_state_dict(start)
        by_hand = torch.optim.Adam(hand.parameters(), lr=1.2e-2)
        for step in range(3):
            x, target = vectors(step)
            for name, weight in hand.named_parameters():
                weight.data.mul_(kept.get(name, torch.ones_like(weight)))
            by_hand.zero_grad()
            functional.cross_entropy(hand(x), target).backward()
            for name, weight in hand.named_parameters():
                weight.grad.mul_(kept.get(name, torch.ones_like(weight)))
            by_hand.step()
        train(model, optimizer, vectors)
        for name, mask in laid(model).items():
            assert torch.equal(mask, kept[name].bool()), (number, name)
        for name, weight in hand.named_parameters():
            weight.data.mul_(kept.get(name, torch.ones_like(weight)))
        torch.testing.assert_close(model(vectors(9)[0]), hand(vectors(9)[0]), rtol=1e-10, atol=1e-12)
    assert [round(one.asked, 4) for one in pruner.history.renewals] == RATIOS
    x = vectors(9)[0]
    torch.testing.assert_close(pruner.shrink().model(x), hand(x), rtol=1e-9, atol=1e-11)
    with pytest.raises(ArgumentError, match="all 5 rounds behind round 0 have begun"):
        pruner.prune_iteration_start()


RATIOS_EXACT = [1 - 0.2 ** (number / 5) for number in range(6)]


def test_the_best_round_is_exported_with_the_weights_of_the_start(tmp_path: Any) -> None:
    """As NNI's example ends: masks of an earlier round, and the weights from before."""
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = copy.deepcopy(model.state_dict())
    pruner = LotteryTicketPruner(model, CONFIG, optimizer)
    pruner.compress()
    states = []
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        train(model, optimizer, vectors)
        states.append(copy.deepcopy(model.state_dict()))
    pruner.bound_model.load_state_dict(states[2])
    pruner.load_model_state_dict(start)
    pruner.export_model(tmp_path / "ticket.pth", tmp_path / "masks.safetensors")
    found = torch.load(tmp_path / "ticket.pth", weights_only=True)
    read = masks.Masks.load(tmp_path / "masks.safetensors").tensors
    for name, mask in read.items():
        assert int((~mask).sum()) == int(mask.numel() * RATIOS_EXACT[2] + 1e-9)
        assert torch.equal(found[name], start[name] * mask)
    assert torch.equal(found["0.bias"], start["0.bias"])
    ticket = pruner.shrink().model
    fresh = perceptron(1)
    fresh.load_state_dict(found)
    torch.testing.assert_close(ticket(vectors(9)[0]), fresh(vectors(9)[0]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="'0.bias' is missing in it"):
        pruner.load_model_state_dict({"0.weight": start["0.weight"]})


def test_optimizer_scheduler_and_buffers_are_set_back() -> None:
    model = residual()
    optimizer = sgd(model)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.1)
    pruner = LotteryTicketPruner(
        model,
        [{"prune_iterations": 2, "sparsity": 0.5, "op_types": ["Conv2d"]}],
        optimizer,
        scheduler,
        pruning_algorithm="l1",
        args=images(0)[0],
    )
    pruner.compress()
    widths, before = [], model.norm.running_mean.clone()
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        assert torch.equal(model.norm.running_mean, before)
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert not any(optimizer.state.values())
        train(model, optimizer, images)
        for _ in range(3):
            scheduler.step()
        assert not torch.equal(model.norm.running_mean, before)
        widths.append(int(laid(model)["stem.bias"].sum()))
    assert widths == [8, 6, 4]
    assert pruner.shrink().model.stem.out_channels == 4


def test_each_layer_has_the_shares_of_its_own_end() -> None:
    """1 - (1 - P)^(k / n) layer by layer, as NNI has it."""
    model = perceptron()
    config = [
        {"prune_iterations": 2, "sparsity": 0.75, "op_names": ["0"]},
        {"prune_iterations": 2, "sparsity": 0.36, "op_names": ["2"]},
    ]
    optimizer = sgd(model)
    pruner = LotteryTicketPruner(model, config, optimizer, args=vectors(0)[0])
    pruner.compress()
    counts = []
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        counts.append([int((~laid(model)[name]).sum()) for name in ("0.weight", "2.weight")])
        train(model, optimizer, vectors, 1)
    assert counts == [[0, 0], [64, int(192 * 0.2 + 1e-9)], [96, int(192 * 0.36 + 1e-9)]]


def test_without_resetting_the_trained_weights_stay() -> None:
    model = perceptron()
    pruner = LotteryTicketPruner(model, CONFIG, reset_weights=False, args=vectors(0)[0])
    pruner.compress()
    optimizer = sgd(model)
    for number in pruner.get_prune_iterations():
        before = copy.deepcopy(model.state_dict())["0.bias"] if number else None
        pruner.prune_iteration_start()
        assert before is None or torch.equal(model.state_dict()["0.bias"], before)
        train(model, optimizer, vectors, 1)
    assert [round(one.asked, 4) for one in pruner.history.renewals] == RATIOS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config_list": [{"sparsity": 0.5, "op_types": ["Linear"]}]}, "says no prune_iterations"),
        ({"config_list": [{**CONFIG[0], "op_names": ["0"]}, {**CONFIG[0], "op_names": ["2"], "prune_iterations": 3}]},
         "prune_iterations=3, and config_list\\[0\\] has 5"),
        ({"optimizer": None}, "sets the optimizer back"),
        ({"reset_weights": 2}, "reset_weights=2"),
        ({"lr_scheduler": 3}, "lr_scheduler is int"),
        ({"pruning_algorithm": "taylorfo"}, "looks at data"),
        ({"total_iteration": 3}, "optimizer= and total_iteration="),
        ({"evaluator": len}, "evaluator= and rounds that you train"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    model = perceptron()
    given: dict[str, Any] = {"config_list": CONFIG, "optimizer": sgd(model), "args": vectors(0)[0], **options}
    with pytest.raises(ArgumentError, match=said):
        LotteryTicketPruner(model, **given).compress()


def test_rounds_of_a_model_that_nobody_calls() -> None:
    model = perceptron()
    pruner = LotteryTicketPruner(model, CONFIG, sgd(model))
    pruner.compress()
    pruner.prune_iteration_start()
    with pytest.raises(ArgumentError, match="has not been called yet"):
        pruner.prune_iteration_start()
