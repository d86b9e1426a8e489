"""Zeros that are kept, and blocks that go little by little."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.training.loops import images, perceptron, residual, sgd, steps_of, train, vectors
from torchshear.errors import ArgumentError
from torchshear.pruners import masks
from torchshear.pruners.schedules import AGP, Exp, Linear, OneShot


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("4x1", 0.3), ("1x1", 0.7)])
def test_pattern_lock_keeps_the_zeros_of_every_pattern(pattern: str, ratio: float) -> None:
    """Neural Compressor's own makes a 2:4 model all zeros, and looks at whole blocks only."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    masks.apply(model, masks.choose_masks(model, pattern, ratio))
    masks.make_permanent(model)
    zeros = {name: one == 0 for name, one in model.named_parameters() if one.ndim > 1}
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = sgd(model)
    session = torchshear.PruningSession(
        model, vectors(0)[0], pattern="lock", schedule=OneShot(at=0), optimizer=optimizer
    )
    for _ in steps_of(session, model, optimizer, lambda step: (vectors(step)[0], vectors(step)[1] % 4), 5):
        for name, mask in laid(model).items():
            assert torch.equal(mask, ~zeros[name])
    result = session.finish()
    share = sum(int(one.sum()) for one in zeros.values()) / sum(one.numel() for one in zeros.values())
    assert result.history.reached == pytest.approx(share)
    assert result.history.note == ""
    if not result.plan.n_cut:
        for name, one in result.model.named_parameters():
            assert name not in zeros or torch.equal(one == 0, zeros[name])
            assert not torch.equal(one, before[name])


def test_a_lock_that_comes_later() -> None:
    model = perceptron()
    with torch.no_grad():
        model[2].weight[:, :5] = 0
    optimizer = sgd(model)
    session = torchshear.PruningSession(
        model, vectors(0)[0], pattern="lock", layers="2", schedule=OneShot(at=2), optimizer=optimizer
    )
    for step in steps_of(session, model, optimizer, vectors, 2):  # what is zero at the event counts
        with torch.no_grad():
            model[2].parametrizations.weight.original[:, :3] = 0 if step == 1 else 1
            model[2].parametrizations.weight.original[:, 3:] = 1
    assert list(laid(model)) == ["2.weight"]
    assert torch.equal(laid(model)["2.weight"].any(0).nonzero().flatten(), torch.arange(3, 16))


@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_blocks_go_in_quarters(criterion: str) -> None:
    """Between two events, at every frequency // 4 steps, a quarter of the weights goes, over all layers the least."""
    model = residual()
    optimizer = sgd(model)
    session = torchshear.PruningSession(
        model, images(0)[0], pattern="4x1", ratio=0.5, criterion=criterion, progressive=True, optimizer=optimizer,
        schedule=Linear(start=4, end=20, frequency=8),
    )  # fmt: skip
    n_all = sum(one.numel() for one in laid(model).values())
    gone, seen, sizes = [], {}, {}
    for step in steps_of(session, model, optimizer, images, 22, per_epoch=30):
        seen[step] = laid(model)
        gone.append(sum(int((~mask).sum()) for mask in seen[step].values()))
        if step == 11:
            dense = {name: one.detach().abs() for name, one in model.named_parameters()}
            sizes = {name: dense[name.replace("weight", "parametrizations.weight.original")] for name in seen[step]}
    half, full = gone[18], gone[20 + 1]
    assert gone[:12] == [0] * 12
    assert [gone[step] for step in (12, 13, 14, 16, 18, 19)] == [
        half * 1 // 4, half * 1 // 4, half * 2 // 4, half * 3 // 4, half, half
    ]  # fmt: skip
    assert gone[20] == gone[21] == half + (n_all_gone(session) - half) // 4
    for name, mask in seen[18].items():  # whole blocks in the end, parts of them on the way
        assert all(size in (0, 4) for size in block_sizes(mask))
        assert all(bool((one[name] | ~two[name]).all()) for one, two in itertools.pairwise(seen.values())), name
    assert any(0 < size < 4 for mask in seen[14].values() for size in block_sizes(mask))
    if criterion == "magnitude":
        going = torch.cat([sizes[name][~seen[18][name]] for name in sizes])
        first = torch.cat([sizes[name][~seen[12][name]] for name in sizes])
        assert float(first.max()) <= float(going.sort().values[len(first) - 1])
    assert full < n_all
    result = session.finish()  # what was on the way has come to its end with the training
    assert result.history.reached == pytest.approx(0.5, abs=0.02)
    assert len(result.history.renewals) == 1 + 4 + 3  # of the last event the first stage, the second, and the rest


def n_all_gone(session: Any) -> int:
    return sum(int((~mask).sum()) for mask in laid(session._masked.model).values())


def block_sizes(mask: Tensor) -> list[int]:
    """Weights that are left of each block of four outputs."""
    if mask.shape[0] % 4:
        return []
    return mask.reshape(-1, 4, *mask.shape[1:]).sum(1).flatten().tolist()


def test_resuming_between_stages() -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = residual()
        optimizer = sgd(model)
        return model, optimizer, torchshear.PruningSession(
            model, images(0)[0], pattern="4x1", progressive=True, optimizer=optimizer,
            schedule=AGP(start=0, end=8, frequency=4),
        )  # fmt: skip

    model, optimizer, session = begin()
    file = io.BytesIO()
    for step in steps_of(session, model, optimizer, images, 12):
        if step == 5:
            torch.save([session.state_dict(), model.state_dict(), optimizer.state_dict()], file)
    other, its_optimizer, again = begin()
    file.seek(0)
    for one, state in zip((again, other, its_optimizer), torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(state)
    train(again, other, its_optimizer, images, 12, first=6)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert again.history.renewals == session.history.renewals
    assert session.history.reached == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("options", "match"), [
    ({"pattern": "lock"}, "has 5 events"), ({"pattern": "lock", "schedule": OneShot()}, "has none"),
    ({"pattern": "lock", "schedule": OneShot(), "ratio": 0.5}, "leave ratio="),
    ({"progressive": True}, "pattern=None has none"), ({"progressive": True, "pattern": "2:4"}, "'2:4' has none"),
    ({"progressive": True, "pattern": "1x1"}, "at least 4 weights"),
    ({"progressive": True, "pattern": "4x1", "schedule": Linear(end=8, frequency=3)}, "a frequency of at least 4"),
    ({"progressive": True, "pattern": "4x1", "schedule": Linear(end=8, frequency=4, by="epoch")}, "by steps"),
], ids=str)  # fmt: skip
def test_what_cannot_be_locked_or_go_little_by_little(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        torchshear.PruningSession(perceptron(), vectors(0)[0], **{"schedule": Linear(end=16, frequency=4), **options})


def test_each_layer_follows_the_schedule_to_an_end_of_its_own() -> None:
    """Layers at 0.75 and 0.36: after half of the way 1 - (1 - s)^(1/2) of each; below the initial ratio all at once."""
    found = {}
    for schedule in (Exp(end=2, frequency=1), AGP(end=2, frequency=1, initial=0.4)):
        model, counts = perceptron(), []
        layers = {"0": 0.75, "2": 0.36}
        session = torchshear.PruningSession(model, vectors(0)[0], pattern="1x1", layers=layers, schedule=schedule)
        for _ in steps_of(session, model, sgd(model), vectors, 3):
            counts.append([int((~mask).sum()) for mask in masks.applied_masks(model).tensors.values()])
        found[type(schedule)] = counts
    assert found[Exp] == [[0, 0], [64, int(192 * 0.2 + 1e-9)], [96, int(192 * 0.36 + 1e-9)]]
    assert [two for _, two in found[AGP]] == [int(192 * 0.36 + 1e-9)] * 3
    assert found[AGP][0][0] == int(128 * 0.4 + 1e-9)
