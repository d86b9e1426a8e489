"""Gradients without labels: the network's own outputs are the targets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.calibration._dense_loss import DenseLoss
from torchshear.errors import DataError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (6, 4, 5)])
def test_logits_are_held_to_their_largest_class(shape: tuple[int, ...]) -> None:
    logits = noise(*shape).requires_grad_()
    flat = logits.movedim(2 if len(shape) == 3 else 1, -1).reshape(-1, 5)
    expected = functional.cross_entropy(flat, flat.argmax(1))
    assert torch.allclose(DenseLoss()(logits, None), expected)


def test_other_outputs_are_held_to_themselves_with_noise_from_a_seed() -> None:
    output = noise(500, 1).requires_grad_()
    gradients = []
    for _ in range(2):
        (found,) = torch.autograd.grad(DenseLoss()(output, None), output)
        gradients.append(found)
    assert torch.equal(*gradients)
    assert float(gradients[0].std()) == pytest.approx(2 * float(output.detach().std()) / 500, rel=0.1)


def test_outputs_named_logits_count_alone() -> None:
    logits, cache = noise(4, 3).requires_grad_(), noise(4, 7).requires_grad_()
    expected = DenseLoss()(logits, None)
    assert torch.equal(DenseLoss()({"logits": logits, "cache": cache}, None), expected)
    assert torch.equal(DenseLoss()([logits, torch.arange(3)], None), expected)
    assert DenseLoss()([logits, cache], None) > expected


def test_outputs_without_gradients_are_refused() -> None:
    with pytest.raises(DataError, match="dense"):
        DenseLoss()(torch.arange(3), None)


def test_criteria_of_gradients_need_no_labels() -> None:
    """It is what labels of the network itself give, and it says so of what no gradient tells from the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    inputs = [noise(16, 4, seed=number) for number in range(3)]
    with torch.no_grad():
        labelled = [(x, model(x).argmax(1)) for x in inputs]
    graph = torchshear.trace(model, inputs[0])

    def scored(data: list[Any], loss_fn: Any) -> list[int]:
        statistics = torchshear.collect(graph, data, loss_fn, 3, criteria="taylor", progress=False)
        plan = torchshear.plan(torchshear.analyze(graph), "taylor", 0.5, statistics=statistics)
        return plan.groups[0].kept.tolist()

    kept = scored(inputs, "dense")
    assert kept == scored(labelled, functional.cross_entropy)
    result = torchshear.prune(model, inputs[0], criterion="taylor", ratio=0.5, data=inputs, loss_fn="dense", batches=3)
    assert result.plan.groups[0].kept.tolist() == kept
