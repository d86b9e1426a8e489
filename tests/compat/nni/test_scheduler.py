"""NNI's scheduler of iterations does what the iterative pruners do."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.training.loops import perceptron, vectors
from torchshear.compat.nni import (
    AGPTaskGenerator,
    ConfigPruner,
    L1NormPruner,
    LevelPruner,
    LinearTaskGenerator,
    LotteryTicketTaskGenerator,
    PruningScheduler,
)
from torchshear.errors import ArgumentError

CONFIG = [{"sparsity": 0.5, "op_names": ["0"]}]


def tuning(seen: list[Any]) -> Any:
    def tune(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        functional.cross_entropy(model(vectors(0)[0]), vectors(0)[1]).backward()
        seen.append((model[0].out_features, int((model[0].weight == 0).sum())))
        optimizer.step()

    return tune


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        (AGPTaskGenerator, [0, 19 / 54, 26 / 54, 0.5]),
        (LinearTaskGenerator, [0, 1 / 6, 1 / 3, 0.5]),
        (LotteryTicketTaskGenerator, [1 - 0.5 ** (1 / 3), 1 - 0.5 ** (2 / 3), 0.5]),
    ],
)
def test_generators_say_what_each_iteration_takes(kind: Any, shares: list[float]) -> None:
    for pruner, speedup in ((L1NormPruner, True), ("level", False)):
        seen: list[Any] = []
        generator = kind(3, perceptron(), CONFIG, log_dir="nowhere", keep_intermediate_result=True)
        scheduler = PruningScheduler(pruner, generator, finetuner=tuning(seen), speedup=speedup)
        scheduler.compress()
        n_gone = [int((16 if speedup else 128) * share + 1e-9) for share in shares]
        assert [16 - one[0] if speedup else one[1] for one in seen] == n_gone
        number, small, kept, score, config = scheduler.get_best_result()
        assert (number, score, config) == (3, None, CONFIG)
        assert small[0].out_features == (8 if speedup else 16)
        assert int((~kept["0.weight"]).sum()) == 64


def test_weights_are_set_back() -> None:
    model, seen = perceptron(), []
    generator = AGPTaskGenerator(2, model, CONFIG)
    scheduler = PruningScheduler(L1NormPruner, generator, tuning(seen), reset_weight=True, dummy_input=vectors(0)[0])
    small = scheduler.compress()
    rows = scheduler.masks.tensors["0.weight"].any(1)
    assert torch.equal(small[0].weight, model[0].weight[rows])
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pruner": ConfigPruner}, "pruner is ConfigPruner"),
        ({"pruner": int}, "pruner is int"),
        ({"pruner": 3}, "pruner=3; expected one of 'level'"),
        ({"task_generator": 3}, "task_generator is int"),
        ({"reset_weight": 1.5}, "reset_weight=1.5"),
        ({"pruner": LevelPruner, "reset_weight": True}, "goes with a LotteryTicketTaskGenerator"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], said: str) -> None:
    given = {"pruner": L1NormPruner, "task_generator": AGPTaskGenerator(2, perceptron(), CONFIG)} | changed
    with pytest.raises(ArgumentError, match=said):
        PruningScheduler(**given)
    with pytest.raises(ArgumentError, match="origin_masks= is given"):
        AGPTaskGenerator(2, perceptron(), CONFIG, {"0": 1})
