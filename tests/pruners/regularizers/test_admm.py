"""ADMM: numbers worked out by hand, projections against all that there are, and a training written out in float64."""

import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net
from tests.training.loops import images, perceptron, residual, sgd, steps_of, vectors
from torchshear.errors import ArgumentError
from torchshear.pruners.regularizers import ADMM, Regularized
from torchshear.pruners.schedules import AGP, OneShot

NEVER = OneShot(at=10**6)
AIM = torch.tensor([[3.0, 2.0, 1.0, 0.5]], dtype=torch.float64)


def towards_aim(regularizer: ADMM, n_steps: int, per_epoch: int = 1) -> Iterator[tuple[Tensor, Any]]:
    """Minimize |w - a|^2 / 2 by steps of 1 / (1 + rho), each of which solves it exactly at rho = 1; w is 0 at first."""
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.eye(4, dtype=torch.float64)
    session = torchshear.PruningSession(
        model, x, pattern="1x1", ratio=0.5, schedule=NEVER, regularizer=regularizer, optimizer=optimizer
    )
    session.on_train_begin()
    for step in range(n_steps):
        if step % per_epoch == 0:
            session.on_epoch_begin(step // per_epoch)
        session.on_step_begin(step % per_epoch)
        (model(x).T - AIM).square().sum().div(2).backward()
        session.on_before_optimizer_step()
        optimizer.step()
        session.on_after_optimizer_step()
        optimizer.zero_grad()
        session.on_step_end()
        if (step + 1) % per_epoch == 0:
            session.on_epoch_end()
        yield model.weight.detach().clone(), session


def test_numbers_by_hand() -> None:
    expected = [  # w, z, u after each step: w = (a + z - u) / 2, z the two largest of w + u, u the rest
        ([1.5, 1.0, 0.5, 0.25], [1.5, 1.0, 0, 0], [0, 0, 0.5, 0.25]),
        ([2.25, 1.5, 0.25, 0.125], [2.25, 1.5, 0, 0], [0, 0, 0.75, 0.375]),
        ([2.625, 1.75, 0.125, 0.0625], [2.625, 1.75, 0, 0], [0, 0, 0.875, 0.4375]),
    ]
    for (weight, session), (w, z, u) in zip(towards_aim(ADMM(rho=1.0, every=1), 3), expected, strict=True):
        state = session.state_dict()["penalty"]
        assert weight.tolist() == [w]
        assert state["z"]["weight"].tolist() == [z]
        assert state["u"]["weight"].tolist() == [u]
    primal = [one.primal for one in session.history.residuals]
    dual = [one.dual for one in session.history.residuals]
    assert primal[0] == pytest.approx(math.sqrt(0.3125 / 3.5625), rel=1e-12)
    assert primal[1] == pytest.approx(math.sqrt(0.078125 / 7.390625), rel=1e-12)
    assert dual == pytest.approx([math.sqrt(3.25), math.sqrt(0.8125), math.sqrt(0.203125)], rel=1e-12)
    assert session.history.residuals[0].by_name == {"weight": primal[0]}


def test_it_ends_at_the_best_that_the_pattern_allows() -> None:
    *_, (weight, session) = towards_aim(ADMM(rho=1.0, every=1), 40)
    torch.testing.assert_close(weight, torch.tensor([[3.0, 2.0, 0, 0]], dtype=torch.float64), rtol=0, atol=1e-9)
    assert session.history.residuals[-1].primal < 1e-9
    assert session.history.residuals[-1].dual < 1e-9


def test_the_first_weights_are_no_alias_of_those_that_train() -> None:
    """Z is W as it was: before the first projection W is pulled back to it."""
    found = [weight for weight, _ in towards_aim(ADMM(rho=1.0, every=10), 3)]
    assert found[1].tolist() == [[1.5, 1.0, 0.5, 0.25]]  # (a + 0) / 2 again; without a pull it would be nearer to a
    assert found[2].tolist() == found[1].tolist()


@pytest.mark.parametrize(("by", "every", "steps"), [("step", 2, [2, 4, 6, 8]), ("epoch", 2, [8])])
def test_when_it_projects(by: Any, every: int, steps: list[int]) -> None:
    *_, (_, session) = towards_aim(ADMM(rho=0.1, every=every, by=by), 8, per_epoch=4)
    assert [one.step for one in session.history.residuals] == steps


def test_rho_grows_and_u_shrinks_with_it() -> None:
    states = [s.state_dict()["penalty"] for _, s in towards_aim(ADMM(rho=1.0, every=1, growth=2.0, most=3.0), 3)]
    assert [state["rho"] for state in states] == [2.0, 3.0, 3.0]
    assert states[0]["u"]["weight"].tolist() == [[0, 0, 0.25, 0.125]]  # rho u is what it was


def after(session: Any, model: nn.Module, x: Tensor, n_steps: int) -> list[dict[str, Any]]:
    """States of the penalty behind steps that move nothing."""
    session.on_train_begin()
    session.on_epoch_begin(0)
    states = []
    for step in range(n_steps):
        session.on_step_begin(step)
        model(x).sum().backward()
        session.on_before_optimizer_step()
        session.on_after_optimizer_step()
        states.append(session.state_dict()["penalty"])
        session.on_step_end()
    return states


def all_of(units: list[list[int]], size: int, count: int) -> list[Tensor]:
    """All masks of `size` weights, in a row, in which `count` of the units are gone."""
    found = []
    for gone in combinations(units, count):
        mask = torch.ones(size, dtype=torch.float64)
        mask[[place for unit in gone for place in unit]] = 0
        found.append(mask)
    return found


def grid(rows: int, columns: int, height: int, width: int) -> list[list[int]]:
    """Places of blocks in a matrix."""
    return [[(r + i) * columns + c + j for i in range(height) for j in range(width)]
            for r in range(0, rows, height) for c in range(0, columns, width)]  # fmt: skip


def n_of_m(rows: int, switched: int) -> list[Tensor]:
    """All masks of rows of 4 in which some rows have lost two weights."""
    found = []
    for chosen in combinations(range(rows), switched):
        partial = [torch.ones(rows, 4, dtype=torch.float64)]
        for row in chosen:
            partial = [_without(one, row, pair) for one in partial for pair in combinations(range(4), 2)]
        found.extend(one.flatten() for one in partial)
    return found


def _without(mask: Tensor, row: int, pair: tuple[int, int]) -> Tensor:
    changed = mask.clone()
    changed[row, list(pair)] = 0
    return changed


CASES: dict[str, tuple[float, list[Tensor]]] = {
    "1x1": (0.3, all_of(grid(3, 4, 1, 1), 12, 3)),
    "1x2": (0.5, all_of(grid(3, 4, 1, 2), 12, 3)),
    "3x1": (0.5, all_of(grid(3, 4, 3, 1), 12, 2)),
    "2:4": (0.34, n_of_m(3, 2)),
    "channelx1": (0.5, all_of(grid(3, 4, 3, 1), 12, 2)),
    "1xchannel": (0.4, all_of([[*range(4 * r, 4 * r + 4), 12 + r] for r in range(3)], 15, 1)),
}


@pytest.mark.parametrize("pattern", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_projections_of_patterns_are_the_nearest(pattern: str, seed: int) -> None:
    ratio, masks = CASES[pattern]
    torch.manual_seed(seed)
    model, x = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    session = torchshear.PruningSession(
        model, x, pattern=pattern, ratio=ratio, schedule=NEVER, regularizer=ADMM(every=1)
    )
    names = ["weight", "bias"] if len(masks[0]) == 15 else ["weight"]
    dense = torch.cat([session._masked.parameters[name].detach().flatten() for name in names])
    u = torch.zeros_like(dense)
    for state in after(session, model, x, 3):
        assert set(state["z"]) == set(names)
        given = dense + u
        best = min(float((given * (1 - mask)).square().sum()) for mask in masks)
        z = torch.cat([state["z"][name].flatten() for name in names])
        assert any(bool((z == given * mask).all()) for mask in masks)
        assert float((given - z).square().sum()) == pytest.approx(best, rel=1e-12)
        u = u + dense - z
        torch.testing.assert_close(torch.cat([state["u"][name].flatten() for name in names]), u)


def coupled() -> nn.Module:
    """A width of 4 that two layers make, that a square layer reads and makes, and that a last one reads."""
    return Net(
        lambda m, x: m.last(torch.relu(m.one(x) + m.square(torch.relu(m.one(x))))),
        one=nn.Linear(3, 4), square=nn.Linear(4, 4), last=nn.Linear(4, 2),
    ).double()  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_projections_of_channel_groups_are_the_nearest(seed: int) -> None:
    """Every set of two of four units is tried; a part for each dimension, of which the square layer has two."""
    torch.manual_seed(seed)
    model, x = coupled(), torch.randn(2, 3, dtype=torch.float64)
    session = torchshear.PruningSession(model, x, ratio=0.5, schedule=NEVER, regularizer=ADMM(every=1))
    held = session._masked.parameters
    parts = {(name, dim): held[name].detach() for name, dim in
             [("one.weight", 0), ("one.bias", 0), ("square.weight", 0), ("square.weight", 1), ("square.bias", 0),
              ("last.weight", 1)]}  # fmt: skip
    u = {key: torch.zeros_like(one) for key, one in parts.items()}
    for state in after(session, model, x, 3):
        given = {key: one + u[key] for key, one in parts.items()}
        found = {(key.split("|")[1], int(key.split("|")[2])): one for key, one in state["z"].items()}
        assert found.keys() == parts.keys()
        distances = {}
        for gone in combinations(range(4), 2):
            nearest = {key: one.movedim(key[1], 0).clone() for key, one in given.items()}
            for one in nearest.values():
                one[list(gone)] = 0
            distances[gone] = sum(
                float((one.movedim(key[1], 0) - nearest[key]).square().sum()) for key, one in given.items()
            )
            if all(torch.equal(found[key], one.reshape(4, -1)) for key, one in nearest.items()):
                chosen = gone
        assert distances[chosen] == min(distances.values())
        for key, one in parts.items():
            u[key] = u[key] + one - found[key].reshape(one.movedim(key[1], 0).shape).movedim(0, key[1])


def heaviest(squares: Tensor, count: int) -> Tensor:
    order = sorted(range(len(squares)), key=lambda i: (float(squares[i]), -i))
    kept = torch.ones(len(squares), dtype=torch.float64)
    kept[order[:count]] = 0
    return kept


PARTS: Mapping[str, list[list[tuple[str, int]]]] = {
    "channels": [[("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)]],
    "1x1": [[("0.weight", -1)], [("2.weight", -1)], [("4.weight", -1)]],
}


@pytest.mark.parametrize("kind", PARTS)
def test_training_is_that_of_a_loop_written_out(kind: str) -> None:
    rho, every = 0.1, 3
    hand, model = perceptron(), perceptron()
    own, optimizer = sgd(hand), sgd(model)
    asked: dict[str, Any] = {} if kind == "channels" else {"pattern": kind}
    session = torchshear.PruningSession(
        model, vectors(0)[0], ratio=0.5, schedule=NEVER, optimizer=optimizer,
        regularizer=ADMM(rho=rho, every=every), **asked,
    )  # fmt: skip
    weights = dict(hand.named_parameters())
    lines = {part: (lambda t, d=part[1]: t.flatten()[:, None] if d < 0 else t.movedim(d, 0).reshape(t.shape[d], -1))
             for group in PARTS[kind] for part in group}  # fmt: skip
    z = {part: line(weights[part[0]].detach()).clone() for part, line in lines.items()}
    u = {part: torch.zeros_like(one) for part, one in z.items()}
    adds = kind == "channels"
    for step in steps_of(session, model, optimizer, vectors, 11, adds_penalty=adds):
        x, target = vectors(step)
        penalty = sum((line(weights[p[0]]) - z[p] + u[p]).square().sum() for p, line in lines.items())
        (functional.cross_entropy(hand(x), target) + rho / 2 * penalty).backward()
        own.step()
        own.zero_grad()
        if (step + 1) % every == 0:
            w = {part: line(weights[part[0]].detach()) for part, line in lines.items()}
            for group in PARTS[kind]:
                squares = sum((w[part] + u[part]).square().sum(1) for part in group)
                kept = heaviest(squares, len(squares) // 2)
                for part in group:
                    z[part] = (w[part] + u[part]) * kept[:, None]
                    u[part] = u[part] + w[part] - z[part]
        for name, parameter in session._masked.parameters.items():
            torch.testing.assert_close(parameter.detach(), weights[name].detach(), rtol=1e-11, atol=1e-13)
    assert [one.step for one in session.history.residuals] == [3, 6, 9]


def test_what_is_pulled_to_zero_goes_with_little_change(tmp_path: Path) -> None:
    said: dict[str, list[int]] = {}

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            said.setdefault(tag, []).append(global_step)

    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = torchshear.PruningSession(
        model, images(0)[0], ratio=0.5, criterion="l2", schedule=OneShot(at=300), optimizer=optimizer,
        regularizer=ADMM(rho=1.0, every=20), writer=Writer(),
    )  # fmt: skip
    train = list(steps_of(session, model, optimizer, lambda step: images(step % 4), 300))
    assert len(train) == 300
    history, result = session.history, session.finish()
    assert len(history.residuals) == 15 == len(said["pruning/primal"])
    assert history.residuals[-1].primal < 0.05 < 0.3 < history.residuals[0].primal
    assert set(history.residuals[0].by_name) == {group.name for group in result.plan.groups}
    assert result.verification.max_error < 1e-10
    assert result.history.reached == 0.5
    history.draw(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


@pytest.mark.parametrize("asked", [{}, {"pattern": "1x1"}])
def test_killed_it_goes_on_with_the_same_numbers(asked: dict[str, Any], tmp_path: Path) -> None:
    def made(model: nn.Module, optimizer: torch.optim.Optimizer) -> torchshear.PruningSession:
        return torchshear.PruningSession(
            model, vectors(0)[0], ratio=0.5, schedule=AGP(start=2, end=8, frequency=3), optimizer=optimizer,
            regularizer=ADMM(rho=0.1, every=2, growth=1.3), **asked,
        )  # fmt: skip

    whole = perceptron()
    optimizer = sgd(whole)
    session = made(whole, optimizer)
    list(steps_of(session, whole, optimizer, vectors, 12))
    first = perceptron()
    optimizer = sgd(first)
    begun = made(first, optimizer)
    for step in steps_of(begun, first, optimizer, vectors, 12):
        if step == 7:
            states = {"session": begun.state_dict(), "model": first.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(states, tmp_path / "state.pt")
            break
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = perceptron(seed=5)
    optimizer = sgd(second)
    resumed = made(second, optimizer)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["session"])
    list(steps_of(resumed, second, optimizer, vectors, 12, first=8))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert resumed.history == session.history
    assert len(session.history.residuals) == 6


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rho": 0}, "0 < rho"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"growth": 0.5}, "growth >= 1"),
        ({"rho": 2.0}, "rho <= most"),
        ({"every": 0}, "every"),
        ({"by": "batch"}, "by='batch'"),
    ],
)
def test_settings_that_mean_nothing(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        ADMM(**given)


def test_a_network_of_which_nothing_may_go() -> None:
    with pytest.raises(ArgumentError, match="nothing of the network may go"):
        ADMM().bind(Regularized((), {}))
