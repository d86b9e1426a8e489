"""UniPruner in a training loop: what is zeroed and when, files, going on after a stop, and proof."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.compat.unipruning.plain import STEP, Stages, reference
from tests.networks import randomise
from torchshear.compat.unipruning import UniPruner, ZeroingCallback
from torchshear.errors import ArgumentError, CheckpointError, MaskError, PlanError
from torchshear.pruners.schedules import AGP

KEPT = 0.6
SHAPE = [2, 3, 8, 8]


def config(**changed: Any) -> dict[str, Any]:
    given = {"target_sparsity": KEPT, "frequency": 2, "pruning_step": STEP, "filter_lower_threshold": STEP,
             "input_size": SHAPE, "prune_flag": 1, "rank": 0, "device_target": "CPU", "exp_name": "try"}  # fmt: skip
    return given | changed


def stages(seed: int = 0) -> nn.Module:
    return randomise(Stages(), seed).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (6,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    callback: ZeroingCallback,
    n_epochs: int,
    first: int = 0,
    look: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Three batches an epoch, with the hooks of the callback alone."""
    callback.on_train_begin()
    for epoch in range(first, n_epochs):
        callback.on_epoch_begin(epoch)
        look(epoch)
        for number in range(3):
            x, target = batch(3 * epoch + number)
            functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        callback.on_epoch_end()
    callback.on_train_end()


def plain(model: nn.Module) -> nn.Module:
    """The network with the dense weights that lie below its masks, or that it has."""
    copied, found = stages(), {}
    for name, value in model.state_dict().items():
        if not name.endswith(".mask"):
            found[name.replace("parametrizations.", "").replace(".original", "")] = value
    copied.load_state_dict({name: value for name, value in found.items() if name in copied.state_dict()})
    return copied


def zeroed(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """A copy in which filters, biases, norms and columns of what is gone are zero, written out."""
    one = sorted(set(range(20)) - set(kept["one.weight[0]"]))
    two = sorted(set(range(24)) - set(kept["two.weight[0]"]))
    copied = plain(model)
    with torch.no_grad():
        for tensor in (copied.one.weight, copied.norm_one.weight, copied.norm_one.bias):
            tensor[one] = 0
        for tensor in (copied.two.weight, copied.two.bias, copied.norm_two.weight, copied.norm_two.bias):
            tensor[two] = 0
        copied.two.weight[:, one] = 0
        for tensor in (copied.three.weight, copied.three.bias):
            tensor[two] = 0
        copied.three.weight[:, two] = 0
        copied.head.weight[:, two] = 0
    return copied


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("use_gamma", [True, False])
def test_every_second_epoch_zeroes_what_the_definition_says(soft: bool, use_gamma: bool) -> None:
    pruner = UniPruner(config(), soft=soft, use_gamma=use_gamma)
    given = stages()
    model = pruner.apply(given)
    assert model is given
    (callback,) = pruner.callbacks()
    optimizer, expected, events = sgd(model), {}, []

    def look(epoch: int) -> None:
        if epoch % 2 == 0:
            dense = plain(model)
            events.append(epoch)
            if soft or not expected:  # else what is zero goes first: the same
                expected.clear()
                expected.update(reference(dense, KEPT, use_gamma, STEP))
        x, _ = batch(99)
        torch.testing.assert_close(model.eval()(x), zeroed(model, expected).eval()(x), rtol=1e-10, atol=1e-12)
        model.train()

    train(model, optimizer, callback, 5, look=look)
    assert events == [0, 2, 4]
    result = pruner.convert()
    assert {name: kept.tolist() for name, kept in result.plan.kept.items()} == expected
    assert [one.epoch for one in result.history.renewals] == [0, 2, 4]
    assert not result.history.note
    assert result.verification.max_error < 1e-10
    x, _ = batch(99)
    torch.testing.assert_close(result.model.eval()(x), zeroed(model, expected).eval()(x), rtol=1e-9, atol=1e-11)
    n_left = sum(one.numel() for one in result.model.parameters())
    n_dense = sum(one.numel() for one in stages().parameters())
    assert n_left <= KEPT * n_dense < n_left + 0.25 * n_dense
    assert all(len(kept) % STEP == 0 for kept in result.plan.kept.values())


@pytest.mark.parametrize("soft", [True, False])
def test_what_is_zeroed_comes_back_only_if_it_may(soft: bool) -> None:
    """Between two searches the filters that stayed are made small, and those below the masks are not."""
    pruner = UniPruner(config(), soft=soft)
    model = pruner.apply(stages())
    (callback,) = pruner.callbacks()
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    first = {name: set(kept.tolist()) for name, kept in pruner.session._renewer.choice.kept.items()}
    with torch.no_grad():
        model.one.parametrizations.weight.original[sorted(first["one.weight[0]"])[:8]] *= 1e-3
    for epoch in (0, 1):
        callback.on_epoch_end()
        callback.on_epoch_begin(epoch + 1)
    second = {name: set(kept.tolist()) for name, kept in pruner.session._renewer.choice.kept.items()}
    assert bool(second["one.weight[0]"] - first["one.weight[0]"]) == soft
    if not soft:
        assert second == first


def test_files_of_a_search_and_the_small_network_made_of_them(tmp_path: Path) -> None:
    pruner = UniPruner(config(output_path=str(tmp_path), rank=3))
    model = stages()
    optimizer = sgd(model)
    pruner.apply(model, optimizer=optimizer)
    (callback,) = pruner.callbacks()
    outputs = {}
    x, _ = batch(99)

    def look(epoch: int) -> None:
        outputs[epoch] = model.eval()(x).detach()
        model.train()

    train(model, optimizer, callback, 3, look=look)
    outputs[3] = model.eval()(x).detach()
    folder = tmp_path / "try"
    stems = [f"try_zeroed_rank3_epoch{epoch}" for epoch in (0, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        name for stem in stems for name in (f"{stem}.ckpt", f"{stem}_mask.json")
    )
    for epoch, stem in zip((0, 2, 3), stems, strict=True):
        document = json.loads((folder / f"{stem}_mask.json").read_text())
        assert document["two"] == document["three"]
        saved = torch.load(folder / f"{stem}.ckpt", weights_only=True)
        fresh = stages(7)
        fresh.load_state_dict(saved["weights"])
        assert not fresh.two.weight[document["two"]].any()
        torch.testing.assert_close(fresh.eval()(x), outputs[epoch], rtol=1e-10, atol=1e-12)
        result = UniPruner(config()).convert(fresh, folder / f"{stem}_mask.json")
        assert result.model.two.weight.shape[0] == 24 - len(document["two"])
        torch.testing.assert_close(result.model.eval()(x), outputs[epoch], rtol=1e-9, atol=1e-11)
        assert result.verification.max_error < 1e-10


@pytest.mark.parametrize("soft", [True, False])
def test_from_a_checkpoint_it_goes_on_with_the_same_numbers(soft: bool, tmp_path: Path) -> None:
    def begin(seed: int, folder: str) -> tuple[UniPruner, nn.Module, torch.optim.Optimizer]:
        (tmp_path / folder).mkdir()
        model = stages(seed)
        optimizer = sgd(model)
        pruner = UniPruner(config(output_path=str(tmp_path / folder)), soft=soft)
        pruner.apply(model, optimizer=optimizer)
        return pruner, model, optimizer

    whole, model, optimizer = begin(0, "whole")
    train(model, optimizer, whole.callbacks()[0], 5)
    second, resumed, other = begin(3, "second")
    first = second.resume(tmp_path / "whole" / "try" / "try_zeroed_rank0_epoch2.ckpt")
    assert first == 2
    train(resumed, other, second.callbacks()[0], 5, first)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert second.session.history == whole.session.history
    assert second.convert().plan == whole.convert().plan


def test_from_a_trained_model_and_in_a_session_of_ones_own() -> None:
    """The hooks of steps may come as well, and the masks are those of epochs."""
    model = stages()
    optimizer = sgd(model)
    for step in range(10):
        x, target = batch(step)
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = plain(model)
    pruner = UniPruner(config(frequency=1))
    pruner.apply(model)
    (callback,) = pruner.callbacks()
    session = pruner.session
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    found = {name: kept.tolist() for name, kept in session._renewer.choice.kept.items()}
    assert found == reference(trained, KEPT, True, STEP)
    x, target = batch(50)
    session.on_step_begin(0)
    loss = functional.cross_entropy(model(x), target)
    loss.backward()
    session.on_before_optimizer_step()
    optimizer.step()
    session.on_after_optimizer_step()
    session.on_step_end(loss)
    callback.on_epoch_end()
    callback.on_train_end()
    assert session.history.losses == (float(loss.detach()),)
    assert [one.epoch for one in session.history.renewals] == [0]
    assert "60.0% of the parameters" in repr(pruner)


def test_what_is_zeroed_last_is_trained() -> None:
    """Behind the last epoch nothing is chosen anew, though the frequency says so."""
    model = stages()
    optimizer, pruner = sgd(model), UniPruner(config())
    pruner.apply(model, optimizer=optimizer)
    (callback,) = pruner.callbacks()
    train(model, optimizer, callback, 4)
    assert [one.epoch for one in pruner.session.history.renewals] == [0, 2]
    model.eval()
    x, _ = batch(90)
    small = pruner.convert().model.eval()
    torch.testing.assert_close(small(x), model(x))


def test_without_pruning_the_model_is_left_alone(tmp_path: Path) -> None:
    pruner = UniPruner(config(prune_flag=0, output_path=str(tmp_path)))
    model = stages()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (callback,) = (pruner.apply(model), pruner.callbacks())[1]
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_epoch_end()
    callback.on_train_end()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="prune_flag=0"):
        pruner.convert()
    with pytest.raises(ArgumentError, match="prune_flag=0"):
        pruner.resume(tmp_path / "none.ckpt")


def test_calls_that_come_too_early_or_twice() -> None:
    pruner = UniPruner(config())
    for call in (pruner.callbacks, pruner.convert, lambda: pruner.resume("x"), lambda: pruner.write(0)):
        with pytest.raises(ArgumentError, match="no model yet"):
            call()
    pruner.apply(stages())
    with pytest.raises(ArgumentError, match="twice"):
        pruner.apply(stages())
    with pytest.raises(ArgumentError, match="finish.. came before training began"):
        pruner.convert()
    with pytest.raises(ArgumentError, match="one of them is missing"):
        pruner.convert(stages())
    with pytest.raises(ArgumentError, match="on_epoch_begin.. came before training began"):
        pruner.callbacks()[0].on_epoch_begin(0)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"target_sparsity": 0.01}, PlanError, "target_params=0.01 cannot be reached"),
        ({"target_sparsity": 1.0}, ArgumentError, "the dense model"),
        ({"input_size": [2, 5, 8, 8]}, torchshear.errors.CaptureError, "."),
        ({"exp_name": "../away"}, ArgumentError, "exp_name"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_alone(
    changed: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = stages()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(error, match=match):
        UniPruner(config(**changed)).apply(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_an_optimizer_of_another_model_and_masks_of_ones_own() -> None:
    model = stages()
    with pytest.raises(ArgumentError, match="optimizer= holds none"):
        UniPruner(config()).apply(stages(), optimizer=sgd(model))
    UniPruner(config()).apply(model)
    with pytest.raises(MaskError, match="masks lie on the model already"):
        UniPruner(config()).apply(model)


def test_checkpoints_of_others_change_nothing(tmp_path: Path) -> None:
    model = stages()
    optimizer = sgd(model)
    pruner = UniPruner(config(output_path=str(tmp_path)))
    pruner.apply(model, optimizer=optimizer)
    train(model, optimizer, pruner.callbacks()[0], 1)
    good = tmp_path / "try" / "try_zeroed_rank0_epoch0.ckpt"
    document = torch.load(good, weights_only=True)

    def refused(error: type[Exception], match: str, path: Path = good, with_optimizer: bool = True, **own: Any) -> None:
        fresh = own.pop("model", None) or stages(4)
        before = plain(fresh).state_dict() if isinstance(fresh, Stages) else fresh.state_dict()
        other = UniPruner(config(**own))
        held = sgd(fresh)
        other.apply(fresh, optimizer=held if with_optimizer else None)
        with pytest.raises(error, match=match):
            other.resume(path)
        after = plain(fresh).state_dict() if isinstance(fresh, Stages) else fresh.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in after.items() if name in before)
        assert not held.state

    refused(CheckpointError, "cannot read", tmp_path / "none.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(good.read_bytes()[:500])
    refused(CheckpointError, "cannot be read as a checkpoint", tmp_path / "torn.ckpt")
    torch.save({"weights": document["weights"]}, tmp_path / "bare.ckpt")
    refused(CheckpointError, "no checkpoint of a UniPruner", tmp_path / "bare.ckpt")
    torch.save(document | {"model": AGP(end=3)}, tmp_path / "code.ckpt")  # a class, which is not to be made
    refused(CheckpointError, "cannot be read as a checkpoint", tmp_path / "code.ckpt")
    refused(ArgumentError, "min_width|run=", pruning_step=8, filter_lower_threshold=8)
    refused(ArgumentError, "has an optimizer", with_optimizer=False)
    plain_model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3)).double()
    refused(ArgumentError, "is of another model", model=plain_model)
