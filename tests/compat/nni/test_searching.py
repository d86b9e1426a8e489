"""NNI's pruners that try, with NNI's arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.searching.spaces import Blocks, layers
from torchshear.compat.nni import NetAdaptPruner, SensitivityPruner, SimulatedAnnealingPruner
from torchshear.errors import ArgumentError, KeywordError
from torchshear.pruners.masks import Masks

torch.manual_seed(0)
X = torch.randn(32, 8)
CONFIG = [{"sparsity": 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["4"]}]


def network() -> nn.Sequential:
    return layers(8, 20, 12, 3)


def evaluator(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(X) - network()(X)).square().mean())


def loss(model: nn.Module) -> float:
    return -evaluator(model)


def tune(model: nn.Module) -> None:
    with torch.no_grad():
        model[4].bias += 0.0


MAKES: dict[str, Any] = {
    "annealing": lambda **o: SimulatedAnnealingPruner(
        network(), CONFIG, evaluator=evaluator, base_algo="l1", cool_down_rate=0.5, experiment_data_dir="./", **o
    ),
    "netadapt": lambda **o: NetAdaptPruner(
        network(), CONFIG, short_term_fine_tuner=tune, evaluator=evaluator, base_algo="l1", **o
    ),
    "sensitivity": lambda **o: SensitivityPruner(
        network(), CONFIG, evaluator, finetuner=tune, base_algo="l1", sparsity_per_iter=0.3, acc_drop_threshold=1.0, **o
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_an_example_of_nni_runs_without_example_inputs(name: str, tmp_path: Path) -> None:
    pruner = MAKES[name]()
    small = pruner.compress()
    assert small is pruner.compress() is pruner.shrink().model
    assert small(X).shape == (32, 3)
    assert small[0].out_features + small[2].out_features <= 16
    assert pruner.found.method == name
    assert pruner.shrink().verification.max_error < 1e-12
    pruner.export_model(tmp_path / "model.pth", tmp_path / "masks.safetensors", tmp_path / "model.onnx")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert torch.equal(state["0.weight"], small.state_dict()["0.weight"])
    masks = Masks.load(tmp_path / "masks.safetensors")
    assert int(masks.tensors["0.weight"].any(1).sum()) == small[0].out_features
    assert (tmp_path / "model.onnx").exists()


def test_all_entries_count_and_not_the_first_alone() -> None:
    """NNI takes the share of the first entry for all."""
    config = [{"sparsity": 0.2, "op_names": ["0"]}, {"sparsity": 0.7, "op_names": ["2"]}]
    pruner = SimulatedAnnealingPruner(network(), config, evaluator, options={"trials": 2}, args=X)
    pruner.compress()
    assert pruner.found.targets["channels"] == pytest.approx(1 - (20 * 0.2 + 12 * 0.7) / 32)


def test_a_loss_is_minimised() -> None:
    options = {"options": {"trials": 4}, "args": X, "start_temperature": 50, "stop_temperature": 10}
    low = SimulatedAnnealingPruner(network(), CONFIG, loss, optimize_mode="minimize", **options)
    high = SimulatedAnnealingPruner(network(), CONFIG, evaluator, **options)
    low.compress(), high.compress()
    assert low.found.best.widths == high.found.best.widths


def test_coupled_layers_stay_coupled() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 6)
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    options = {"options": {"trials": 2}, "args": x}
    pruner = SimulatedAnnealingPruner(Blocks().eval(), config, lambda model: float(model(x).detach().mean()), **options)
    assert pruner.compress()(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MAKES["annealing"](base_algo="level"), TypeError, "multiple values"),
        (lambda: SimulatedAnnealingPruner(network(), CONFIG, loss, base_algo="level"), ArgumentError, "'level' masks"),
        (lambda: SimulatedAnnealingPruner(network(), CONFIG, loss, "most"), ArgumentError, "'maximize', 'minimize'"),
        (lambda: SimulatedAnnealingPruner(network(), CONFIG, 3), ArgumentError, "evaluator is int"),
        (lambda: SimulatedAnnealingPruner(network(), CONFIG, lambda m: 1.0).compress(), ArgumentError, "does not call"),
        (lambda: NetAdaptPruner(network(), CONFIG, tune, evaluator, trainer=1), KeywordError, "no argument 'trainer'"),
        (lambda: SensitivityPruner(network(), CONFIG, evaluator, wrong=1), KeywordError, "no argument 'wrong'"),
        (lambda: MAKES["netadapt"]().pruning_rate, AttributeError, "pruning_rate"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
