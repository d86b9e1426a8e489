"""Forms of batches: each function that takes data takes the same ones, and reads the same of them."""

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Net
from torchshear.errors import DataError
from torchshear.graph import ExampleInputs
from torchshear.pruners import channel_means
from torchshear.speedup.compensation._recalibrate import recalibrate_for


class Scaled(nn.Module):
    """Two inputs, of which the second is optional, and a batch norm; remembers its inputs."""

    seen: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift
        if type(x) is Tensor:  # else it is captured
            self.seen.append(x.detach().double())
        return self.two(torch.relu(self.norm(self.one(x))))


def of_dictionary() -> Net:
    """A model whose argument is a dictionary."""
    return Net(lambda m, features: m.inner(features["x"], features["shift"]), inner=Scaled())


Call = tuple[tuple[Any, ...], dict[str, Any]]
Read = Callable[[nn.Module, Call, Iterable[Any]], list[list[Tensor]]]


def collected(model: nn.Module, call: Call, batches: Iterable[Any]) -> list[list[Tensor]]:
    groups = torchshear.analyze(torchshear.trace(model, *call))
    seen = [torchshear.collect(groups, [batch], None, 1, progress=False) for batch in batches]
    return [[sums.total for _, sums in sorted(statistics.values.items())] for statistics in seen]


def averaged(model: nn.Module, call: Call, batches: Iterable[Any]) -> list[list[Tensor]]:
    groups = torchshear.analyze(torchshear.trace(model, *call))
    means = [channel_means(groups, [batch], 1, progress=False) for batch in batches]
    return [[mean for _, mean in sorted(each.items())] for each in means]


def recalibrated(model: nn.Module, call: Call, batches: Iterable[Any]) -> list[list[Tensor]]:
    return [[torchshear.recalibrate(model, [batch], 1, progress=False).norm.running_mean] for batch in batches]


def recalibrated_like_example(model: nn.Module, call: Call, batches: Iterable[Any]) -> list[list[Tensor]]:
    """As `prune(..., compensate="statistics")` does."""
    example = ExampleInputs.of(*call)
    return [[recalibrate_for(example, model, [batch], 1).norm.running_mean] for batch in batches]


def verified(model: nn.Module, call: Call, batches: Iterable[Any]) -> list[list[Tensor]]:
    result = torchshear.prune(model, *call, ratio=0.5)
    found: list[list[Tensor]] = []
    for batch in batches:
        Scaled.seen.clear()
        torchshear.verify(model, result.model, result.plan, *call, data=[batch], batches=1)
        found.append([x for x in Scaled.seen if len(x) == len(X)][:1])
    return found


ENTRIES: tuple[Read, ...] = (collected, averaged, recalibrated, recalibrated_like_example, verified)
X, SHIFT, TARGET = torch.linspace(-1, 2, 15).reshape(5, 3), torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
FORMS_OF_ONE = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "tuple and target": (X, TARGET),
    "pair": ((X,), TARGET),
    "pair of a list": ([X], TARGET),
    "dictionary": {"x": X, "labels": TARGET},
    "dictionary and target": ({"x": X}, TARGET),
}
FORMS_OF_TWO = {
    "pair": ((X, SHIFT), TARGET),
    "pair of a list": ([X, SHIFT], TARGET),
    "dictionary": {"labels": TARGET, "shift": SHIFT, "x": X},
    "dictionary and target": ({"x": X, "shift": SHIFT}, TARGET),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Scaled().eval()


def assert_alike(found: list[list[Tensor]]) -> None:
    """Assert that all batches were read as the first one."""
    assert found[0]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


each_entry = pytest.mark.parametrize("read", ENTRIES, ids=lambda read: read.__name__)


@each_entry
@pytest.mark.parametrize("by_name", [False, True], ids=["captured by position", "captured by name"])
def test_one_argument_is_read_alike(model: nn.Module, read: Read, by_name: bool) -> None:
    call: Call = ((), {"x": torch.randn(4, 3)}) if by_name else ((torch.randn(4, 3),), {})
    assert_alike(read(model, call, FORMS_OF_ONE.values()))


@each_entry
@pytest.mark.parametrize("by_name", [0, 1, 2])
def test_two_arguments_are_read_alike(model: nn.Module, read: Read, by_name: int) -> None:
    x, shift = torch.randn(4, 3), torch.randn(4, 3)
    calls: list[Call] = [((x, shift), {}), ((x,), {"shift": shift}), ((), {"shift": shift, "x": x})]
    found = read(model, calls[by_name], FORMS_OF_TWO.values())
    assert_alike(found)


@pytest.mark.parametrize("read", [each for each in ENTRIES if each is not recalibrated], ids=lambda read: read.__name__)
def test_a_tuple_holds_the_arguments_of_the_example(model: nn.Module, read: Read) -> None:
    batches = [((X, SHIFT), TARGET), (X, SHIFT), [X, SHIFT], (X, SHIFT, TARGET)]
    assert_alike(read(model, ((torch.randn(4, 3), torch.randn(4, 3)), {}), batches))


def test_a_tuple_holds_required_arguments_without_an_example(model: nn.Module) -> None:
    assert_alike(recalibrated(model, ((), {}), [X, (X, SHIFT)]))


@pytest.mark.parametrize("read", [collected, averaged], ids=lambda read: read.__name__)
def test_a_dictionary_is_the_argument_where_the_example_is_one(read: Read) -> None:
    torch.manual_seed(0)
    features = {"x": X, "shift": SHIFT}
    call: Call = ({"x": torch.randn(4, 3), "shift": torch.randn(4, 3)},), {}
    batches = [(features, TARGET), features, (features,), ((features,), TARGET)]
    assert_alike(read(of_dictionary().eval(), call, batches))


@each_entry
@pytest.mark.parametrize(
    ("batch", "facts"),
    [
        ({"image": X}, ["batch 0", "image", "x missing", "names of the parameters"]),
        (({"image": X}, TARGET), ["batch 0", "image", "x missing"]),
        ((X, TARGET, TARGET), ["batch 0", "tuple", "1 positional argument"]),
        ("text", ["batch 0", "str", "a tuple of the positional arguments"]),
        (((X, SHIFT, SHIFT), TARGET), ["batch 0", "too many positional arguments"]),
        ({}, ["batch 0", "missing"]),
        (torch.zeros(5, 3, device="meta"), ["batch 0", "meta device"]),
    ],
)
def test_other_forms_are_refused_alike(model: nn.Module, read: Read, batch: Any, facts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(model, ((torch.randn(4, 3),), {}), [batch])
    assert all(fact in str(caught.value) for fact in facts), str(caught.value)


def test_the_loss_is_given_the_target_or_the_batch(model: nn.Module) -> None:
    given: list[Any] = []

    def loss(output: Tensor, target: Any) -> Tensor:
        given.append(target)
        return output.square().mean()

    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(4, 3),)))
    named = {"x": X, "labels": TARGET}
    batches = [X, (X,), (X, TARGET), ((X,), TARGET), named, ({"x": X}, TARGET)]
    torchshear.collect(groups, batches, loss, len(batches), progress=False)
    assert given[0] is X
    assert given[1][0] is X
    assert given[4].keys() == named.keys()
    assert all(target is TARGET for target in (given[2], given[3], given[5], given[4]["labels"]))


@pytest.mark.parametrize(("given", "seen"), [(3, 3), (None, 32)])
def test_all_batches_are_run_but_no_more_than_32_where_no_number_is_asked_for(given: int | None, seen: int) -> None:
    graph = torchshear.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    batches = repeat(torch.randn(2, 3)) if given is None else repeat(torch.randn(2, 3), given)
    reported: list[tuple[int, int, str]] = []
    collected = torchshear.collect(graph, batches, progress=lambda *values: reported.append(values))
    assert collected.n_batches == seen
    assert reported[-1][:2] == (seen, 32)
    with pytest.raises(DataError, match="the loader gave no batch"):
        torchshear.collect(graph, [], progress=False)


def test_progress_counts_to_the_length_of_a_loader() -> None:
    graph = torchshear.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    reported: list[tuple[int, int, str]] = []
    torchshear.collect(graph, [torch.randn(2, 3)] * 3, progress=lambda *values: reported.append(values))
    assert reported[-1][:2] == (3, 3)


def test_an_iterator_serves_a_criterion_and_a_refit_without_a_number() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [torch.randn(16, 3) for _ in range(3)]
    words: dict[str, Any] = {"ratio": 0.5, "criterion": "apoz", "compensate": "refit"}
    once = torchshear.prune(model, torch.randn(2, 3), data=iter(batches), **words)
    again = torchshear.prune(model, torch.randn(2, 3), data=batches, batches=3, **words)
    assert torch.equal(once.model[2].weight, again.model[2].weight)
    assert once.refit is not None
    assert once.refit.n_samples + once.refit.n_held_out == 48
