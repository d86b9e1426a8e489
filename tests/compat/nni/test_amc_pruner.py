"""NNI's AMC pruner, in the forms of its versions."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.searching.spaces import layers
from torchshear.compat.nni import AMCPruner
from torchshear.errors import ArgumentError, KeywordError

torch.manual_seed(0)
X = torch.randn(32, 8)
MOST = [{"total_sparsity": 0.4, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["4"]}]


def network() -> nn.Sequential:
    return layers(8, 40, 24, 3)


def closeness(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(X) - network()(X)).square().mean())


def on_loader(loader: Any, model: nn.Module) -> float:
    assert loader == ["loader"]
    return closeness(model)


def macs(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))


MAKES: dict[str, Any] = {
    "2.0": lambda **o: AMCPruner(
        network(), [{"op_types": ["Linear"]}, MOST[1]], on_loader, ["loader"], flops_ratio=0.6, train_episode=8,
        warmup=4, reward="acc_reward", model_type="mobilenet", dataset="cifar10", suffix=None, lbound=0.1, **o,
    ),
    "2.5": lambda **o: AMCPruner(
        8, network(), MOST, X[:2], closeness, pruning_algorithm="l2", log_dir=".",
        ddpg_params={"hidden1": 300, "warmup": 4}, **o,
    ),
    "2.8": lambda **o: AMCPruner(total_episode=8, model=network(), config_list=MOST, evaluator=closeness, **o),
}  # fmt: skip


@pytest.mark.parametrize("version", MAKES)
def test_the_forms_of_all_versions(version: str) -> None:
    pruner = MAKES[version]()
    small = pruner.compress()
    assert small(X).shape == (32, 3)
    assert macs(small) <= 0.6 * macs(network())
    assert pruner.found.targets == {"macs": pytest.approx(0.6)}
    assert pruner.found.method == "amc"
    assert len(pruner.found.trials) + pruner.found.n_reused == 8
    assert [one.label.endswith("random") for one in pruner.found.trials].count(True) == {"2.8": 2}.get(version, 4)
    assert pruner.shrink().verification.max_error < 1e-12


def test_a_budget_of_parameters_and_rounded_channels() -> None:
    pruner = AMCPruner(6, network(), MOST, X[:2], closeness, target="params", channel_round=4)
    small = pruner.compress()
    count = sum(one.numel() for one in small.parameters())
    assert pruner.found.targets == {"params": pytest.approx(0.6)}
    assert count <= 0.6 * sum(one.numel() for one in network().parameters())
    assert small[0].out_features % 4 == small[2].out_features % 4 == 0


def test_words_of_the_agent_have_their_meaning() -> None:
    seen = []
    for words in ({}, {"init_delta": 0.25, "delta_decay": 0.5}, {"ddpg_params": {"init_delta": 0.25}}):
        pruner = AMCPruner(4, network(), MOST, X[:2], closeness, warmup=1, **words)
        seen.append([one.label.split()[-1] for one in pruner.found.trials][1:])
    assert seen == [["0.500", "0.495", "0.490"], ["0.250", "0.125", "0.062"], ["0.250", "0.247", "0.245"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"hidden1": 64}, "hidden1=64; it is 300 here"),
        ({"rbound": 0.9}, "rbound=0.9; it is 1 here"),
        ({"reward": "acc_flops_reward"}, "expected 'acc_reward'"),
        ({"target": "latency"}, "expected one of 'flops', 'params'"),
        ({"flops_ratio": 1.5}, "flops_ratio"),
        ({"lbound": 0.0}, "least=0"),
        ({"ddpg_params": {"speed": 1}}, "no argument 'speed'"),
        ({"pruning_algorithm": "level"}, "single weights"),
    ],
)
def test_what_means_nothing_is_refused(words: dict[str, Any], expected: str) -> None:
    with pytest.raises((ArgumentError, KeywordError), match=expected):
        AMCPruner(network(), MOST, on_loader, ["loader"], train_episode=4, **words)
