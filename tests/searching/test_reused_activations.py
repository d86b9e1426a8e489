"""Activations that candidates have in common: the scores are those of whole runs, and fewer operators run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchshear
from torchshear.errors import ArgumentError
from torchshear.searching import NetAdapt, Proposal
from torchshear.searching._request import SearchRequest
from torchshear.searching._reused_activations import ActivationStore

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Convolutions whose activations and sums are written in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 20, 3, padding=1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        y = self.second(torch.relu_(self.first(x)))
        y += x
        return self.head(torch.relu_(self.third(y)).mean((2, 3)))


class Halves(Residual):
    """Half of an activation is written, while the whole is read later."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = self.first(x)
        y[:, :8].mul_(2)
        y = self.second(y) + x
        return self.head(self.third(y).relu().mean((2, 3)))


class WritesLater(Residual):
    """What a layer reads is written after it has read it, and read once more."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.second(torch.relu(self.first(x)))
        y = y + x.mul_(2)
        return self.head(torch.relu(self.third(y)).mean((2, 3)))


class WritesInput(Residual):
    """The input is halved in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Noisy(Residual):
    """Noise is added between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.second(torch.relu(self.first(x)))
        y = self.third(y + torch.randn_like(y))
        return self.head(torch.relu(y).mean((2, 3)))


class Counting(Residual):
    """The output depends on how often the network has run."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Convolutions(TorchDispatchMode):
    """Counts convolutions that run."""

    n_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        Convolutions.n_calls += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def of_batches(model: nn.Module) -> float:
    """Score on three batches."""
    return sum(model(batch).sin().sum().item() for batch in IMAGES.clone().split(8))


def counted(model: nn.Module) -> float:
    with Convolutions():
        return of_batches(model)


def new_batches(model: nn.Module) -> float:
    """Score on inputs that are other ones each time."""
    new_batches.n_calls += 1  # type: ignore[attr-defined]
    scale = 1 + new_batches.n_calls % 2  # type: ignore[attr-defined]
    with torch.inference_mode():
        return float(model(IMAGES * scale).sin().sum())


def other_precision(model: nn.Module) -> float:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(IMAGES.clone())
    return (model(IMAGES.clone()) - low).abs().sum().item()  # type: ignore[no-any-return]


def changed_weights(model: nn.Module) -> float:
    """Score with the weights as they are, and halved."""
    before = of_batches(model)
    with torch.no_grad():
        model.get_parameter("stem.weight").mul_(0.5)
    return before - 3 * of_batches(model)


def request(evaluate: Callable[[nn.Module], Any], **options: Any) -> SearchRequest:
    return SearchRequest(evaluate=evaluate, **({"target_macs": 0.75} | options))


def scores(
    model: nn.Module, evaluate: Callable[[nn.Module], Any], inputs: Tensor = IMAGES, **options: Any
) -> tuple[list[float | None], ActivationStore | None]:
    """Score the dense model, and two rounds of candidates in which every group alone is cut further."""
    maker = request(evaluate, **options).prepare(model.eval(), inputs[:2], None)
    space, found = maker.space, []
    base = space.widest
    for cut in (2, 4):
        batch = [base, *((*base[:n], base[n] - cut, *base[n + 1 :]) for n in range(len(base)))]
        for widths in batch:
            score, _ = maker.score(Proposal(widths))
            assert score.error == ""
            found.append(score.value)
        base = batch[1 + int(np.argmax([-np.inf if one is None else one for one in found[-len(space.names) :]]))]
    return found, maker.activations


@pytest.mark.parametrize(
    ("kind", "evaluate", "options"),
    [
        (Residual, other_precision, {}),
        (Residual, changed_weights, {}),
        (Residual, of_batches, {"data": [IMAGES], "compensate": "refit"}),
        (Halves, of_batches, {}),
        (WritesLater, of_batches, {}),
        (Noisy, of_batches, {}),
    ],
)
def test_scores_are_those_of_whole_runs(
    kind: type[Residual], evaluate: Callable[[nn.Module], float], options: dict[str, Any]
) -> None:
    whole, _ = scores(kind(), evaluate, **options)
    assert len(set(whole)) == len(whole) - 1  # the base of the second round is known from the first
    found, store = scores(kind(), evaluate, reuse_activations=True, **options)
    assert found == whole
    assert store is not None
    assert store.n_skipped > 0


@pytest.mark.parametrize("kind", [WritesInput, Counting])
def test_networks_that_write_to_inputs_or_buffers_are_run_whole(kind: type[nn.Module]) -> None:
    whole, _ = scores(kind(), of_batches)
    found, store = scores(kind(), of_batches, reuse_activations=True)
    assert found == whole
    assert store is not None
    assert store.n_calls > 0
    assert store.n_skipped == 0


def test_fewer_operators_run() -> None:
    counts = []
    for reuse in (False, True):
        Convolutions.n_calls = 0
        found, store = scores(Residual(), counted, reuse_activations=reuse)
        counts.append(Convolutions.n_calls)
    assert counts[0] == 4 * 3 * len(found)
    assert counts[1] < 0.85 * counts[0]
    assert store is not None
    assert 0.1 * store.n_calls < store.n_skipped < store.n_calls


def test_other_inputs_are_told_apart() -> None:
    new_batches.n_calls = 0  # type: ignore[attr-defined]
    whole, _ = scores(Residual(), new_batches)
    new_batches.n_calls = 0  # type: ignore[attr-defined]
    found, store = scores(Residual(), new_batches, reuse_activations=True)
    assert found == whole
    assert store is not None
    assert store.n_skipped > 0


@pytest.mark.parametrize(("memory", "is_enough"), [(20_000, False), (60_000, True)])
def test_values_stay_within_the_memory(memory: int, is_enough: bool) -> None:
    found, store = scores(Residual(), of_batches, reuse_activations=True, memory=memory)
    assert found == scores(Residual(), of_batches)[0]
    assert store is not None
    assert sum(one.n_bytes for one in store._kept.values()) <= memory
    assert (store.n_skipped > 0) == is_enough


def test_what_was_not_read_for_a_round_makes_room() -> None:
    def values() -> dict[str, Tensor]:
        return {"x": torch.ones(100)}

    store = ActivationStore(limit=1000, starts=[{"a"}, {"b"}])
    graph = torchshear.trace(Residual().eval(), IMAGES[:2]).fx_graph
    for name in (b"0", b"1", b"2"):
        store.next_run(graph)
        store.keep(name, b"", values())
    assert store.find(b"0", b"") is not None
    assert store.find(b"1", b"") is not None
    assert store.find(b"2", b"") is None  # no room, and both others were read within two candidates
    store.next_run(graph)
    store.find(b"1", b"")
    store.next_run(graph)
    store.next_run(graph)
    store.keep(b"3", b"", values())
    assert [store.find(name, b"") is not None for name in (b"0", b"1", b"3")] == [False, True, True]


def test_the_result_is_that_of_a_search_without() -> None:
    asked: dict[str, Any] = {"method": NetAdapt(step=0.1), "target_macs": 0.85, "trials": 7, "progress": False}
    whole, reusing = (
        torchshear.search(Residual().eval(), IMAGES[:2], evaluate=of_batches, reuse_activations=reuse, **asked)
        for reuse in (False, True)
    )
    assert [(one.widths, one.score) for one in reusing.trials] == [(one.widths, one.score) for one in whole.trials]
    assert reusing.result.form == "native"
    with torch.no_grad():
        assert torch.equal(reusing.result.model(IMAGES), whole.result.model(IMAGES))
    assert all(parameter.requires_grad for parameter in reusing.result.model.parameters())
    assert "of the calls of operators in evaluations were not run" in reusing.notes[-1]


def test_what_cannot_be_reused_is_refused() -> None:
    with pytest.raises(ArgumentError, match="finetune is given, which changes all weights"):
        request(of_batches, reuse_activations=True, finetune=lambda model: None)
    with pytest.raises(ArgumentError, match="reuse_activations"):
        request(of_batches, reuse_activations=1)
    parts = request(of_batches, reuse_activations=True, submodules=["0"])
    with pytest.raises(ArgumentError, match="was captured in parts"):
        parts.prepare(nn.Sequential(Residual()).eval(), IMAGES[:2], None)


def test_an_evaluation_that_trains_fails_with_the_reason() -> None:
    maker = request(lambda model: of_batches(model.train()), reuse_activations=True).prepare(
        Residual().eval(), IMAGES[:2], None
    )
    assert "no graph for train mode" in maker.score(Proposal(maker.space.widest))[0].error
