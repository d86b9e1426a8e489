"""Traced forms of models with backwards of their own: values, but no gradients in silence; native forms have both."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.functions import Adversarial, Quantized, Reversed, Swish
from tests.networks import Net, randomise
from torchshear.errors import CaptureError
from torchshear.graph import parameters_on_meta
from torchshear.speedup import shrink_to_form

MODELS = {"reversed": Adversarial, "rounded": Quantized}
NAMES = {"reversed": r"Reversed \(functions.py:\d+\)", "rounded": r"Rounded \(functions.py:\d+\)"}


def example(n: int = 4) -> Tensor:
    return torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(1))


def total(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(one.square().sum() for one in (output if isinstance(output, tuple) else (output,)))


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_form_gives_values_but_neither_trains_nor_gives_gradients(name: str) -> None:
    model = randomise(MODELS[name](attends=True)).eval()
    result = torchshear.prune(model, (example(),), ratio=0.5)
    assert result.form == "traced"
    assert "it cannot be trained, since a graph does not hold the backward of " in result.report.form
    with torch.no_grad():
        total(result.model(example()))
    for small in (result.model, copy.deepcopy(result.model)):
        with pytest.raises(CaptureError, match=f"no gradients .*{NAMES[name]}"):
            total(small(example())).backward()
        assert all(parameter.grad is None for parameter in small.parameters())
        with pytest.raises(CaptureError, match=f"train mode: .*{NAMES[name]}"):
            small.train()(example())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_the_inputs_are_refused_too(name: str) -> None:
    model = randomise(MODELS[name](attends=True)).eval()
    small, x = torchshear.prune(model, (example(),), ratio=0.5).model, example().requires_grad_()
    with pytest.raises(CaptureError, match="no gradients"):
        torch.autograd.grad(total(small(x)), x)


@pytest.mark.parametrize("name", MODELS)
def test_a_native_form_trains_with_the_gradients_of_the_masked_model(name: str) -> None:
    model = randomise(MODELS[name]()).double().train()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (example().double(),))), ratio=0.5)
    made = shrink_to_form(model, plan)
    assert made.form == "native"
    masked = copy.deepcopy(model)
    masks = {n: mask.to(torch.float64) for n, mask in plan.masks().items()}
    with torch.no_grad():
        for n, parameter in masked.named_parameters():
            parameter.mul_(masks.get(n, torch.ones(())))
    for one in (masked, made.model):
        total(one(example().double())).backward()
    first = next(iter(dict(model.named_parameters())))
    kept = plan.masks()[first].bool()
    expected = masked.get_parameter(first).grad[kept]
    torch.testing.assert_close(made.model.get_parameter(first).grad.flatten(), expected)
    assert expected.any()


def trained() -> Net:
    """Reverses gradients in train mode only; with attention, so that its form is traced."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.relu(m.one(x))
        h = h + m.attention(h, h, h, need_weights=False)[0]
        return m.two(Reversed.apply(h, 1.0) if m.training else h)

    return Net(run, one=nn.Linear(6, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True), two=nn.Linear(8, 3))


def test_a_function_that_only_training_calls_forbids_training_only() -> None:
    small = torchshear.prune(randomise(trained()).eval(), (example(),), ratio=0.5).model
    total(small(example())).backward()
    with pytest.raises(CaptureError, match="train mode: .*Reversed"):
        small.train()(example())


def part() -> Net:
    """A part with a function in it, behind code that looks at values."""
    return Net(
        lambda m, x: m.head(m.body(x if x.sum() > 1e9 else x * 1)), body=Quantized(attends=True), head=nn.Linear(3, 2)
    )


def test_parts_in_traced_form_are_not_trained_either() -> None:
    result = torchshear.prune(randomise(part()).eval(), (example(),), ratio=0.5, submodules=["body"])
    assert result.form == "traced"
    assert "part 'body' is traced" in result.report.form
    assert "does not hold the backward of Rounded" in result.report.form
    with pytest.raises(CaptureError, match="no gradients"):
        total(result.model(example())).backward()
    with pytest.raises(CaptureError, match="train mode"):
        result.model.train()(example())


class Swishing(Quantized):
    """With a function whose backward is the derivative."""

    def __init__(self) -> None:
        super().__init__(attends=True, through=Swish.apply)


def test_a_function_with_the_derivative_is_trained_in_traced_form() -> None:
    model = randomise(Swishing()).eval()
    result = torchshear.prune(model, (example(),), ratio=0.5)
    assert result.form == "traced"
    assert "trained" not in result.report.form
    plain = Quantized(attends=True, through=lambda x: x * torch.sigmoid(x)).eval()
    plain.load_state_dict(model.state_dict())
    expected = torchshear.prune(plain, (example(),), ratio=0.5).model
    for is_training in (False, True):
        for small in (result.model, expected):
            small.zero_grad()
            total(small.train(is_training)(example())).backward()
        for n, parameter in expected.named_parameters():
            torch.testing.assert_close(result.model.get_parameter(n).grad, parameter.grad)


def test_on_the_meta_device_it_is_said_that_nothing_was_compared() -> None:
    with parameters_on_meta():
        model = Swishing()
    small = torchshear.shrink(
        model, torchshear.plan(torchshear.analyze(torchshear.trace(model, (example(),))), "random", 0.5)
    )
    with pytest.raises(CaptureError, match="meta device"):
        small.train()(example())


def test_what_is_made_of_a_traced_form_refuses_gradients_as_well(tmp_path: Path) -> None:
    small = torchshear.prune(randomise(Quantized(attends=True)).eval(), (example(),), ratio=0.5).model
    assert torchshear.export_onnx(small, tmp_path / "small.onnx", (example(),)).path.is_file()
    data = [(example(), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(CaptureError, match="no gradients .*Rounded"):
        torchshear.collect(torchshear.trace(small, (example(),)), data, functional.cross_entropy, 1)
    again = torchshear.prune(small, (example(),), ratio=0.5)
    with pytest.raises(CaptureError, match="no gradients"):
        total(again.model(example())).backward()
