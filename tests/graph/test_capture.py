"""Capture: what it finds, what it leaves alone, and how it fails."""

import contextlib
import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.models import Residual, Tied, image
from torchshear.errors import ArgumentError, CaptureError, TorchshearError
from torchshear.graph import ExampleInputs, capture, locate


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tensor.requires_grad}{tensor.grad is None}{id(tensor)}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name}{module.training}{len(module._forward_hooks)}{sorted(vars(module))}".encode())
    digest.update(torch.random.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def partly_trained() -> nn.Module:
    model = Residual().train()
    model.norm.eval()
    model.one.weight.requires_grad_(False)
    model.two.register_forward_hook(lambda module, args, output: None)
    model(image()).sum().backward()
    return model


@pytest.mark.parametrize(
    "work",
    [
        lambda model: torchshear.trace(model, (image(),)),
        lambda model: torchshear.prune(model, (image(),)),
        lambda model: torchshear.prune(model, (image(),), ratio=7),
        lambda model: torchshear.trace(model, (image()[:, :2],)),
        lambda model: capture(model, ExampleInputs.of((image(),)), "train"),
    ],
)
def test_the_model_is_as_it_was_also_after_a_failure(work: Callable[[nn.Module], object]) -> None:
    model = partly_trained()
    before = fingerprint(model)
    with contextlib.suppress(TorchshearError):
        work(model)
    assert fingerprint(model) == before


def test_the_batch_is_free_even_if_the_example_has_one_sample() -> None:
    graph = torchshear.trace(Residual(), (image(batch=1),))
    assert graph.batch_hint is not None
    assert graph.mode == "eval"


def test_a_model_that_wants_its_own_batch_is_captured_with_it() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x.reshape(3, 2, 6))

    graph = torchshear.trace(Pairs(), (torch.randn(6, 6),))
    assert graph.batch_hint is None


def test_tied_parameters_have_one_name_and_all_their_aliases() -> None:
    graph = torchshear.trace(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert graph.aliases["head.weight"] == "embedding.weight"
    assert "head.weight" not in graph.state
    assert graph.n_params() == sum(p.numel() for p in Tied().parameters())


def test_no_grad_regions_are_entered() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.relu(self.one(x))
            return self.two(h)

    groups = torchshear.analyze(torchshear.trace(Stopped(), (torch.randn(2, 3),)))
    assert [(group.name, group.width) for group in groups] == [("one.weight[0]", 4)]


def test_locations_name_module_and_line() -> None:
    graph = torchshear.trace(Residual(), (image(),))
    by_name = {node.name: locate(node) for node in graph}
    assert by_name["conv2d"].module == "stem"
    assert by_name["conv2d"].operator == "aten.conv2d.default"
    assert by_name["mean"].module == ""
    assert by_name["mean"].source.startswith("models.py:")
    assert "in the model's forward (models.py:" in str(by_name["mean"])


class Branches(nn.Module):
    """Its forward depends on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Doubles its input if the sum is positive."""
        if self.one(x).sum() > 0:
            return 2 * x
        return x


def test_a_failure_names_module_line_and_remedy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Branches())
    with pytest.raises(CaptureError, match=r"module '1', .*test_capture.py:\d+ in forward.*Expected a forward"):
        torchshear.trace(model, (torch.randn(2, 3),))


def test_wrong_shapes_name_the_module() -> None:
    with pytest.raises(CaptureError, match=r"module 'stem'.*check args and kwargs first"):
        torchshear.trace(Residual(), (image()[:, :2],))


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "message"),
    [
        (Residual(), image(), None, "args is a tensor; expected a tuple"),
        (Residual(), 5, None, "args is int; expected a tuple"),
        (Residual(), (image(),), [1], "kwargs is list; expected a dictionary"),
        ("resnet", (image(),), None, "model is str; expected a torch.nn.Module"),
    ],
)
def test_arguments_of_the_wrong_kind(model: object, args: object, kwargs: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.trace(model, args, kwargs)  # type: ignore[arg-type]


def test_example_inputs_are_described_and_made_again() -> None:
    inputs = ExampleInputs.of((torch.zeros(2, 3), [1, None]), {"flag": True, "more": {"y": torch.zeros(4).long()}})
    again = ExampleInputs.from_json(inputs.to_json() or {})
    assert again.args[0].shape == (2, 3)
    assert again.args[1] == [1, None]
    assert again.kwargs["flag"] is True
    assert again.kwargs["more"]["y"].dtype == torch.int64
    assert ExampleInputs.of((object(),)).to_json() is None
    assert inputs.batch_size() is None
    assert ExampleInputs.of((torch.zeros(2, 3),)).with_batch(5).args[0].shape == (5, 3)
