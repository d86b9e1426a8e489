"""AGP and linear pruning of a model that the user, or a function of the user, trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.compat.nni.plain import Plain
from tests.training.loops import images, perceptron, residual, sgd, vectors
from torchshear.compat.nni import AGPPruner, LinearPruner
from torchshear.errors import ArgumentError, CaptureError
from torchshear.pruners import masks

TIMED = {"initial_sparsity": 0.0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 10, "frequency": 1}
AGP = [0, 0.238, 0.424, 0.563, 0.663, 0.730, 0.770, 0.791, 0.799, 0.8]  # of NNI 2.0, epochs 0 to 9


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, n_steps: int = 2, first: int = 0) -> None:
    model.train()
    for step in range(first, first + n_steps):
        x, target = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


def asked(pruner: AGPPruner) -> list[float]:
    return [round(one.asked, 3) for one in pruner.history.renewals]


def trainer_of(batch: Any, calls: list[tuple[Any, ...]]) -> Any:
    def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        calls.append((model, optimizer, criterion, epoch, model.training))
        for step in range(2):
            x, target = batch(step)
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            optimizer.step()

    return trainer


def test_agp_of_the_first_form_takes_what_nni_takes_at_its_epochs() -> None:
    """Masks are by hand: in each layer the floor(n s) weights of least magnitude, with those that went before."""
    model = perceptron()
    optimizer = sgd(model)
    parameters = {id(one) for one in model.parameters()}
    pruner = AGPPruner(model, [{**TIMED, "op_types": ["default"]}], optimizer)
    assert pruner.compress() is model is pruner.bound_model
    kept = {name: torch.ones_like(value, dtype=torch.bool) for name, value in laid_or_whole(model).items()}
    for epoch in range(12):
        pruner.update_epoch(epoch)
        if epoch:
            for name, one in kept.items():
                weight = dense(model)[name].abs() * one
                n_gone = int(one.numel() * 0.8 * (1 - (1 - min(epoch, 9) / 9) ** 3) + 1e-9)
                order = weight.flatten().argsort(stable=True)[:n_gone]
                now = torch.ones(one.numel(), dtype=torch.bool)
                now[order] = False
                if epoch <= 9:
                    kept[name] = now.reshape(one.shape)
                assert torch.equal(laid(model)[name], kept[name]), (epoch, name)
        train(model, optimizer, vectors)
    assert asked(pruner) == AGP
    assert {id(one) for one in model.parameters()} == parameters
    for name, one in kept.items():
        assert not dense(model, "grad")[name][~one].any()
    x = vectors(9)[0]
    result = pruner.shrink()
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
    assert result.history.target == 0.8


def laid_or_whole(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": one.weight for name, one in model.named_modules() if isinstance(one, nn.Linear)}


def dense(model: nn.Module, what: str = "") -> dict[str, Tensor]:
    """The dense weights below the masks, or their gradients."""
    found = {}
    for name, one in model.named_modules():
        if isinstance(one, nn.Linear):
            weight = one.parametrizations.weight.original
            found[f"{name}.weight"] = weight.grad if what else weight.detach()
    return found


def test_a_frequency_of_three_prunes_at_epochs_0_3_6_9() -> None:
    model = perceptron()
    pruner = AGPPruner(model, [{**TIMED, "frequency": 3, "op_types": ["Linear"]}], sgd(model), args=vectors(0)[0])
    pruner.compress()
    for epoch in range(10):
        pruner.update_epoch(epoch)
    assert [(one.epoch, round(one.asked, 3)) for one in pruner.history.renewals] == [
        (0, 0), (3, 0.563), (6, 0.77), (9, 0.8)]  # fmt: skip


def test_entries_have_schedules_of_their_own() -> None:
    model, counts = perceptron(), []
    config = [
        {**TIMED, "initial_sparsity": 0.25, "final_sparsity": 0.5, "end_epoch": 3, "op_names": ["0"]},
        {**TIMED, "final_sparsity": 0.75, "start_epoch": 1, "end_epoch": 6, "frequency": 2, "op_names": ["2"]},
    ]
    pruner = LinearPruner(model, config, sgd(model), args=vectors(0)[0])
    pruner.compress()
    for epoch in range(7):
        pruner.update_epoch(epoch)
        counts.append([int((~laid(model)[name]).sum()) for name in ("0.weight", "2.weight")])
    assert counts == [[32, 0], [48, 0], [64, 0], [64, 72], [64, 72], [64, 144], [64, 144]]
    assert [one.epoch for one in pruner.history.renewals] == [0, 1, 2, 3, 5]


def test_an_entry_may_begin_above_what_goes_of_all_layers_together() -> None:
    model = perceptron()
    config = [
        {**TIMED, "initial_sparsity": 0.25, "final_sparsity": 0.3, "end_epoch": 2, "op_names": ["4"]},
        {**TIMED, "final_sparsity": 0.1, "end_epoch": 2, "op_names": ["2"]},
    ]
    pruner = AGPPruner(model, config, sgd(model), args=vectors(0)[0])
    pruner.compress()
    assert [int((~mask).sum()) for mask in laid(model).values()] == [0, 15]
    pruner.update_epoch(1)
    assert [int((~mask).sum()) for mask in laid(model).values()] == [19, 18]


def test_a_span_below_the_frequency_prunes_at_once() -> None:
    """NNI stops there with an assertion."""
    model = perceptron()
    entry = {**TIMED, "start_epoch": 2, "end_epoch": 4, "frequency": 5, "op_types": ["Linear"]}
    pruner = AGPPruner(model, [entry], sgd(model), args=vectors(0)[0])
    pruner.compress()
    for epoch in range(4):
        pruner.update_epoch(epoch)
    assert [(one.epoch, one.asked) for one in pruner.history.renewals] == [(2, 0.8)]


def test_the_initial_share_goes_at_epoch_0_and_linear_grows_by_equal_parts() -> None:
    model = perceptron()
    entry = {**TIMED, "initial_sparsity": 0.2, "end_epoch": 5, "op_names": ["0", "2"]}
    pruner = LinearPruner(model, [entry], sgd(model))
    pruner.compress()
    for epoch in range(5):
        pruner.update_epoch(epoch)
        model(vectors(0)[0])
        share = 0.2 + 0.15 * epoch
        for name, n_all in (("0.weight", 128), ("2.weight", 192)):
            assert int((~laid(model)[name]).sum()) == int(n_all * share + 1e-9)
        assert "4.weight" not in laid(model)
    assert asked(pruner) == [0.2, 0.35, 0.5, 0.65, 0.8]


@pytest.mark.parametrize("eager", [True, False])
def test_channels_go_from_the_very_model_and_the_optimizer_goes_on(eager: bool) -> None:
    model = residual()
    optimizer = sgd(model)
    x = images(0)[0]
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "op_types": ["Conv2d"]}],
        optimizer,
        pruning_algorithm="l1",
        **({"args": x} if eager else {}),
    )
    assert pruner.compress() is model
    for epoch in range(10):
        pruner.update_epoch(epoch)
        train(model, optimizer, images)
    assert [round(one.reached, 2) for one in pruner.history.renewals][-1] == 0.5
    found = laid(model)
    assert torch.equal(found["stem.bias"], found["norm.bias"])  # what is coupled goes together, with its norm
    assert torch.equal(found["stem.bias"], found["side.weight"].flatten(1).any(1))
    before = copy.deepcopy(model.state_dict())
    result = pruner.shrink()
    assert result.model.stem.out_channels == 4
    assert result.model.last.in_channels == 4
    assert result.model.last.out_channels == 6
    assert result.verification.max_error < 1e-12
    model.eval()
    torch.testing.assert_close(result.model.eval()(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    train(model, optimizer, images)  # and on
    assert torch.equal(laid(model)["stem.bias"], found["stem.bias"])
    later = pruner.shrink().model.eval()
    model.eval()
    torch.testing.assert_close(later(x), model(x), rtol=1e-12, atol=1e-12)


def test_channels_are_chosen_by_hand() -> None:
    """At each epoch the channels of least summed L1 norm of the layers that make them, those that went first."""
    model = residual()
    optimizer = sgd(model)
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.75, "end_epoch": 4, "op_names": ["stem", "side"]}],
        optimizer,
        pruning_algorithm="l1",
        args=images(0)[0],
    )
    pruner.compress()
    gone: set[int] = set()
    for epoch in range(4):
        stem, side = (one.weight.detach().abs().flatten(1).sum(1) for one in (model.stem, model.side))
        share = 0.75 * (1 - (1 - epoch / 3) ** 3)
        order = sorted(range(8), key=lambda c: (c not in gone, float(stem[c] + side[c])))
        gone = set(order[: int(8 * share + 1e-9)])
        pruner.update_epoch(epoch)
        assert {c for c in range(8) if not laid(model)["stem.bias"][c]} == gone
        train(model, optimizer, images)
    assert len(gone) == 6


def test_the_later_form_calls_the_trainer() -> None:
    model, calls = residual(), []
    optimizer = sgd(model)
    model.eval()
    criterion = nn.CrossEntropyLoss()
    pruner = AGPPruner(
        model,
        [{"sparsity": 0.8, "op_types": ["Conv2d"]}],
        optimizer,
        trainer_of(images, calls),
        criterion,
        num_iterations=3,
        epochs_per_iteration=2,
        pruning_algorithm="l2",
    )
    assert pruner.compress() is model is pruner.compress()
    assert [call[3] for call in calls] == [0, 1, 2, 3, 4, 5]
    assert all(call[:3] == (model, optimizer, criterion) and call[4] for call in calls)
    assert not model.training
    assert [(one.epoch, round(one.asked, 3)) for one in pruner.history.renewals] == [(0, 0), (2, 0.7), (4, 0.8)]
    assert pruner.shrink().model.stem.out_channels == 2
    assert pruner.get_pruned_weights()["stem.weight"] == 0.75


def test_the_scales_of_norms_go_little_by_little() -> None:
    """NNI takes the whole share of slim at the first event."""
    model = residual()
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "end_epoch": 4, "op_types": ["BatchNorm2d"]}],
        sgd(model),
        pruning_algorithm="slim",
        args=images(0)[0],
    )
    pruner.compress()
    for epoch in range(4):
        pruner.update_epoch(epoch)
    counts = [sum(one.widths.values()) for one in pruner.history.renewals]
    assert counts == [20, 20 - int(10 * 19 / 27), 20 - int(10 * 26 / 27), 10]


def test_entries_are_ranked_apart_and_each_by_its_own_share() -> None:
    """NNI takes the share of the first entry for all."""
    model = residual()
    config = [
        {"final_sparsity": 0.25, "end_epoch": 1, "op_names": ["norm"]},
        {"final_sparsity": 0.5, "end_epoch": 1, "op_names": ["scale"]},
    ]
    pruner = AGPPruner(model, config, pruning_algorithm="slim", args=images(0)[0])
    pruner.compress()
    assert list(pruner.history.renewals[-1].widths.values()) == [6, 6]
    for name, n_gone in (("norm", 2), ("scale", 6)):
        sizes = getattr(model, name).parametrizations.weight.original.detach().abs()
        assert set(torch.nonzero(~laid(model)[f"{name}.weight"]).flatten().tolist()) == set(
            sizes.argsort()[:n_gone].tolist()
        )


def test_channels_of_some_layers_and_weights_of_others() -> None:
    model = perceptron()
    config = [
        {"sparse_ratio": 0.5, "granularity": "out_channel", "op_names": ["0"]},
        {"sparse_ratio": 0.25, "op_names": ["2"]},
    ]
    pruner = AGPPruner(model, config, num_iterations=1, args=vectors(0)[0])
    pruner.compress()
    assert int(laid(model)["0.bias"].sum()) == 8
    small, x = pruner.shrink().model, vectors(9)[0]
    assert small[0].out_features == 8
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_since_the_last_event() -> None:
    """NNI adds contributions up over the whole training. By hand: (w g)^2 over the steps of one epoch, by rows."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "end_epoch": 2, "op_names": ["0"]}],
        optimizer,
        pruning_algorithm="taylorfo",
    )
    pruner.compress()
    hand = copy.deepcopy(model)
    pruner.update_epoch(0)
    train(model, optimizer, vectors, 3)
    by_hand = torch.optim.SGD(hand.parameters(), lr=0.1)
    scores = torch.zeros(16, dtype=torch.float64)
    for step in range(3):
        x, target = vectors(step)
        by_hand.zero_grad()
        functional.cross_entropy(hand(x), target).backward()
        scores += (hand[0].weight * hand[0].weight.grad).square().sum(1).detach()
        by_hand.step()
    pruner.update_epoch(1)
    expected = set(scores.argsort()[:8].tolist())
    assert {c for c in range(16) if not laid(model)["0.bias"][c]} == expected


@pytest.mark.parametrize("word", ["apoz", "mean_activation"])
def test_activations_are_those_of_the_latest_batch_behind_norm_and_relu(word: str) -> None:
    """NNI looks at the output of the convolution, before the norm."""
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.norm.bias.uniform_(-1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "end_epoch": 2, "op_names": ["one"]}],
        optimizer,
        pruning_algorithm=word,
    )
    pruner.compress()
    pruner.update_epoch(0)
    generator = torch.Generator().manual_seed(5)
    targets = torch.tensor([0, 1, 2, 3])
    batches = [(torch.randn(4, 3, 8, 8, generator=generator) * n - n, targets) for n in (1, 2, 4)]
    train(model, optimizer, lambda step: batches[step], 3)
    model.eval()
    with torch.no_grad():
        active = functional.relu(model.norm(model.one(batches[-1][0])))
    scores = (active > 0).double().mean((0, 2, 3)) if word == "apoz" else active.double().mean((0, 2, 3))
    model.train()
    pruner.update_epoch(1)
    assert {c for c in range(8) if not laid(model)["one.bias"][c]} == set(scores.argsort(stable=True)[:4].tolist())


def test_equal_weights_go_in_exactly_the_number_asked_for() -> None:
    """NNI 2.0 takes all that are tied with the threshold: three of [1, 1, 1, 2] for a quarter."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.25, "end_epoch": 1, "op_types": ["Linear"]}],
        sgd(model),
        args=torch.ones(1, 4),
    )
    pruner.compress()
    pruner.update_epoch(0)
    assert laid(model)["0.weight"].tolist() == [[True, True, False, True]]


def test_copies_of_a_waiting_model_and_a_failing_first_call() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum().item() > 0 else x

    model = perceptron()
    pruner = AGPPruner(model, [{**TIMED, "op_types": ["Linear"]}], sgd(model))
    pruner.compress()
    copy.deepcopy(model)(vectors(0)[0])
    with pytest.raises(ArgumentError, match="has not been called yet"):
        pruner.shrink()
    with torch.no_grad():
        model.eval()(vectors(0)[0])  # looking at it is enough
    assert set(laid(model)) == {"0.weight", "2.weight", "4.weight"}
    branching = Branching()
    AGPPruner(branching, [{**TIMED, "op_types": ["Linear"]}], sgd(branching)).compress()
    for _ in range(2):
        with pytest.raises(CaptureError):
            branching(torch.ones(1, 4))
    assert not hasattr(branching.fc, "parametrizations")


def test_mixed_precision_and_an_evaluation_that_comes_first() -> None:
    """The first call is one without gradients; steps come by a scaler, which undoes its scale before they do."""
    model = residual().float()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    config = [{**TIMED, "final_sparsity": 0.5, "end_epoch": 2, "op_types": ["Conv2d"]}]
    pruner = AGPPruner(model, config, optimizer, pruning_algorithm="taylorfo")
    pruner.compress()
    x, target = images(0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(x.float())
    model.train()
    for epoch in range(2):
        pruner.update_epoch(epoch)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x.float()), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    result = pruner.shrink()
    assert result.model.stem.out_channels == 4
    assert {one.dtype for one in result.model.parameters()} == {torch.float32}


def test_masks_that_were_loaded_are_those_that_are_shrunk() -> None:
    model = residual()
    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "end_epoch": 2, "op_types": ["Conv2d"]}],
        pruning_algorithm="l1",
        args=images(0)[0],
    )
    pruner.compress()
    whole = copy.deepcopy(model.state_dict())
    for epoch in range(2):
        pruner.update_epoch(epoch)
    assert pruner.shrink().model.stem.out_channels == 4
    model.load_state_dict(whole)
    assert pruner.shrink().model.stem.out_channels == 8


def test_files(tmp_path: Path) -> None:
    model = residual().float()
    optimizer = sgd(model)

    def floats(step: int) -> tuple[Tensor, Tensor]:
        x, target = images(step)
        return x.float(), target

    pruner = AGPPruner(
        model,
        [{**TIMED, "final_sparsity": 0.5, "end_epoch": 2, "op_types": ["Conv2d"]}],
        optimizer,
        pruning_algorithm="fpgm",
    )
    pruner.compress()
    for epoch in range(2):
        pruner.update_epoch(epoch)
        train(model, optimizer, floats)
    pruner.export_model(tmp_path / "m.pth", tmp_path / "m.safetensors", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()
    fresh = residual(1).float()
    fresh.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    x = floats(0)[0]
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))
    read = masks.Masks.load(tmp_path / "m.safetensors")
    assert all(torch.equal(mask, read.tensors[name]) for name, mask in laid(model).items())


REFUSED: list[tuple[Any, str]] = [
    ({"config_list": [{**TIMED, "initial_sparsity": 0.9, "op_types": ["Linear"]}]}, "initial=0.9 is above"),
    ({"config_list": [{**TIMED, "end_epoch": 3, "start_epoch": 3, "op_types": ["Linear"]}]}, "an end behind the start"),
    ({"config_list": [{**TIMED, "sparsity": 0.5, "op_types": ["Linear"]}]}, "which say the same"),
    ({"config_list": [{**TIMED, "frequency": 0, "op_types": ["Linear"]}]}, "frequency=0; expected an integer"),
    ({"config_list": [{**TIMED, "op_names": ["0"]}, {**TIMED, "end_epoch": 5, "op_names": ["2"]}],
      "pruning_algorithm": "slim"}, "ranked together and have different schedules"),
    ({"optimizer": "l1"}, "Give the criterion as pruning_algorithm"),
    ({"optimizer": sgd(perceptron())}, "holds none of the parameters"),
    ({"trainer": 3}, "trainer is int"),
    ({"pruning_algorithm": "l3"}, "pruning_algorithm='l3'; expected one of 'level', 'l1'"),
    ({"finetuner": print}, "two forms of the pruner"),
    ({"total_iteration": 3}, "optimizer= and total_iteration= are words of two forms"),
    ({"data": [1]}, "does not look at it"),
    ({"pruning_algorithm": "taylorfo", "optimizer": None}, "by the steps of its optimizer"),
    ({"pruning_algorithm": "taylorfo", "data": [1]}, "give a loss as loss_fn="),
    ({"batches": 3}, "batches= goes with data="),
    ({"args": vectors(0)[0], "dummy_input": vectors(0)[0]}, "two words for the example inputs"),
    ({"scale": 1}, "no argument 'scale'.*SlimPruner"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_what_is_refused(changed: dict[str, Any], said: str) -> None:
    model = perceptron()
    options: dict[str, Any] = {"optimizer": sgd(model), "args": vectors(0)[0]}
    options |= {"config_list": [{**TIMED, "op_types": ["Linear"]}], **changed}
    with pytest.raises(ArgumentError, match=said):
        AGPPruner(model, **options).compress()
    assert list(model.state_dict()) == list(perceptron().state_dict())


def test_methods_of_the_other_form_and_of_other_tools_answer() -> None:
    model = perceptron()
    pruner = AGPPruner(model, [{**TIMED, "op_types": ["Linear"]}], sgd(model))
    with pytest.raises(ArgumentError, match="compress\\(\\) has not been called"):
        pruner.masks  # noqa: B018
    with pytest.raises(ArgumentError, match="compress\\(\\) has not been called"):
        pruner.update_epoch(0)
    with pytest.raises(ArgumentError, match="goes with total_iteration="):
        pruner.get_best_result()
    with pytest.raises(AttributeError, match="has no 'update_mask'"):
        pruner.update_mask()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pruner.nothing  # noqa: B018
