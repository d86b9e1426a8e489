"""Statistics estimated anew: against torch's own batch norms in train mode, and by hand."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Residual, image, randomise
from tests.oracle import fingerprint
from tests.processes import end_together
from torchshear.errors import ArgumentError, DataError, WeightError
from torchshear.speedup import shrink_to_form
from torchshear.speedup.compensation._recalibrate import recalibrate


class Norms(nn.Module):
    """Batch norms of several kinds between layers, one of them called twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.3)
        self.inner = nn.Conv2d(6, 6, 1)
        self.drop = nn.Dropout(0.5)
        self.flat, self.flat_norm = nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None)
        self.last = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.norm(self.inner(self.drop(x))).mean((2, 3))
        return self.last(torch.tanh(self.flat_norm(self.flat(x))))


def pictures(count: int = 4, size: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 6, 6, generator=generator) * (1 + n) for n in range(count)]


def by_torch(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """What torch's batch norms hold after train mode with cumulative averages, all else in eval mode."""
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return twin.state_dict()


def assert_same_state(actual: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert actual.state_dict().keys() == expected.keys()
    for name, value in actual.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("is_training", [False, True])
def test_statistics_are_those_of_torch(is_training: bool) -> None:
    model = randomise(Norms()).double().train(is_training)
    batches = [batch.double() for batch in pictures()]
    assert_same_state(recalibrate(model, batches, 4), by_torch(model, batches))


def test_one_norm_by_hand() -> None:
    model = nn.BatchNorm1d(2).double()
    batches = [torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[1.0, 0.0], [4.0, 0.0], [7.0, 3.0]])]
    small = recalibrate(model, [batch.double() for batch in batches], batches=2)
    torch.testing.assert_close(small.running_mean, torch.tensor([(1 + 4) / 2, (3 + 1) / 2]).double())
    torch.testing.assert_close(small.running_var, torch.tensor([(2 + 9) / 2, (8 + 3) / 2]).double())
    assert small.num_batches_tracked == 2


@pytest.mark.parametrize("form", ["native", "traced"])
def test_both_forms_of_a_shrunk_model(form: str) -> None:
    model = randomise(Residual()).double()  # in train mode, with dropout in both graphs
    x = image().double()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (x,))))
    batches = [torch.randn(6, *x.shape[1:], generator=torch.Generator().manual_seed(n)).double() for n in range(3)]
    expected = by_torch(shrink_to_form(model, plan, form="native").model, batches)
    again = recalibrate(shrink_to_form(model, plan, form=form).model, batches, 3)
    assert_same_state(again, expected)
    assert again.training


def test_only_buffers_of_batch_norms_change() -> None:
    model = randomise(Norms())
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model(pictures()[0]).sum().backward()
    runs = itertools.count()
    model.flat.register_forward_hook(lambda *_: (next(runs), None)[1])  # what a container of ours holds is put back
    before = fingerprint(model)
    result = recalibrate(model, pictures(), 4)
    assert fingerprint(model) == before, "the user's model or the random state was changed"
    assert result is not model
    assert next(runs) == 4
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()]
    assert (result.norm.momentum, result.flat_norm.momentum) == (0.3, None)
    for (name, one), (_, two) in zip(model.named_parameters(), result.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.requires_grad == two.requires_grad, name
    assert result.norm.num_batches_tracked == 8  # it is called twice
    assert result.flat_norm.num_batches_tracked == 4
    result.train()(pictures()[0]).sum().backward()


def test_synchronised_and_home_made_norms() -> None:
    class Own(nn.Module):
        def __init__(self, is_frozen: bool) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))
            self.momentum = 0.0 if is_frozen else 0.1

        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(x, self.running_mean, self.running_var, momentum=self.momentum)

    (x,) = pictures(1)
    model = nn.Sequential(Own(is_frozen=True), Own(is_frozen=False), nn.SyncBatchNorm(3), nn.BatchNorm2d(3)).double()
    result = recalibrate(model, [x.double()], 1)
    assert torch.equal(result[0].running_mean, torch.zeros(3).double()), "frozen"
    torch.testing.assert_close(result[1].running_mean, x.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[2].running_var, torch.ones(3).double(), rtol=1e-2, atol=1e-2)


class Converted(nn.Module):
    """A frozen norm as a converter from another framework leaves it, and one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Module()
        self.frozen.register_buffer("running_mean", torch.zeros(3))
        self.frozen.register_buffer("running_var", torch.ones(3))
        self.norm = nn.BatchNorm2d(3)
        self.spare = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.batch_norm(x, self.frozen.running_mean, self.frozen.running_var, momentum=0.0))


def test_frozen_norms_are_named_and_included_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    (x,) = pictures(1)
    model = Converted().eval()
    result = recalibrate(model, [x], 1)
    assert torch.equal(result.frozen.running_mean, torch.zeros(3))
    torch.testing.assert_close(result.norm.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "batch norms keep their statistics: frozen: they are frozen (momentum 0); recalibrate(..., frozen=True) gives "
        "them new ones.",
        "batch norms keep their statistics: spare: no call of batch_norm reached them: they are unused, or compute by "
        "themselves.",
    ]
    caplog.clear()
    both = recalibrate(model, [x], 1, frozen=True)
    torch.testing.assert_close(both.frozen.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.frozen.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert len(caplog.records) == 1


def test_a_model_of_frozen_norms_alone_is_told_of_the_word() -> None:
    model = Converted().eval()
    model.norm = nn.Identity()
    with pytest.raises(ArgumentError, match="frozen=True"):
        recalibrate(model, pictures(1), 1)
    assert float(recalibrate(model, pictures(1), 1, frozen=True).frozen.running_mean.abs().sum()) > 0
    with pytest.raises(ArgumentError, match="frozen='yes'; expected True or False"):
        recalibrate(model, pictures(1), 1, frozen="yes")


def test_unused_norms_stay_as_they_are() -> None:
    model = Norms()
    model.spare = nn.BatchNorm2d(4)
    model.spare.running_mean.fill_(7)
    assert torch.equal(recalibrate(model, pictures(), 2).spare.running_mean, torch.full((4,), 7.0))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(x + y) * scale


def test_forms_of_batches() -> None:
    x, y, target = torch.randn(5, 2), torch.randn(5, 2), torch.zeros(5)
    expected = recalibrate(TwoInputs(), [(x, y)], 1).norm.running_mean
    torch.testing.assert_close(expected, (x + y).mean(0))
    named = {"x": x, "y": y, "labels": target}
    for batch in ((x, y, target), [x, y], ((x, y, 2.0), target), named, (named, target), ([x, y], target)):
        assert torch.equal(recalibrate(TwoInputs(), itertools.repeat(batch), 1).norm.running_mean, expected)
    alone = [recalibrate(nn.BatchNorm1d(2), [batch], 1).running_mean for batch in (x, [x], (x, target))]
    assert all(torch.equal(mean, alone[0]) for mean in alone)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "gave no batch"),
        ([torch.randn(4, 3, 6, 6)], "ended after 1 of 2 batches"),
        ([torch.randn(4, 5, 6, 6)] * 2, "does not run on batch 0: RuntimeError"),
        ([torch.randn(4, 3, 6, 6), "text"], "batch 1 is str; .* expected a tensor"),
        ([{"image": torch.randn(4, 3, 6, 6)}] * 2, "dictionary with image; x missing"),
        ([(torch.randn(4, 3, 6, 6),) * 3] * 2, "is tuple.a tensor .*; forward.* with 1 positional argument;"),
        ([torch.randn(1, 3, 6, 6)] * 2, r"batch 0: batch norm 'flat_norm' gets \(1, 4\), less than two values"),
        ([torch.full((4, 3, 6, 6), float("nan"))] * 2, "batch 0: the input of batch norm 'norm' has NaN"),
    ],
)
def test_data_that_does_not_fit(batches: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recalibrate(Norms(), batches, 2)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="nothing to recalibrate"):
        recalibrate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), [torch.ones(2, 2)], 1)
    with pytest.raises(ArgumentError, match="batches=0"):
        recalibrate(Norms(), pictures(), 0)
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        scripted = nn.Sequential(torch.jit.trace(nn.BatchNorm2d(3).eval(), torch.zeros(2, 3, 4, 4)))
    with pytest.raises(ArgumentError, match="TorchScript"):
        recalibrate(scripted, [torch.zeros(2, 3, 4, 4)], batches=1)
    with pytest.raises(WeightError, match="lazy layers"):
        recalibrate(nn.LazyBatchNorm2d(), [torch.zeros(2, 3, 4, 4)], batches=1)
    with pytest.raises(DataError, match="the loader is int"):
        recalibrate(nn.BatchNorm2d(3), 3, batches=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="model is dict"):
        recalibrate({}, pictures(), 1)
    with pytest.raises(WeightError, match="meta device"):
        recalibrate(Norms().to("meta"), pictures(), 1)
    hidden = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "layer": nn.Linear(2, 2)})
    hidden.forward = lambda x: hidden["layer"](x)
    with pytest.raises(ArgumentError, match="runs none of its batch norms"):
        recalibrate(hidden, [torch.ones(2, 2)], 1)


def _run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = randomise(Norms()).double()
    own = [batch.double() for batch in pictures()[2 * rank : 2 * rank + 2]]
    results: list[object] = [recalibrate(model, own, 2).state_dict()]
    try:
        recalibrate(model, own[: 2 - rank], 2)
    except DataError as error:
        results.append(str(error))
    try:
        recalibrate(model, own if rank else _broken(), 2)
    except (DataError, OSError) as error:
        results.append(str(error))
    torch.save(results, f"{folder}/{rank}.pt")
    end_together(folder)


def _broken() -> Iterator[Tensor]:
    yield pictures()[0].double()
    raise OSError("the disk is gone")


@pytest.mark.zoo
def test_two_processes_average_over_the_data_of_both_and_fail_together(tmp_path: Path) -> None:
    mp.spawn(_run, (str(tmp_path),), nprocs=2)
    (one, first, gone), (two, second, told) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    expected = by_torch(randomise(Norms()).double(), [batch.double() for batch in pictures()])
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(one[name], two[name])
    assert "process 1 could not recalibrate: the loader ended after 1 of 2" in first
    assert "the loader ended after 1 of 2" in second
    assert gone == "the disk is gone"
    assert told == "process 0 could not recalibrate: OSError: the disk is gone"
