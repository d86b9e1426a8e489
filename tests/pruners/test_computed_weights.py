"""Weights that are computed, under masks, norms and parametrizations, are scored as the network reads them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import torchshear
from tests.networks import randomise
from tests.oracle import assert_outputs_equal, fresh_inputs
from torchshear.calibration._weight_source import weights_to_score
from torchshear.compat.nni import L1NormPruner
from torchshear.dependency import ChannelGroups
from torchshear.errors import MaskError, WeightError
from torchshear.pruners import UnscorableError, masks, registered_criteria
from torchshear.pruners.criteria._criterion import find_criterion, needs_of
from torchshear.pruners.selection._scoring import group_scores

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TARGET = torch.tensor([1, 3])
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class Exponential(nn.Module):
    """A weight that is always positive."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


class Standardised(nn.Module):
    """Rows of mean 0 and variance 1."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / rows.var(1, keepdim=True).sqrt()).reshape(weight.shape)


class Adapted(nn.Module):
    """A weight with a learned change of low rank."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        rows = weight.flatten(1)
        self.up = nn.Parameter(torch.randn(len(rows), 2, generator=generator).to(weight))
        self.down = nn.Parameter(torch.randn(2, rows.shape[1], generator=generator).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def masked_rows(layer: nn.Module) -> None:
    prune.random_structured(layer, "weight", 0.5, dim=0)


def masked_with_bias(layer: nn.Module) -> None:
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(layer, "bias", 0.3)
    prune.random_unstructured(layer, "weight", 0.3)


def own_mask(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    masks.apply(layer, masks.Masks.of({"weight": torch.rand(layer.weight.shape, generator=generator) < 0.6}))


def normed(wrap: Callable[..., nn.Module]) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        wrap(layer)
        if wrap in (weight_norm, parametrizations.weight_norm):  # lengths of v change nothing
            v = layer.weight_v if wrap is weight_norm else layer.parametrizations.weight.original1
            with torch.no_grad():
                v.mul_(torch.logspace(-3, 3, len(v), dtype=v.dtype).reshape(-1, *[1] * (v.ndim - 1)))

    return change


def parametrized(make: Callable[[Tensor], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(layer.weight))


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "torch_prune": masked_rows,
    "torch_prune_with_bias": masked_with_bias,
    "own_masks": own_mask,
    "weight_norm": normed(parametrizations.weight_norm),
    "old_weight_norm": normed(weight_norm),
    "spectral_norm": normed(parametrizations.spectral_norm),
    "old_spectral_norm": normed(spectral_norm),
    "exponential": parametrized(lambda _: Exponential()),
    "standardised": parametrized(lambda _: Standardised()),
    "low_rank": parametrized(Adapted),
}


def network() -> nn.Sequential:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()]
    return randomise(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()).eval()


def pair(way: str) -> tuple[nn.Module, nn.Module]:
    """A network whose weights are computed, and one of plain layers that hold the same weights."""
    torch.manual_seed(0)
    computed, plain = network(), network()
    for layer in (0, 3, 7):
        WAYS[way](computed[layer])
    computed(X)
    with torch.no_grad():
        for layer in (0, 3, 7):
            plain[layer].weight.copy_(computed[layer].weight)
            plain[layer].bias.copy_(computed[layer].bias)
        assert_outputs_equal(computed(X), plain(X), 1e-12)
    return computed, plain


def analysed(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (X,)))


def scored(model: nn.Module, criteria: list[str]) -> dict[str, list[np.ndarray]]:
    """Scores of the outputs of both convolutions by each criterion; nothing where it has nothing to say."""
    groups = analysed(model)
    loader = [(X, TARGET), (fresh_inputs(X, 9), TARGET)]
    statistics = torchshear.collect(groups, loader, nn.functional.cross_entropy, 2, False, registered_criteria())
    weights = weights_to_score(groups, None)
    found: dict[str, list[np.ndarray]] = {}
    for criterion in criteria:
        for group in sorted(groups.prunable, key=lambda group: -group.width)[:2]:
            try:
                scores = group_scores(group, find_criterion(criterion), weights, statistics)
            except UnscorableError:
                scores = np.zeros(0)
            found.setdefault(criterion, []).append(scores)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_same_weights_in_plain_layers(way: str) -> None:
    criteria = [word for word in registered_criteria() if word != "random"]
    computed, plain = (scored(model, criteria) for model in pair(way))
    for criterion in criteria:
        assert len(plain[criterion][0]) == 16, criterion
        for one, other in zip(computed[criterion], plain[criterion], strict=True):
            room = 1e-9 * max(1.0, np.abs(other).max(initial=0))
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=room, err_msg=criterion)


def live(layer: nn.Module) -> list[int]:
    return layer.weight.detach().flatten(1).norm(dim=1).nonzero().flatten().tolist()


def with_dead_filters(hide: Callable[[nn.Module], None]) -> nn.Module:
    """Half of the filters of the first layer are dead, with their biases and shifts."""
    torch.manual_seed(0)
    model = network()
    hide(model[0])
    model(X)
    dead = torch.tensor([unit not in live(model[0]) for unit in range(16)])
    with torch.no_grad():
        for tensor in (model[0].bias, model[1].weight, model[1].bias):
            tensor[dead] = 0
    assert len(live(model[0])) == 8
    return model


def own_dead_filters(layer: nn.Module) -> None:
    kept = torch.arange(16) % 3 > 0
    kept[[1, 2]] = False
    kept = kept.reshape(-1, 1, 1, 1).expand_as(layer.weight)
    masks.apply(layer, masks.Masks.of({"weight": kept.clone()}))


HIDDEN = {"torch_prune": masked_rows, "own_masks": own_dead_filters}


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "lamp"])
@pytest.mark.parametrize("how", HIDDEN)
def test_filters_that_masks_ended_go_and_live_ones_stay(how: str, criterion: str) -> None:
    model = with_dead_filters(HIDDEN[how])
    result = torchshear.prune(model, (X,), criterion=criterion, ratio={"0": 0.5})
    assert next(iter(result.plan.kept.values())).tolist() == live(model[0])
    with torch.no_grad():
        assert_outputs_equal(result.model(X), model(X), 1e-9)
    assert result.form == "native"
    assert tuple(result.model[0].weight.shape) == (8, 3, 3, 3)


@pytest.mark.parametrize("dependency_aware", [False, True])
@pytest.mark.parametrize("how", HIDDEN)
def test_pruner_classes_see_masks_that_lie_on_the_model(how: str, dependency_aware: bool) -> None:
    model = with_dead_filters(HIDDEN[how])
    config = [{"op_names": ["0"], "sparsity": 0.5}]
    pruner = L1NormPruner(model, config, args=(X,), dependency_aware=dependency_aware)
    with torch.no_grad():
        assert_outputs_equal(pruner.compress()(X), model(X), 1e-9)
        result = pruner.shrink()
        assert_outputs_equal(result.model(X), model(X), 1e-9)
    assert next(iter(result.plan.kept.values())).tolist() == live(model[0])


@pytest.mark.parametrize("way", ["old_weight_norm", "old_spectral_norm"])
def test_the_masked_copy_of_a_computed_weight_computes_what_the_small_model_does(way: str) -> None:
    model, _ = pair(way)
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparsity": 0.5}], args=(X,))
    with torch.no_grad():
        assert_outputs_equal(pruner.compress()(X), pruner.shrink().model(X), 1e-9)


@pytest.mark.parametrize("way", ["weight_norm", "exponential", "standardised"])
def test_masks_that_cannot_lie_below_a_parametrization_say_so(way: str) -> None:
    model, _ = pair(way)
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparsity": 0.5}], args=(X,))
    with pytest.raises(MaskError, match=r"make the weight permanent first .*torchshear\.prune"):
        pruner.compress()


@pytest.mark.parametrize("how", HIDDEN)
def test_a_plan_from_masks_that_lie_on_the_model(how: str) -> None:
    model = with_dead_filters(HIDDEN[how])
    prune.ln_structured(model[3], "weight", 0.5, n=1, dim=1)  # half of the inputs of the second layer, which reads
    read = model[3].weight.detach().abs().sum((0, 2, 3)) > 0
    model(X)
    groups = analysed(model)
    plan = masks.plan_from_masks(groups)
    stays = [unit for unit in live(model[0]) if read[unit]]
    assert 0 < len(stays) < 8
    assert {len(kept): kept.tolist() for kept in plan.kept.values()}[len(stays)] == stays
    small = torchshear.shrink(model, plan)
    with torch.no_grad():
        for x in (X, fresh_inputs(X, 3)):
            assert_outputs_equal(small(x), model(x), 1e-9)
    assert tuple(small[0].weight.shape) == (len(stays), 3, 3, 3)
    assert tuple(small[3].weight.shape) == (8, len(stays), 3, 3)


def test_a_column_that_a_weight_norm_sees_is_not_taken_for_unread() -> None:
    """Zero columns of v can go, but a zero of the computed weight alone says nothing of the norm."""
    model = network()
    parametrizations.weight_norm(model[3])
    with torch.no_grad():
        model[3].parametrizations.weight.original1[:, :4] = 0
    plan = masks.plan_from_masks(analysed(model))
    assert plan.n_cut == 0
    assert "a norm, softmax or mean runs over it" in str(plan.groups[0].note)


def test_weights_given_beside_a_model_without_values() -> None:
    model = with_dead_filters(masked_rows)
    alive = live(model[0])
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    groups = analysed(model.to("meta"))
    plan = torchshear.plan(groups, "l1", {"0": 0.5}, weights=state)
    assert next(iter(plan.kept.values())).tolist() == alive
    del state["0.weight_mask"]
    expected = r"'0.weight_orig' is not read as it is: a weight is computed of it and of '0.weight_mask'"
    with pytest.raises(WeightError, match=expected):
        torchshear.plan(groups, "l1", {"0": 0.5}, weights=state)


class Twice(nn.Module):
    """A layer under a mask that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(self.first(x)).relu()).relu())


@pytest.mark.parametrize("criterion", ["l1", "taylor", "gradient"])
def test_a_masked_layer_that_is_called_twice_counts_with_both_calls(criterion: str) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
    masked = randomise(Twice().double()).eval()
    prune.random_unstructured(masked.shared, "weight", 0.4)
    masked(x)
    plain = Twice().double().eval()
    with torch.no_grad():
        for name in ("first", "shared", "last"):
            plain.get_submodule(name).weight.copy_(masked.get_submodule(name).weight)
            plain.get_submodule(name).bias.copy_(masked.get_submodule(name).bias)
    found = []
    for model in (masked, plain):
        groups = torchshear.analyze(torchshear.trace(model, (x,)))
        statistics = None
        if needs_of(criterion):
            loss = nn.functional.cross_entropy
            statistics = torchshear.collect(groups, [(x, torch.arange(6) % 3)], loss, 1, False)
        [group] = groups.prunable
        found.append(group_scores(group, find_criterion(criterion), weights_to_score(groups, None), statistics))
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_a_parameter_that_is_also_read_as_it_is_counts_as_it_is() -> None:
    class Both(Twice):
        def forward(self, x: Tensor) -> Tensor:
            h = self.shared(self.first(x)).relu()
            return self.last(nn.functional.linear(h, self.shared.weight.exp()))

    model = randomise(Both().double()).eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 5).double(),)))
    weights = weights_to_score(groups, None)
    assert torch.equal(weights["shared.weight"], model.shared.weight)
