"""A session that shrinks its model on the way trains as one with masks alone does, step by step, in float64."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer, lr_scheduler

import torchshear
from tests.networks import Network, named
from tests.training.loops import adam, images, perceptron, residual, sgd, vectors
from torchshear.errors import ArgumentError, VerificationError
from torchshear.pruners.regularizers import GroupLasso
from torchshear.pruners.schedules import AGP, Linear, OneShot
from torchshear.training import _masked_model

N_STEPS = 10
EVERY = AGP(start=1, end=7, frequency=2)  # something goes at steps 3, 5 and 7


def steps_of(session: Any, optimizer: Optimizer, batch: Callable, n_steps: int, first: int = 0) -> Iterator[float]:
    """Train the session's own model, as a user does; gives the loss of each step."""
    session.on_train_begin()
    for step in range(first, n_steps):
        if step % 4 == 0 or step == first:
            session.on_epoch_begin(step // 4)
        session.on_step_begin(step)
        x, target = batch(step)
        loss = functional.cross_entropy(session.model(x), target)
        loss.backward()
        session.on_before_optimizer_step()
        optimizer.step()
        session.on_after_optimizer_step()
        optimizer.zero_grad()
        session.on_step_end(loss)
        yield loss.item()
        if step % 4 == 3 or step == n_steps - 1:
            session.on_epoch_end()
    session.on_train_end()


def begun(make: Callable, optimizer: Callable, x: Any, **options: Any) -> tuple[nn.Module, Optimizer, Any]:
    model = make()
    made = optimizer(model)
    settings = {"schedule": EVERY, "ratio": 0.5} | options
    return model, made, torchshear.PruningSession(model, x, optimizer=made, **settings)


CASES: dict[str, dict[str, Any]] = {
    "l1": {},
    "taylor": {"criterion": "taylor"},
    "rows": {"criterion": "taylor_bn", "scope": "global"},
    "momentum": {"criterion": "snip_momentum"},
    "gradient": {"criterion": "gradient"},
    "macs": {"ratio": None, "target_macs": 0.3},
    "lasso": {"regularizer": GroupLasso(1e-2)},
    "epochs": {"schedule": Linear(end=2, by="epoch")},
}


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [(options, adam if name in ("l1", "macs") else sgd) for name, options in CASES.items()],
    ids=CASES.keys(),
)
def test_each_step_is_that_of_masks_alone(options: dict[str, Any], optimizer: Callable) -> None:
    x = images(0)[0]
    masked, its_optimizer, plain = begun(residual, optimizer, x, **options)
    given, other_optimizer, session = begun(residual, optimizer, x, shrink_every=1, **options)
    schedules = [lr_scheduler.StepLR(one, 3, 0.5) for one in (its_optimizer, other_optimizer)]
    sizes = []
    for one, other in zip(
        steps_of(plain, its_optimizer, images, N_STEPS),
        steps_of(session, other_optimizer, images, N_STEPS),
        strict=True,
    ):
        assert other == pytest.approx(one, rel=1e-9)
        sizes.append(sum(parameter.numel() for parameter in session.model.parameters()))
        for schedule in schedules:
            schedule.step()
    assert plain.model is masked
    assert session.model is not given
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == (3 if "schedule" in options else 4)
    assert other_optimizer.param_groups[0]["lr"] == its_optimizer.param_groups[0]["lr"]
    assert [r.widths for r in session.history.renewals] == [r.widths for r in plain.history.renewals]
    expected, result = plain.finish(), session.finish()
    assert result.plan == expected.plan
    assert result.verification.max_error < 1e-12
    for (name, tensor), (_, wanted) in zip(
        result.model.state_dict().items(), expected.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(tensor, wanted, rtol=1e-8, atol=1e-11, msg=name)
    fresh = torchshear.shrink(residual(1), result.plan)
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(x), result.model.eval()(x))


def of_network(network: Network) -> Callable[[], nn.Module]:
    """A network with a head of classes behind the first of its outputs, without dropout."""

    def make() -> nn.Module:
        model = network.build()[0].train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return make


@pytest.mark.parametrize(
    "network",
    named(
        "inverted_residual", "grouped_bottleneck", "qkv_unbind_sdpa", "multihead_attention", "lstm", "tied_embedding"
    ),
    ids=lambda one: one.name,
)
def test_other_networks_shrink_twice(network: Network) -> None:
    args = network.build()[1]

    def losses(**options: Any) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        _, optimizer, session = begun(
            of_network(network), adam, args, schedule=Linear(start=-1, end=3, frequency=2), **options
        )
        found = []
        session.on_train_begin()
        session.on_epoch_begin(0)
        for step in range(5):
            session.on_step_begin(step)
            loss = session.model(*args).square().mean()
            loss.backward()
            session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            session.on_step_end(loss)
            found.append(loss.item())
        session.on_epoch_end()
        session.on_train_end()
        return found, session.finish()

    (expected, wanted), (found, result) = losses(), losses(shrink_every=1)
    assert found == pytest.approx(expected, rel=1e-9)
    assert result.plan == wanted.plan


@pytest.mark.parametrize("criterion", ["l1", "snip_momentum"])
def test_killed_after_a_shrink_it_goes_on_with_the_same_numbers(criterion: str) -> None:
    x = images(0)[0]
    options = {"criterion": criterion, "shrink_every": 2}
    _, optimizer, session = begun(residual, adam, x, **options)
    saved, losses = [], []
    for loss in steps_of(session, optimizer, images, N_STEPS):
        losses.append(loss)
        file = io.BytesIO()
        torch.save([session.state_dict(), session.model.state_dict(), optimizer.state_dict()], file)
        saved.append(file.getvalue())
    for step in (1, 4, 8):
        given, its_optimizer, other = begun(residual, adam, x, **options)
        states = torch.load(io.BytesIO(saved[step]), weights_only=True)
        other.load_state_dict(states[0])
        other.model.load_state_dict(states[1])
        its_optimizer.load_state_dict(states[2])
        assert (other.model is given) == (step == 1)
        assert list(steps_of(other, its_optimizer, images, N_STEPS, first=step + 1)) == losses[step + 1 :]
        assert other.history.renewals == session.history.renewals
        ours, state = other.finish().model.state_dict(), session.finish().model.state_dict()
        assert all(torch.equal(one, state[name]) for name, one in ours.items())
    _, _, plain = begun(residual, adam, x, criterion=criterion)
    with pytest.raises(ArgumentError, match="shrink_every=2, and this one has shrink_every=null"):
        plain.load_state_dict(states[0])


def test_by_events_a_new_optimizer_may_be_made() -> None:
    model = perceptron()
    session = torchshear.PruningSession(
        model, vectors(0)[0], ratio=0.5, schedule=Linear(end=2, by="event"), shrink_every=1
    )
    widths = []
    for number in range(3):
        session.on_event()
        optimizer = sgd(session.model)
        for step in range(3):
            x, target = vectors(3 * number + step)
            functional.cross_entropy(session.model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        widths.append(session.model[0].out_features)
    assert widths == [16, 12, 8]
    session.on_train_begin()
    session.on_train_end()
    x = vectors(9)[0]
    torch.testing.assert_close(session.finish().model.eval()(x), session.model.eval()(x))


def test_what_cannot_shrink_is_refused() -> None:
    for options, said in (
        ({"shrink_every": 0}, "shrink_every must be a whole number"),
        ({"shrink_every": 1, "soft": True}, "soft=True do not go together"),
        ({"shrink_every": 1, "pattern": "1x1"}, "pattern='1x1' do not go together"),
    ):
        with pytest.raises(ArgumentError, match=said):
            begun(perceptron, sgd, vectors(0)[0], **options)
    with pytest.raises(ArgumentError, match="shrink_every=1 needs optimizer="):
        torchshear.PruningSession(perceptron(), vectors(0)[0], schedule=OneShot(at=1), shrink_every=1)


def test_a_shrink_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, session = begun(perceptron, sgd, vectors(0)[0], shrink_every=1, schedule=OneShot(at=2))
    training = steps_of(session, optimizer, vectors, 6)
    next(training), next(training)

    def failing(*_: Any, **__: Any) -> Any:
        raise VerificationError("not equal")

    before = [*copy.deepcopy(optimizer.state_dict())["param_groups"][0]["params"]], list(model.parameters())
    monkeypatch.setattr(_masked_model, "shrink_to_form", failing)
    with pytest.raises(VerificationError, match="not equal"):
        next(training)
    assert session.model is model
    assert optimizer.state_dict()["param_groups"][0]["params"] == before[0]
    assert {id(one) for one in model.parameters()} == {id(one) for one in before[1]}
    assert torchshear.pruners.masks.applied_masks(model).tensors
