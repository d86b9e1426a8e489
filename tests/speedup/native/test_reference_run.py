"""Reference runs of a native form: as few as tell, one copy of the weights, small images where they do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._process import record_export_queries, set_exporting_flag
from torchshear.speedup import shrink_to_form
from torchshear.speedup._random_values import smaller_inputs
from torchshear.speedup.native import _builder
from torchshear.speedup.native._reference_run import ExpectedValues, ReferenceRun, ReferenceRuns

IMAGE = torch.randn(1, 3, 160, 192)


class Net(nn.Module):
    """Convolutions for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Asking(Net):
    """Computes otherwise while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x).mean((2, 3))
        return self.head(pooled.clone() if torch.compiler.is_exporting() else pooled)


class Patches(nn.Module):
    """The number of patches is one in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 16, 16)
        self.place = nn.Parameter(torch.randn(10 * 12, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cut(x).flatten(2).transpose(1, 2) + self.place).mean(1)


class Squared(Net):
    """Divides by the number of pixels of the example, in the graph a number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).sum((2, 3)) / (x.shape[2] * x.shape[3]))


def plan_of(model: nn.Module) -> Any:
    return torchshear.plan(torchshear.analyze(trace(model, (IMAGE,))), ratio=0.5)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[ReferenceRun]:
    """All trials that are made."""
    seen: list[ReferenceRun] = []
    plain = ReferenceRuns.__iter__

    def note(self: ReferenceRuns) -> Iterator[ReferenceRun]:
        for trial in plain(self):
            seen.append(trial)
            yield trial

    monkeypatch.setattr(ReferenceRuns, "__iter__", note)
    return seen


@pytest.mark.parametrize(("kind", "expected"), [(Net, [False, False]), (Asking, [False, True, False])])
def test_code_that_does_not_ask_is_not_run_as_if_exported(
    kind: type[nn.Module], expected: list[bool], tried: list[ReferenceRun]
) -> None:
    model = kind().eval()
    assert shrink_to_form(model, plan_of(model)).form == "native"
    assert [trial.exporting for trial in tried] == expected


def test_a_form_that_is_wrong_only_while_it_is_exported_is_found() -> None:
    class Wrong(Asking):
        def forward(self, x: Tensor) -> Tensor:
            pooled = self.body(x).mean((2, 3))
            return self.head(pooled + (pooled.shape[1] != 6) if torch.compiler.is_exporting() else pooled)

    model = Wrong().eval()
    groups = torchshear.analyze(trace(model, (IMAGE,)))
    kept = torchshear.plan(groups, ratio=0.5)
    assert shrink_to_form(model, kept).form == "traced"


def test_questions_are_noted_of_the_code_of_a_model_only() -> None:
    for kind, asks in ((Net, False), (Asking, True)):
        askers: list[str] = []
        with record_export_queries(askers):
            kind().eval()(IMAGE)
        assert bool(askers) == asks
    with set_exporting_flag(), record_export_queries(askers):
        assert not torch.compiler.is_exporting()


def test_the_graph_runs_once_for_each_input(tried: list[ReferenceRun], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = ExpectedValues._run

    def count(self: ExpectedValues, note: Any) -> Any:
        runs.append(self.inputs.args[0].numel())
        return plain(self, note)

    monkeypatch.setattr(ExpectedValues, "_run", count)
    model = Asking().eval()
    assert shrink_to_form(model, plan_of(model)).form == "native"
    assert len(tried) == 3
    assert runs == [IMAGE.numel(), 2 * 3 * 64 * 64]  # the second: two samples of few pixels, with other weights


def test_graph_and_twin_share_weights_which_are_drawn_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    made: list[ReferenceRuns] = []
    twins: list[nn.Module] = []
    monkeypatch.setattr(
        _builder,
        "ReferenceRuns",
        lambda *args: made.append(ReferenceRuns(*args)) or made[-1],  # type: ignore[func-returns-value]
    )
    plain = ReferenceRuns.twin
    monkeypatch.setattr(ReferenceRuns, "twin", lambda self, work: twins.append(plain(self, work)) or twins[-1])
    small = shrink_to_form(model, plan_of(model)).model
    shared = made[0]._weights
    own = dict(small.named_parameters())
    for name, parameter in twins[0].named_parameters():
        assert parameter.data_ptr() == shared.tensors[name].data_ptr() != own[name].data_ptr()
        assert parameter.dtype == torch.float64
    shared.set_values(7)
    assert all(not torch.equal(shared.tensors[name].float(), own[name]) for name in own)
    shared.set_values(None)
    assert all(torch.equal(shared.tensors[name].float(), own[name]) for name in own)


@pytest.mark.parametrize(("kind", "size"), [(Net, (64, 64)), (Patches, (160, 192)), (Squared, (160, 192))])
def test_images_are_cut_where_the_graph_gives_then_what_the_model_gives(
    kind: type[nn.Module], size: tuple[int, int]
) -> None:
    model = kind().train()
    graph = trace(model, (IMAGE,))
    assert smaller_inputs(graph, model).args[0].shape == (1, 3, *size)
    assert all(module.training for module in model.modules())


def test_small_images_stay_as_they_are() -> None:
    model = Net()
    inputs = smaller_inputs(trace(model, (torch.randn(1, 3, 100, 200),)), model)
    assert inputs.args[0].shape == (1, 3, 100, 200)


def test_a_norm_that_needs_two_samples_in_training_gets_them() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    plan = torchshear.plan(torchshear.analyze(trace(model, (torch.randn(1, 4),))), ratio=0.5)
    assert shrink_to_form(model, plan).form == "native"
