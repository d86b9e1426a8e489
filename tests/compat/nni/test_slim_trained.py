"""NNI's slim pruner with the training that makes its scales small."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.loops import images, residual, sgd
from torchshear.compat.nni import SlimPruner
from torchshear.errors import ArgumentError, KeywordError
from torchshear.pruners import masks

CONFIG = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]


def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
    assert model.training
    for step in range(2):
        x, target = images(2 * epoch + step)
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("eager", [True, False])
def test_scales_are_pressed_as_by_hand_and_masks_lie_on_the_very_model(eager: bool) -> None:
    """The gradient of each gamma gets scale * sign(gamma); then the least of all go, over both norms."""
    model, hand = residual(), residual()
    with torch.no_grad():
        for one in (model, hand):
            one.scale.weight[:3] = 1e-3
            one.norm.weight[0] = 0.0
    given: dict[str, Any] = {"optimizer": sgd(model), "criterion": functional.cross_entropy, "trainer": trainer}
    given |= {"args": images(0)[0]} if eager else {}
    pruner = SlimPruner(model, CONFIG, sparsifying_training_epochs=2, scale=0.05, **given)
    by_hand = sgd(hand)
    hand.train()
    for step in range(4):
        x, target = images(step)
        by_hand.zero_grad()
        functional.cross_entropy(hand(x), target).backward()
        for norm in (hand.norm, hand.scale):
            norm.weight.grad += 0.05 * norm.weight.detach().sign()
        by_hand.step()
    model.eval()
    assert pruner.compress() is model is pruner.compress()
    assert not model.training
    sizes = torch.cat([hand.norm.weight.detach().abs(), hand.scale.weight.detach().abs()])
    gone = set(sizes.argsort(stable=True)[:10].tolist())
    found = masks.applied_masks(model).tensors
    assert {c for c in range(8) if not found["norm.weight"][c]} == {c for c in gone if c < 8}
    assert {c for c in range(12) if not found["scale.weight"][c]} == {c - 8 for c in gone if c >= 8}
    for name in ("norm", "scale"):
        pressed = getattr(model, name).parametrizations.weight.original
        torch.testing.assert_close(pressed, getattr(hand, name).weight, rtol=1e-9, atol=1e-11)
    result = pruner.shrink()
    x = images(0)[0]
    torch.testing.assert_close(result.model.eval()(x), model(x), rtol=1e-12, atol=1e-12)
    given["optimizer"].zero_grad()
    model.train()(x).sum().backward()
    given["optimizer"].step()  # the penalty is over, and masks hold
    model.eval()
    torch.testing.assert_close(pruner.shrink().model.eval()(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_penalty_makes_a_difference_and_none_is_left_behind() -> None:
    model = residual()
    optimizer = sgd(model)
    pruner = SlimPruner(model, CONFIG, trainer=trainer, optimizer=optimizer, criterion=functional.cross_entropy,
                        training_epochs=1, dummy_input=images(0)[0])  # fmt: skip
    before = len(optimizer._optimizer_step_pre_hooks)
    pruner.compress()
    assert len(optimizer._optimizer_step_pre_hooks) == before == 0


def test_files_of_a_trained_pruner(tmp_path: Any) -> None:
    model = residual()
    pruner = SlimPruner(model, CONFIG, trainer=trainer, optimizer=sgd(model), criterion=functional.cross_entropy,
                        training_epochs=1)  # fmt: skip
    pruner.export_model(tmp_path / "model.pth", tmp_path / "masks.safetensors")
    fresh = residual(1)
    fresh.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    x = images(0)[0]
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_without_a_trainer_a_copy_is_masked_as_ever() -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    pruner = SlimPruner(model, CONFIG, args=images(0)[0])
    assert pruner.compress() is not model
    assert list(model.state_dict()) == list(before)


def idle(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
    model(images(0)[0])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"optimizer": None}, ArgumentError, "trains with an optimizer"),
        ({"trainer": None}, ArgumentError, "optimizer= goes with trainer="),
        ({"trainer": 3}, ArgumentError, "trainer is int"),
        ({"trainer": lambda model, optimizer: None}, ArgumentError, "does not call the model"),
        ({"trainer": idle}, ArgumentError, "made no step"),
        ({"training_epochs": 1, "sparsifying_training_epochs": 1}, ArgumentError, "say the same"),
        ({"training_epochs": 0}, ArgumentError, "training_epochs must be"),
        ({"scale": -1.0}, ArgumentError, "coefficient=-1.0"),
        ({"args": sgd(residual())}, ArgumentError, "args is SGD.*by name"),
        ({"mode": "global"}, KeywordError, "no argument 'mode'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = residual()
    given: dict[str, Any] = {"trainer": trainer, "optimizer": sgd(model), "criterion": functional.cross_entropy}
    with pytest.raises(error, match=said):
        SlimPruner(model, CONFIG, **(given | options)).compress()
    assert list(model.state_dict()) == list(residual().state_dict())
