"""The traced form as users handle it: saved whole, sent to a process, and called at other sizes where it holds none."""

import copy
import io
import logging
import multiprocessing
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import Net, randomise
from torchshear.errors import ArgumentError, OutputError
from torchshear.speedup import TracedModule

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Mixing(nn.Module):
    """Reads a number of channels that no attribute holds, and nothing of the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.dropout, self.leave = nn.Dropout(0.1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.norm(self.enter(x)).relu() * scale
        if y.shape[1] != 16:
            raise ValueError("16 channels")
        return {"map": self.leave(self.dropout(y))}


class Padding(Mixing):
    """Asks for the size of its images."""

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return super().forward(nn.functional.pad(x, (0, x.shape[3] % 2)), scale)


def masked() -> Net:
    """Two inputs that share the length of a sequence."""

    def run(m: Net, tokens: Tensor, mask: Tensor) -> Tensor:
        x = m.table(tokens) * mask[..., None]
        if x.shape[2] != 16:
            raise ValueError("16 channels")
        return m.leave(x).cumsum(1)

    return Net(run, table=nn.Embedding(20, 16), leave=nn.Linear(16, 3))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    result = torchshear.prune(randomise(Mixing().eval(), 3), (IMAGE,))
    assert isinstance(result.model, TracedModule)
    assert "modes=['eval', 'train']" in repr(result.model)
    return result.model


@pytest.mark.parametrize("training", [False, True])
def test_it_is_saved_whole_and_is_the_same(small: nn.Module, training: bool) -> None:
    file = io.BytesIO()
    small = copy.deepcopy(small).train(training)
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    results = []
    for model in (copy.deepcopy(small), again):
        torch.manual_seed(0)
        results.append(model(IMAGE)["map"])
    assert torch.equal(*results)
    assert again.training is training
    again.train()(IMAGE)["map"].sum().backward()


def _run(model: nn.Module, x: Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(model(x)["map"].tolist())


def test_another_process_takes_it(small: nn.Module) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run, args=(small, IMAGE, queue))
    process.start()
    assert torch.equal(torch.tensor(queue.get(timeout=3600)), small(IMAGE)["map"].detach())
    process.join()


def test_what_cannot_be_pickled_names_the_lines_to_use() -> None:
    @dataclass
    class Local:
        map: Tensor

    pytree.register_dataclass(Local)

    class Own(Mixing):
        def forward(self, x: Tensor) -> Local:
            return Local(super().forward(x)["map"])

    small = torchshear.prune(randomise(Own().eval(), 3), (IMAGE,)).model
    with pytest.raises(OutputError, match=r"plan\.save"):
        pickle.dumps(small)


def test_images_of_other_sizes_where_the_graph_holds_none(small: nn.Module) -> None:
    large = torch.randn(3, 3, 24, 15)
    weights = small.state_dict()
    y = nn.functional.conv2d(large, weights["enter.weight"], weights["enter.bias"], padding=1)
    y = nn.functional.batch_norm(
        y, *(weights[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    ).relu()
    expected = nn.functional.conv2d(y, weights["leave.weight"], weights["leave.bias"])
    torch.testing.assert_close(small(large)["map"], expected)
    with pytest.raises(ArgumentError, match=r"captured for \(any, 3, any, any\)"):
        small(torch.randn(3, 4, 24, 15))


def test_sizes_that_do_not_fit_are_tried_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    class Flat(Mixing):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"map": super().forward(x, scale)["map"].flatten(1) @ torch.ones(5 * 256, 2)}

    small = torchshear.prune(randomise(Flat().eval(), 3), (IMAGE,)).model
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(record.msg.startswith("the pruned model") for record in warnings)  # of its speed, which the CPU decides
    with pytest.raises(ArgumentError, match=r"captured for \(any, 3, 16, 16\)"):
        small(torch.randn(2, 3, 24, 24))


def test_a_size_that_the_code_asks_for_is_not_another() -> None:
    small = torchshear.prune(randomise(Padding().eval(), 3), (IMAGE,)).model
    assert small(torch.randn(3, 3, 24, 16))["map"].shape == (3, 5, 24, 16)
    with pytest.raises(ArgumentError, match=r"captured for \(any, 3, any, 16\)"):
        small(torch.randn(3, 3, 16, 15))


def test_sequences_of_other_lengths_in_all_inputs_at_once() -> None:
    tokens, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7)
    small = torchshear.prune(randomise(masked().eval(), 3), (tokens, mask)).model
    assert isinstance(small, TracedModule)
    longer = torch.arange(11)[None]
    short = small(longer[:, :7], mask[:1])
    torch.testing.assert_close(small(longer, torch.ones(1, 11))[:, :7], short)
