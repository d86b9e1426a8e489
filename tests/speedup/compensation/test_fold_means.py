"""Means of removed channels over data in the biases of their readers: against modules with those means, and by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Attention, Classifier, image, labelled, randomise
from tests.oracle import assert_same_function, fingerprint
from tests.speedup.compensation.faults import spoil_folds
from torchshear.errors import ArgumentError, DataError, VerificationError
from torchshear.pruners import channel_means, plan_from_kept
from torchshear.speedup import Shrunk, TracedModule, fold_constants, shrink_to_form

FORMS = ("native", "traced")


def folded(model: nn.Module, batches: list[Any], form: str | None = None, ratio: float = 0.5) -> tuple[Any, Shrunk]:
    """A plan, and what it makes of a model with means over some batches folded."""
    first = batches[0][0] if isinstance(batches[0], tuple) else batches[0]
    groups = torchshear.analyze(torchshear.trace(model, (first,)))
    plan = torchshear.plan(groups, ratio=ratio)
    shrunk = shrink_to_form(model, plan, form=form)  # type: ignore[arg-type]
    return plan, fold_constants(model, shrunk, plan, means=channel_means(groups, batches, len(batches), False))


def with_means(model: nn.Module, plan: torchshear.PruningPlan, batches: list[Tensor], readers: list[str]) -> nn.Module:
    """The original that is masked, in which the layers named see means of its own over the data on removed channels."""
    twin = copy.deepcopy(model).double().eval()
    masks = plan.masks()
    for name in readers:
        seen: list[Tensor] = []
        layer, keep = twin.get_submodule(name), masks[f"{name}.weight"]
        dim = 1 if isinstance(layer, nn.Conv2d) else -1
        removed = ~keep.any(0).reshape(keep.shape[1], -1).any(1)
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for batch in batches:
            twin(batch.double())
        handle.remove()
        mean = torch.cat([one.movedim(dim, -1).flatten(0, -2) for one in seen]).mean(0)
        twin.get_submodule(name).register_buffer("_removed", removed)
        twin.get_submodule(name).register_buffer("_mean", mean)
        twin.get_submodule(name).dim = dim
    for name, module in twin.named_modules():
        mask = masks.get(f"{name}.weight")
        if mask is not None and mask.ndim > 1:
            gone = ~mask.flatten(1).any(1)
            with torch.no_grad():
                module.weight[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
        elif mask is not None:
            module.register_forward_hook(lambda _, __, y, mask=mask: y * mask.reshape(1, -1, *[1] * (y.ndim - 2)))
    for name in readers:
        twin.get_submodule(name).register_forward_pre_hook(_seeing_means)
    return twin


def _seeing_means(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    x = args[0].movedim(layer.dim, -1)
    return torch.where(layer._removed, layer._mean, x).movedim(-1, layer.dim)


@pytest.mark.parametrize("form", FORMS)
def test_two_layers_by_hand(form: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).double()
    batches = [torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)]
    groups = torchshear.analyze(torchshear.trace(model, (batches[0],)))
    plan = plan_from_kept(groups, {"0.weight[0]": [0, 3, 5]})
    shrunk = fold_constants(
        model,
        shrink_to_form(model, plan, form=form),  # type: ignore[arg-type]
        plan,
        means=channel_means(groups, batches, 2, False),
    )
    means = torch.relu(model[0](torch.cat(batches))).mean(0)
    assert shrunk.fold is not None
    small = dict(shrunk.model.named_parameters())
    expected = model[2].bias + sum(means[unit] * model[2].weight[:, unit] for unit in (1, 2, 4))
    torch.testing.assert_close(small["2.bias"], expected)
    assert torch.equal(small["0.bias"], model[0].bias[[0, 3, 5]])
    assert shrunk.fold.kind == "means"
    assert [(one.layer, one.into, one.n_channels) for one in shrunk.fold.folded] == [("2", "2.bias", 3)]
    assert shrunk.fold.skipped == ()


class Mixed(nn.Module):
    """Readers that permit it, one whose padding does not, a residual sum, and one without a bias before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.padded = nn.Conv2d(8, 8, 3, padding=1)
        self.open = nn.Conv2d(8, 12, 3, bias=False)
        self.open_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + functional.silu(self.padded(x))
        return self.head(functional.gelu(self.open_norm(self.open(x))).mean((2, 3)))


@pytest.mark.parametrize("form", FORMS)
def test_equal_to_the_masked_network_that_sees_means(form: str) -> None:
    model, batches = randomise(Mixed()).double(), [image(3).double(), image(3).double() + 1]
    before = fingerprint(model)
    plan, shrunk = folded(model, batches, form)
    assert fingerprint(model) == before
    assert isinstance(shrunk.model, TracedModule) == (form == "traced")
    assert shrunk.fold is not None
    into = {one.layer: one.into for one in shrunk.fold.folded}
    assert into == {"open": "open_norm.running_mean", "head": "head.bias"}
    assert [(one.layer, "padding" in one.reason) for one in shrunk.fold.skipped] == [("padded", True)]
    assert shrunk.fold.max_error <= 1e-9
    assert_same_function(with_means(model, plan, batches, ["open", "head"]), shrunk.model, (batches[0],))


def test_activations_in_place() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.SiLU(inplace=True), nn.Linear(6, 2)
    )
    model, batches = randomise(model).double(), [torch.randn(7, 4, dtype=torch.float64)]
    plan, shrunk = folded(model, batches)
    assert shrunk.fold is not None
    assert [one.layer for one in shrunk.fold.folded] == ["2", "4"]
    assert_same_function(with_means(model, plan, batches, ["2", "4"]), shrunk.model, (batches[0],))


def test_what_attention_reads_folds() -> None:
    model, x = randomise(Attention()).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plan = torchshear.plan(groups, ratio=0.5)
    shrunk = fold_constants(
        model, shrink_to_form(model, plan), plan, means=channel_means(groups, [x], 1, progress=False)
    )
    assert shrunk.fold is not None
    assert shrunk.fold.folded
    assert shrunk.fold.max_error <= 1e-9


def test_the_error_of_a_reader_is_least_on_the_data() -> None:
    """Any other constants in place of the means give a larger squared error, as those without data do."""
    model, x = (
        randomise(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))).double(),
        torch.randn(512, 4).double(),
    )
    groups = torchshear.analyze(torchshear.trace(model, (x[:2],)))
    plan = torchshear.plan(groups, ratio=1 / 16)
    means = channel_means(groups, [x], 1, progress=False)

    def error(change: Callable[[Shrunk], Shrunk]) -> float:
        with torch.no_grad():
            return float((change(shrink_to_form(model, plan)).model(x) - model(x)).square().mean())

    best = error(lambda shrunk: fold_constants(model, shrunk, plan, means=means))
    assert best < error(lambda shrunk: shrunk)
    assert best < error(lambda shrunk: fold_constants(model, shrunk, plan))
    for factor in (0.9, 1.1):
        others = {key: factor * line for key, line in means.items()}
        assert best < error(lambda shrunk, others=others: fold_constants(model, shrunk, plan, means=others))


def test_layers_that_were_not_seen_are_told() -> None:
    model, x = randomise(Mixed()), image(3)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plan = torchshear.plan(groups, ratio=0.5)
    means = {key: line for key, line in channel_means(groups, [x], 1, False).items() if len(line) == 8}
    fold = fold_constants(model, shrink_to_form(model, plan), plan, means=means).fold
    assert fold is not None
    assert {one.layer: one.reason for one in fold.skipped}["head"] == "what it reads was not seen on the data"


def test_prune_takes_means_of_its_data() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    batches = labelled()
    plain = torchshear.prune(model, (image(size=6),))
    result = torchshear.prune(model, (image(size=6),), compensate="means", data=iter(batches), batches=3)
    assert result.fold is not None
    assert result.fold.kind == "means"
    assert plain.plan.masks().keys() == result.plan.masks().keys()
    assert {one.layer for one in result.fold.folded} == {"two", "three", "out"}
    groups = torchshear.analyze(torchshear.trace(model, (image(size=6),)))
    means = channel_means(groups, batches, 3, False)
    expected = fold_constants(model, shrink_to_form(model, result.plan), result.plan, means=means).model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor), name


def test_data_that_does_not_fit_is_told() -> None:
    model = Classifier().eval()
    with pytest.raises(DataError, match="ended after 3 of 4 batches"):
        torchshear.prune(model, (image(size=6),), compensate="means", data=labelled(), batches=4)
    groups = torchshear.analyze(torchshear.trace(model, (image(size=6),)))
    with pytest.raises(ArgumentError, match="batches=0"):
        channel_means(groups, labelled(), 0)
    bad = [(torch.full((2, 3, 6, 6), torch.inf), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(DataError, match="activations of batch 0 are NaN or infinite"):
        channel_means(groups, bad, 1, progress=False)


def test_a_wrong_fold_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_folds(monkeypatch, "out.bias")
    with pytest.raises(VerificationError, match=r"folded into .*out\.bias.*differs by"):
        torchshear.prune(Classifier().eval(), (image(size=6),), compensate="means", data=labelled(), batches=3)
