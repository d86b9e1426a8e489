"""Lottery tickets against rounds written out by hand."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.training.loops import images, perceptron, residual, sgd, vectors
from torchshear.errors import ArgumentError
from torchshear.pruners import masks
from torchshear.training import LotteryTicket

RATIOS = [0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8]  # of NNI's pages: P = 0.8 in five rounds


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable, n_steps: int = 3) -> None:
    for step in range(n_steps):
        x, target = batch(step)
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


def values(ticket: LotteryTicket) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ticket._tensors().items()}


def test_single_weights_go_as_by_hand() -> None:
    """Smallest |W| of the trained and masked weights of each layer, then all is set back."""
    model, hand = perceptron(), perceptron()
    optimizer = sgd(model)
    ticket = LotteryTicket(model, vectors(0)[0], pattern="1x1", ratio=0.8, rounds=5, optimizer=optimizer)
    start, kept = copy.deepcopy(hand.state_dict()), {n: torch.ones_like(p) for n, p in hand.named_parameters()}
    for number in ticket.rounds():
        if number:
            for name, weight in hand.named_parameters():
                if weight.ndim == 2:
                    n_gone = int(weight.numel() * (1 - 0.2 ** (number / 5)) + 1e-9)
                    order = (weight.detach() * kept[name]).abs().flatten().argsort(stable=True)
                    kept[name] = torch.ones(weight.numel(), dtype=weight.dtype).index_fill_(0, order[:n_gone], 0)
                    kept[name] = kept[name].reshape(weight.shape)
        for name, mask in laid(model).items():
            assert torch.equal(mask, kept[name].bool()), (number, name)
        hand.load_state_dict(start)
        by_hand = sgd(hand)
        train(model, optimizer, vectors)
        for step in range(3):
            x, target = vectors(step)
            for name, weight in hand.named_parameters():
                weight.data.mul_(kept[name])
            functional.cross_entropy(hand(x), target).backward()
            for name, weight in hand.named_parameters():
                weight.grad.mul_(kept[name])
            by_hand.step()
            by_hand.zero_grad()
        for name, weight in hand.named_parameters():
            weight.data.mul_(kept[name])
        torch.testing.assert_close(model(vectors(9)[0]), hand(vectors(9)[0]), rtol=1e-10, atol=1e-12)
    assert number == 5
    assert [round(one.asked, 4) for one in ticket.history.renewals] == RATIOS
    result = ticket.finish()
    torch.testing.assert_close(result.model(vectors(9)[0]), hand(vectors(9)[0]), rtol=1e-9, atol=1e-11)


def test_channels_and_all_that_goes_with_the_weights_are_set_back() -> None:
    model = residual().train()
    optimizer = sgd(model)
    schedule = lr_scheduler.StepLR(optimizer, 2, 0.1)
    ticket = LotteryTicket(model, images(0)[0], ratio=0.5, rounds=2, optimizer=optimizer, scheduler=schedule)
    start, widths = values(ticket), []
    for _ in ticket.rounds():
        assert all(torch.equal(one, start[name]) for name, one in values(ticket).items())
        assert (optimizer.param_groups[0]["lr"], schedule.last_epoch) == (0.05, 0)
        assert not any(held for held in optimizer.state.values())
        widths.append(int(laid(model)["stem.bias"].sum()))
        train(model, optimizer, images)
        for _ in range(3):
            schedule.step()
        assert not torch.equal(values(ticket)["norm.running_mean"], start["norm.running_mean"])
    assert widths == [8, 6, 4]
    result = ticket.finish()
    assert result.model.stem.out_channels == 4
    assert result.verification.max_error < 1e-12
    with pytest.raises(ArgumentError, match="all 2 rounds behind round 0 have begun"):
        ticket.begin_round()


def test_later_rounds_return_to_an_early_step() -> None:
    model = perceptron()
    optimizer = sgd(model)
    ticket = LotteryTicket(model, vectors(0)[0], ratio=0.5, rounds=1, optimizer=optimizer)
    ticket.begin_round()
    train(model, optimizer, vectors, 2)
    ticket.remember()
    early, momentum = values(ticket), [held["momentum_buffer"].clone() for held in optimizer.state.values()]
    train(model, optimizer, vectors)
    ticket.begin_round()
    assert all(torch.equal(one, early[name]) for name, one in values(ticket).items())
    assert all(torch.equal(h["momentum_buffer"], m) for h, m in zip(optimizer.state.values(), momentum, strict=True))
    with pytest.raises(ArgumentError, match="remember\\(\\) came in round 1"):
        ticket.remember()


def test_controls() -> None:
    """The random one chooses others, with the same widths; the reinitialised one the same, with other weights."""
    found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = {}
    for control in ("none", "random", "reinitialised"):
        model = perceptron()
        optimizer = sgd(model)
        ticket = LotteryTicket(model, vectors(0)[0], rounds=1, ratio=0.5, optimizer=optimizer, control=control, seed=3)
        start = values(ticket)
        state = torch.random.get_rng_state()
        ticket.begin_round()
        train(model, optimizer, vectors)
        ticket.begin_round()
        assert torch.equal(torch.random.get_rng_state(), state)
        found[control] = (laid(model), values(ticket), start)
    ticket_masks, random_masks, other = (found[name][0] for name in ("none", "random", "reinitialised"))
    assert all(torch.equal(mask, other[name]) for name, mask in ticket_masks.items())
    assert [int(mask.sum()) for mask in random_masks.values()] == [int(mask.sum()) for mask in ticket_masks.values()]
    assert any(not torch.equal(mask, random_masks[name]) for name, mask in ticket_masks.items())
    for control in ("none", "random"):
        assert all(torch.equal(one, found[control][2][name]) for name, one in found[control][1].items())
    _, drawn, start = found["reinitialised"]
    assert all(not torch.equal(one, start[name]) for name, one in drawn.items())
    assert 0.5 < (drawn["2.weight"].std() / start["2.weight"].std()).item() < 2


def test_random_single_weights_differ_by_seed() -> None:
    chosen = []
    for seed in (0, 0, 1):
        model = perceptron()
        ticket = LotteryTicket(model, vectors(0)[0], pattern="1x1", rounds=1, ratio=0.5, control="random", seed=seed)
        ticket.begin_round(), ticket.begin_round()
        chosen.append(laid(model)["2.weight"])
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert int(chosen[0].sum()) == 96


def test_killed_between_rounds_it_goes_on_with_the_same_numbers() -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, LotteryTicket]:
        model = residual()
        optimizer = sgd(model)
        return model, optimizer, LotteryTicket(model, images(0)[0], ratio=0.5, rounds=2, optimizer=optimizer)

    model, optimizer, ticket = begin()
    saved = []
    for _ in ticket.rounds():
        train(model, optimizer, images)
        file = io.BytesIO()
        torch.save([ticket.state_dict(), model.state_dict(), optimizer.state_dict()], file)
        saved.append(file.getvalue())
    other, its_optimizer, again = begin()
    states = torch.load(io.BytesIO(saved[1]), weights_only=True)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    its_optimizer.load_state_dict(states[2])
    assert [number for number in again.rounds() if train(other, its_optimizer, images) is None] == [2]
    expected = ticket.finish().model.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in again.finish().model.state_dict().items())
    three = LotteryTicket(residual(), images(0)[0], rounds=3)
    with pytest.raises(ArgumentError, match="not that of a lottery ticket with 3 rounds"):
        three.load_state_dict(states[0])
    alone = LotteryTicket(residual(), images(0)[0], ratio=0.5, rounds=2)
    with pytest.raises(ArgumentError, match="sets other things back"):
        alone.load_state_dict(states[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"control": "other"}, "control='other'"),
        ({"soft": True}, "soft= is no option of a lottery ticket"),
        ({"scheduler": object()}, "scheduler is object, which has no state_dict"),
        ({"control": "reinitialised", "initialise": 3}, "initialise is int"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        LotteryTicket(perceptron(), vectors(0)[0], **options)


def test_weights_that_nobody_draws_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = perceptron(), nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    with pytest.raises(ArgumentError, match="Scaled '' has weights of its own and no reset_parameters"):
        LotteryTicket(Scaled(), vectors(0)[0], control="reinitialised")
