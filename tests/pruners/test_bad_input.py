"""Data, losses, models and ratios that do not fit: one clear error, or a limit that holds, for every criterion."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.calibration.sums import analysed, batches
from tests.networks import randomise
from tests.networks.plain import GroupedBranch
from tests.pruners.scoring import is_scored, mixed, score
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS
from torchshear.errors import ArgumentError, DataError, PlanError
from torchshear.pruners import registered_criteria
from torchshear.pruners.criteria._criterion import needs_of

ON_DATA = tuple(name for name in registered_criteria() if needs_of(name))
ON_GRADIENTS = tuple(name for name in ON_DATA if needs_of(name) & SUMS_OF_GRADIENTS)
ANALYSED = analysed(randomise(GroupedBranch()).eval())


def second(first: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that fits for one batch, and is another from then on."""
    calls: list[int] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return functional.cross_entropy(output, target) if len(calls) == 1 else first(output, target)

    return loss_fn


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader gave no batch; expected at least one"),
        (iter(()), "An iterator that was used before is empty"),
        (None, "the loader is NoneType"),
        ([{"x": 1}], "batch 0 holds int; the model was captured with a tensor"),
        (batches(2), "the loader ended after 2 of 3 batches; give a longer one, or ask for batches=2"),
        ([*batches(1), {"image": 1}], "batch 1 is a dictionary with image; x missing: expected"),
        ([*batches(2), (1, 2, 3)], r"batch 2 is tuple\(int, int, int\); forward.* 1 positional argument; expected"),
        ([(torch.zeros(4, 3, 7, 6), torch.zeros(4))], r"batch 0 holds a tensor of shape \(4, 3, 7, 6\)"),
        ([(torch.zeros(4, 3, 6, 6).long(), torch.zeros(4))], "batch 0 holds a tensor of dtype torch.int64"),
        ([*batches(1), (torch.zeros(0, 3, 6, 6), torch.zeros(0).long())], "batch 1 holds no sample"),
    ],
)
@pytest.mark.parametrize("name", ON_DATA)
def test_a_loader_that_does_not_fit_is_refused(name: str, loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        torchshear.collect(ANALYSED, loader, functional.cross_entropy, 3, criteria=name)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda out, target: out, r"the loss of batch 1 is a tensor of shape \(4, 5\); expected a scalar tensor"),
        (lambda out, target: float(out.detach().sum()), "the loss of batch 1 is float; expected a scalar tensor"),
        (lambda out, target: out.detach().sum(), "the loss of batch 1 does not depend on the model's outputs"),
        (lambda out, target: out.sum() * torch.nan, "the loss of batch 1 is nan; expected a finite number"),
        (lambda out, target: out.sum() * 1j, "the loss of batch 1 is of dtype torch.complex64; expected a real number"),
        (lambda out, target: out.sum() * torch.inf, "the loss of batch 1 is -?inf; expected a finite number"),
        (
            lambda out, target: (out * 0).sum().sqrt(),
            r"gradients of batch 1 are NaN or infinite at '.*', of group 'stem.weight\[0\]'. Scale the loss",
        ),
    ],
)
@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_a_loss_that_does_not_fit_is_refused(name: str, loss_fn: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        torchshear.collect(ANALYSED, batches(), second(loss_fn), 3, criteria=name)


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_gradients_that_are_all_zero_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="zero .*3 batches"):
        torchshear.collect(ANALYSED, batches(), lambda out, target: (out * 0).sum(), 3, criteria=name)


def test_one_batch_without_gradients_is_none_without_meaning() -> None:
    loss = second(lambda out, target: (out * 0).sum())
    assert torchshear.collect(ANALYSED, batches(), loss, 3, criteria="taylor").n_batches == 3


def test_what_a_loss_raises_says_what_it_was_given() -> None:
    with pytest.raises(RuntimeError) as raised:
        torchshear.collect(ANALYSED, [x for x, _ in batches()], functional.cross_entropy, 3)
    (note,) = raised.value.__notes__
    assert note.endswith("the target of batch 0: a tensor (4, 3, 6, 6) of torch.float32")


class Tokens(nn.Module):
    """An embedding, and a second input of the same batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return self.head(functional.relu(self.hidden(self.embed(tokens))).mean(1) * weight)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.full((4, 5), 10), torch.ones(4, 1)), "batch 1: aten.embedding.default in 'embed': IndexError"),
        ((torch.full((4, 5), 9), torch.ones(3, 1)), "batch 1: aten.mul.Tensor in 'the model itself': RuntimeError"),
    ],
)
def test_data_on_which_the_model_does_not_run(batch: tuple[Tensor, Tensor], message: str) -> None:
    good = (torch.zeros(4, 5, dtype=torch.long), torch.ones(4, 1))
    graph = torchshear.trace(randomise(Tokens()).eval(), good)
    with pytest.raises(DataError, match=f"the model does not run on {message}"):
        torchshear.collect(graph, [good, batch], None, 2)


class TwoHeads(nn.Module):
    """Two outputs, of which a loss may look at one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.one, self.two = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.one(x), self.two(x)


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_a_group_that_no_gradient_reaches_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r"no gradient .*'one.0.weight\[0\]'"):
        torchshear.collect(TWO_HEADS, batches(), lambda out, target: out[1].mean(), 1, criteria=name)


def of_the_second_head(out: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return out[1].square().mean()


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_no_gradient_needs_to_reach_what_stays_whole(name: str) -> None:
    seen = torchshear.collect(TWO_HEADS, batches(), of_the_second_head, 1, criteria=name, exclude="one.0.weight[0]")
    assert seen.n_batches == 1


def test_pruning_what_gradients_reach() -> None:
    model = randomise(TwoHeads()).eval()
    words: dict[str, Any] = {"data": batches(), "loss_fn": of_the_second_head, "batches": 1}
    words["exclude"] = "one.0.weight[0]"
    result = torchshear.prune(model, (torch.zeros(2, 3, 6, 6),), criterion="taylor", **words)
    assert (result.model.one[0].out_channels, result.model.stem.out_channels) == (6, 2)


@pytest.mark.parametrize("name", ON_DATA)
def test_data_that_is_not_finite_is_refused(name: str) -> None:
    for number, message in ((torch.nan, "batch 1 holds NaN"), (torch.inf, "of batch 1 (are NaN|is nan|is inf)")):
        if number == torch.inf and needs_of(name) == {"zeros"}:
            continue  # of which there are none, which is all that it asks
        given = [*batches(1), (torch.full((4, 3, 6, 6), number), batches(1)[0][1])]
        with pytest.raises(DataError, match=message):
            torchshear.collect(ANALYSED, given, functional.cross_entropy, 2, criteria=name)


TWO_HEADS = analysed(randomise(TwoHeads()).eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    groups = torchshear.analyze(
        torchshear.trace(randomise(GroupedBranch()).to(dtype).eval(), (torch.zeros(2, 3, 6, 6, dtype=dtype),))
    )
    data = [(x.to(dtype), target) for x, target in batches()]

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output.float(), target)

    statistics = torchshear.collect(groups, data, loss_fn, 3, criteria=registered_criteria())
    assert statistics.notes == (f"the model computes in {dtype}; sums are float32",)
    tensors = [
        getattr(sums, word)
        for table in (statistics.values, statistics.weights, statistics.rows, statistics.gates)
        for sums in table.values()
        for word in sums.__slots__
        if word != "count"
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.float64}
    for name in registered_criteria():
        for group in groups:
            assert np.isfinite(score(name, groups, group, statistics)).all()


def test_apoz_is_refused_where_no_exact_zeros_can_occur() -> None:
    groups = analysed(randomise(GroupedBranch(functional.silu)).eval())
    statistics = torchshear.collect(groups, batches(), None, 3, criteria=["apoz", "mean_activation"])
    with pytest.raises(ArgumentError, match="exact zeros.*'mean_activation'"):
        torchshear.plan(groups, "apoz", statistics=statistics)
    assert torchshear.plan(groups, "mean_activation", statistics=statistics).n_cut


@pytest.mark.parametrize("name", registered_criteria())
def test_no_ratio_empties_a_group(name: str) -> None:
    _, groups, statistics = mixed()
    plan = torchshear.plan(groups, name, 0.999, statistics=statistics)
    for group in groups:
        least = group.n_blocks if is_scored(name, groups, group, statistics) else group.width
        assert len(plan.kept[group.name]) == least
        assert group.balance is None or len(set(group.balance[plan.kept[group.name]])) == group.n_blocks
    with pytest.raises(PlanError, match=r"remove \d+ of \d+ units .*at most \d+"):
        torchshear.plan(groups, name, 0.999, statistics=statistics, scope="global")
