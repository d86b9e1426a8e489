"""Capture: what it finds, what it leaves alone, and how it fails."""

import contextlib
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Residual, Tied, image
from tests.oracle import fingerprint
from torchshear.errors import ArgumentError, CaptureError, TorchshearError
from torchshear.graph import ExampleInputs
from torchshear.graph._location import locate
from torchshear.graph.capture import _dynamic_batch
from torchshear.graph.capture._trace import capture_in_mode
from torchshear.speedup import shrink_to_form


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
        lambda model: capture_in_mode(model, ExampleInputs.of((image(),)), "train"),
    ],
)
def test_the_model_is_as_it_was_also_after_a_failure(work: Callable[[nn.Module], object]) -> None:
    model = partly_trained()
    before = fingerprint(model)
    with contextlib.suppress(TorchshearError):
        work(model)
    assert fingerprint(model) == before


class Remembering(nn.Module):
    """Replaces a buffer, counts its calls and keeps a value, whenever it runs."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 2)
        self.extra = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.width = x.shape[1]
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        y: Tensor = self.two(self.one(x))
        return y + self.extra(x) if self.training else y


def test_what_a_forward_assigns_is_undone() -> None:
    model, x = Remembering(), torch.randn(4, 3)
    before, mean = fingerprint(model), model.mean
    torchshear.prune(model, (x,))
    assert fingerprint(model) == before
    assert model.mean is mean


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_refused_and_keeps_its_mode() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()).train())
    model = nn.Sequential(nn.Linear(3, 8), scripted, nn.Linear(8, 2)).train()
    with pytest.raises(CaptureError, match="module '1'"):
        torchshear.trace(model, (torch.randn(4, 3),))
    assert all(module.training for module in model.modules())


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


class AtTheEnd(nn.Module):
    """A convolution, and a function of the map and the input on top."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 3), nn.Conv2d(width, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.two(self.one(x)), x)


def windows(y: Tensor, x: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    y = y.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    y = y.reshape(batch * (height // 2) * (width // 2), channels, 4)
    return y.softmax(-1).view(batch, -1, channels * 4)


@pytest.mark.parametrize(
    "function",
    [
        windows,
        lambda y, x: y.sum(0) / x.shape[0],
        lambda y, x: y.new_zeros(x.shape[0], 3) + (torch.arange(y.shape[0]) + y.mean((1, 2, 3)))[:, None],
        lambda y, x: torch.cat([y, y.new_full((2 * y.shape[0], 2, 1, 1), y.shape[0]).expand(-1, -1, 10, 10)]),
        lambda y, x: y.flatten(2).view(len(x), 2, -1).repeat_interleave(2, 0)[: len(x)],
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_sizes_that_are_computed_of_the_batch_follow_it(function: Callable, batch: int) -> None:
    model = AtTheEnd(function)
    result = torchshear.prune(model, (image(batch, 12),), ratio=0.5)
    traced = shrink_to_form(model, result.plan, form="traced").model
    assert result.plan.analysis is not None
    assert result.plan.analysis.graph.batch_hint is not None
    for other in (2, 7):
        x = image(other, 12)
        torch.testing.assert_close(traced(x), shrink_to_form(model, result.plan).model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y * 2 if x.shape[0] % 2 else y,
        lambda y, x: y * 2 if x.shape[0] > 10 else y,
        lambda y, x: y / float(x.shape[0]),
        lambda y, x: y[: x.shape[0] // 2],
    ],
)
def test_python_that_looks_at_the_batch_fixes_it(function: Callable) -> None:
    model = AtTheEnd(function)
    graph = torchshear.trace(model, (image(4, 12),))
    assert graph.batch_hint is None
    torchshear.prune(model, (image(4, 12),), ratio=0.5)


def test_a_size_inside_that_is_a_multiple_of_the_probed_batch_leads_to_another_one() -> None:
    model = AtTheEnd(lambda y, x: y.view(-1, 2, 59 * 59))
    graph = torchshear.trace(model, (image(2, 61),))
    assert graph.batch_hint not in (None, 59, 61)


def test_widths_that_every_probe_divides_fix_the_batch() -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((3, *_dynamic_batch._PRIMES, 2))))
    graph = torchshear.trace(model, (torch.randn(2, 3),))
    assert graph.batch_hint is None
    assert len(torchshear.analyze(graph)) == len(_dynamic_batch._PRIMES)


def test_a_train_graph_is_the_model_also_with_dropout_and_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    graph = capture_in_mode(model, ExampleInputs.of((torch.randn(3, 6),)), "train")
    assert graph.batch_hint is not None
    assert int(model[1].num_batches_tracked) == 0


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
    assert by_name["mean"].source.startswith("plain.py:")
    assert "in the model's forward (plain.py:" in str(by_name["mean"])


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
    with pytest.raises(CaptureError, match=r"module '1', .*test_trace.py:\d+ in forward"):
        torchshear.trace(model, (torch.randn(2, 3),))


def test_wrong_shapes_name_the_module() -> None:
    with pytest.raises(CaptureError, match=r"module 'stem'.*check args and kwargs first"):
        torchshear.trace(Residual(), (image()[:, :2],))


def test_branches_on_tensors_are_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(torch.cond(h.sum() > 0, lambda t: t.relu(), lambda t: 2 * t, (h,)))

    with pytest.raises(CaptureError, match="cond in the model.s forward .* calls graphs of its own"):
        torchshear.trace(Branching(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "message"),
    [
        (Residual(), 5, None, "args is int; expected a tensor or a tuple"),
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


class LazyHooks(nn.Module):
    """Installs a hook that counts when it is first called, and remembers that it has, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.seen = nn.Linear(3, 4), {}

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        if not getattr(self, "_installed", False):
            self._installed = True
            self.one.register_forward_hook(lambda *_: self.seen.update(n=self.seen.get("n", 0) + 1))
        self.seen.clear()
        return self.one(x), self.seen["n"]


def test_hooks_that_a_forward_installs_are_gone_with_what_remembers_them() -> None:
    model, x = LazyHooks(), torch.randn(2, 3)
    torchshear.trace(model, (x,))
    assert len(model.one._forward_hooks) == 0
    assert model.seen == {}
    assert model(x)[1] == 1
    torchshear.trace(model, (x,))
    assert len(model.one._forward_hooks) == 1
    assert model(x)[1] == 1


class Anchored(nn.Module):
    """Keeps a table for the shape that it saw last, as detectors keep anchors; of the class before it saw any."""

    shape: tuple[int, ...] = ()
    table = torch.zeros(0)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            self.table = torch.arange(x.shape[1], device=x.device).unsqueeze(1) * 0.5
            self.shape = tuple(x.shape[1:])
        return self.layer(x) + self.table


@pytest.mark.parametrize("ran", [False, True])
def test_what_a_capture_leaves_in_a_model_is_no_constant_of_the_next(ran: bool) -> None:
    model, x = Anchored().eval(), torch.randn(2, 5, 6)
    if ran:
        model(x)
    before = dict(vars(model))
    graph = torchshear.trace(model, (x,))
    assert graph.batch_hint is not None
    assert all(type(entry.tensor) in (Tensor, nn.Parameter) for entry in graph.state.values())
    assert vars(model) == before
