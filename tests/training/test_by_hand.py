"""Training with a session equals a loop in which masks are written by hand: parameters after every step, in float64."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import torchshear
from tests.training.loops import adam, images, perceptron, residual, sgd, steps_of, vectors
from torchshear.pruners.schedules import AGP, Linear

N_STEPS = 10
Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def agp(step: int, final: float) -> float:
    """AGP from 2 to 8, every 2 steps, written out."""
    if step < 2:
        return 0.0
    t = min((step - 2) // 2, 3) / 3
    return final * (1 - (1 - t) ** 3)


class ByHand:
    """The residual network with masks that are written out, channel by channel.

    Its sum of two layers has 8 channels, read by `last`; `last` has 12, read by `head`. Scores of a channel are over
    its filters and the scale of its norm.
    """

    own = (("stem.weight", "norm.weight", "side.weight"), ("last.weight", "scale.weight"))
    rows = (("stem.weight", "stem.bias", "norm.weight", "norm.bias", "side.weight"),
            ("last.weight", "last.bias", "scale.weight", "scale.bias"))  # fmt: skip
    columns = ("last.weight", "head.weight")

    def __init__(self, optimize: Optimize, criterion: str) -> None:
        self.model, self.criterion = residual(), criterion
        self.optimizer = optimize(self.model)
        self.gone: list[list[int]] = [[], []]
        self.sums = {name: torch.zeros_like(one) for name, one in self.model.named_parameters()}

    def masked(self) -> dict[str, Tensor]:
        found = {name: one.clone() for name, one in self.model.named_parameters()}
        for gone, rows, columns in zip(self.gone, self.rows, self.columns, strict=True):
            for name in rows:
                found[name] = found[name] * self._without(len(found[name]), gone).reshape(
                    -1, *[1] * (found[name].ndim - 1)
                )
            line = self._without(found[columns].shape[1], gone)
            found[columns] = found[columns] * line.reshape(1, -1, *[1] * (found[columns].ndim - 2))
        return found

    @staticmethod
    def _without(width: int, gone: list[int]) -> Tensor:
        line = torch.ones(width, dtype=torch.float64)
        line[gone] = 0
        return line

    def renew(self, step: int) -> None:
        values = self.masked() if self.criterion == "l1" else self.sums
        for number, names in enumerate(self.own):
            scores = sum(values[name].detach().abs().flatten(1).sum(1) if values[name].ndim > 1
                         else values[name].detach().abs() for name in names)  # fmt: skip
            order = sorted(range(len(scores)), key=lambda c: (c not in self.gone[number], float(scores[c]), -c))
            self.gone[number] = order[: int(len(scores) * agp(step, 0.5) + 1e-9)]
        if self.criterion == "taylor":
            self.sums = {name: torch.zeros_like(one) for name, one in self.sums.items()}

    def step(self, step: int) -> Tensor:
        if step in (2, 4, 6, 8):
            if step > 2:
                self.renew(step)
            elif self.criterion == "taylor":
                self.sums = {name: torch.zeros_like(one) for name, one in self.sums.items()}
        x, target = images(step)
        masked = self.masked()
        loss = functional.cross_entropy(functional_call(self.model, masked, (x,)), target)
        loss.backward()
        for name, one in self.model.named_parameters():
            product = (one * one.grad).detach()
            if self.criterion == "taylor":
                self.sums[name] += product**2
            else:
                self.sums[name] = 0.9 * self.sums[name] + product.abs()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("parametrizations.", "").replace(".original", ""): one.detach()
        for name, one in model.named_parameters()
    }


@pytest.mark.parametrize("optimize", [sgd, adam])
@pytest.mark.parametrize("criterion", ["l1", "taylor", "snip_momentum"])
def test_channels_step_by_step(optimize: Optimize, criterion: str) -> None:
    model, hand = residual(), ByHand(optimize, criterion)
    optimizer = optimize(model)
    session = torchshear.PruningSession(
        model, images(0)[0], ratio=0.5, criterion=criterion, schedule=AGP(start=2, end=8, frequency=2),
        optimizer=optimizer,
    )  # fmt: skip
    for step in steps_of(session, model, optimizer, images, N_STEPS):
        loss = hand.step(step)
        assert session.history.losses[-1] == pytest.approx(float(loss), rel=1e-12)
        own = parameters(model)
        for name, expected in hand.model.named_parameters():
            torch.testing.assert_close(own[name], expected.detach(), rtol=1e-10, atol=1e-13)
    assert [len(gone) for gone in hand.gone] == [4, 6]
    small = session.finish().model.eval()
    assert small.stem.weight.shape[0] == 4
    assert small.last.weight.shape == (6, 4, 3, 3)
    x, _ = images(99)
    expected = functional_call(hand.model.eval(), hand.masked(), (x,))
    torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-12)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask without the lowest; of equal ones the later."""
    flat = scores.flatten().tolist()
    gone = sorted(range(len(flat)), key=lambda i: (flat[i], -i))[:count]
    mask = torch.ones(len(flat), dtype=torch.float64)
    mask[gone] = 0
    return mask.reshape(scores.shape)


def by_hand_weights(scores: Mapping[str, Tensor], ratio: float, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, score in scores.items():
        kept = score.masked_fill(before[name] == 0, -1.0)
        found[name] = lowest(kept, int(score.numel() * ratio + 1e-9))
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "gradient"])
def test_single_weights_step_by_step(criterion: str, soft: bool) -> None:
    model, hand = perceptron(), perceptron()
    optimizer, other = sgd(model, 0.3), sgd(hand, 0.3)
    session = torchshear.PruningSession(
        model, vectors(0)[0], pattern="1x1", ratio=0.6, criterion=criterion, soft=soft,
        schedule=Linear(start=1, end=7, frequency=3), optimizer=optimizer,
    )  # fmt: skip
    names = [f"{i}.weight" for i in (0, 2, 4)]
    masks = {name: torch.ones_like(hand.get_parameter(name)) for name in names}
    sums = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    came_back = 0
    for step in steps_of(session, model, optimizer, vectors, N_STEPS):
        if step in (1, 4, 7):
            dense = {name: hand.get_parameter(name).detach().abs() for name in names}
            none = {name: torch.ones_like(mask) for name, mask in masks.items()}
            scores = dense if criterion == "magnitude" else sums
            new = by_hand_weights(scores, {1: 0, 4: 0.3, 7: 0.6}[step], none if soft else masks)
            came_back += sum(int(((masks[name] == 0) & (new[name] == 1)).sum()) for name in names)
            masks = new
            sums = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        x, target = vectors(step)
        values = dict(hand.named_parameters())
        masked = {name: values[name] * masks[name] for name in names}
        if soft:  # the gradient by the masked weight goes to the dense one
            masked = {name: one.detach().requires_grad_() for name, one in masked.items()}
        functional.cross_entropy(functional_call(hand, masked, (x,)), target).backward()
        for name in names:
            values[name].grad = masked[name].grad if soft else values[name].grad
            product = (values[name] * values[name].grad).detach().abs()
            sums[name] += values[name].grad.abs() if criterion == "gradient" else product
        other.step()
        other.zero_grad()
        own = parameters(model)
        for name, expected in hand.named_parameters():
            torch.testing.assert_close(own[name], expected.detach(), rtol=1e-10, atol=1e-13)
    assert (came_back > 0) == soft
    result = session.finish()
    for name in names:
        assert int((result.model.get_parameter(name) == 0).sum()) >= int((masks[name] == 0).sum()) or result.plan.n_cut
    assert result.history.reached == pytest.approx(0.6, abs=0.02)
