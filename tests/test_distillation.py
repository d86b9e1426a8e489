"""Distillation: nearer to the original without labels, resumable, and nothing that was given changes."""

import io
import itertools
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchshear
from torchshear.distillation import _distill
from torchshear.distillation._losses import LayerPairs, output_loss
from torchshear.errors import ArgumentError, CheckpointError, DataError, WeightError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """A convolution with a norm, a layer that shrinks behind it, and a classifier that keeps its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.wide(x).relu())


def data(n_batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(noise(16, 3, 6, 6, seed=number), torch.zeros(16)) for number in range(n_batches)]


@pytest.fixture
def pruned() -> tuple[nn.Module, torchshear.PruneResult]:
    torch.manual_seed(0)
    model = Small().eval()
    return model, torchshear.prune(model, noise(2, 3, 6, 6), ratio=0.5)


@pytest.mark.parametrize("with_plan", [False, True])
def test_it_comes_nearer_and_leaves_what_was_given(pruned: Any, with_plan: bool) -> None:
    model, result = pruned
    result.model.train()
    before = [{key: value.clone() for key, value in one.state_dict().items()} for one in (model, result.model)]
    plan = result.plan if with_plan else None
    found = torchshear.distill(result.model, model, data(), steps=120, plan=plan, learning_rate=3e-3, progress=False)
    assert found.is_kept
    assert found.error_after < 0.5 * found.error_before
    assert found.model.training
    for one, held in zip((model, result.model), before, strict=True):
        assert all(torch.equal(held[key], value) for key, value in one.state_dict().items())
    running = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert all(torch.equal(found.model.state_dict()[key], before[1][key]) for key in running)
    unseen = noise(32, 3, 6, 6, seed=99)
    with torch.no_grad():
        errors = [float((one.eval()(unseen) - model(unseen)).square().sum()) for one in (result.model, found.model)]
    assert errors[1] < errors[0]


def test_layers_are_compared_at_the_channels_that_are_left(pruned: Any) -> None:
    model, result = pruned
    x = noise(4, 3, 6, 6)
    kept = torch.from_numpy(result.plan.state["conv.weight"].kept[0].copy())

    def compared(plan: Any) -> dict[str, Tensor | None]:
        layers = LayerPairs(result.model, model, plan)
        with layers.watch("pupil"):
            result.model.eval()(x)
        with layers.watch("model"):
            model(x)
        found = {name: layers._comparable(name, *(seen[name] for seen in layers._seen)) for name in layers._seen[0]}
        assert layers.loss() > 0
        return found

    found = compared(result.plan)
    assert torch.equal(found["conv"], model.conv(x)[:, kept])  # type: ignore[arg-type]
    assert found["norm"].shape == (4, 4, 6, 6)  # type: ignore[union-attr]
    assert torch.equal(found["head"], model(x))  # type: ignore[arg-type]
    assert not result.model.conv._forward_hooks
    assert [name for name, value in compared(None).items() if value is not None] == ["head"]


def test_the_loss_of_logits_is_the_divergence_and_of_others_the_relative_error() -> None:
    x, y = noise(6, 5), noise(6, 5, seed=1)
    p, q = (y / 2).softmax(1), (x / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(output_loss([x], [y], 2.0), expected)
    x, y = noise(6), noise(6, seed=1)
    assert torch.allclose(output_loss([x], [y], 2.0), (x - y).square().mean() / y.var(correction=0))


def test_a_run_that_was_interrupted_ends_where_a_whole_one_does(pruned: Any, tmp_path: Path) -> None:
    model, result = pruned
    settings: dict[str, Any] = {"steps": 40, "progress": False}
    whole = torchshear.distill(result.model, model, data(), **settings)
    path = tmp_path / "run.safetensors"

    def stopped(done: int, total: int, what: str) -> None:
        if done == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torchshear.distill(result.model, model, data(), steps=40, progress=stopped, checkpoint=path)
    seen: list[int] = []
    again = torchshear.distill(
        result.model, model, data(), steps=40, progress=lambda done, total, what: seen.append(total), checkpoint=path
    )
    assert set(seen) == {20}
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert torchshear.distill(result.model, model, data(), checkpoint=path, **settings).error_after == again.error_after
    with pytest.raises(ArgumentError, match="another run"):
        torchshear.distill(result.model, model, data(), steps=41, checkpoint=path, progress=False)


def test_what_is_worse_is_not_kept(pruned: Any) -> None:
    model, _ = pruned
    found = torchshear.distill(model, model, data(), steps=3, learning_rate=0.5, progress=False)
    assert found.error_before == 0
    assert not found.is_kept
    assert all(torch.equal(value, found.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_first_batch_is_never_learnt_from(pruned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result = pruned
    batches = data(3)
    seen: list[tuple[float, bool]] = []
    both = _distill._both

    def watched(pupil: nn.Module, teacher: nn.Module, batch: Any, layers: Any = None) -> Any:
        seen.append((float(batch.args[0][0, 0, 0, 0]), torch.is_grad_enabled()))
        return both(pupil, teacher, batch, layers)

    monkeypatch.setattr(_distill, "_both", watched)
    torchshear.distill(result.model, model, batches, steps=6, progress=False)
    first, *others = (float(x[0, 0, 0, 0]) for x, _ in batches)
    assert seen == [(first, False), *((value, True) for value in 3 * others), (first, False)]


def test_a_bar_shows_and_warnings_of_the_loader_are_heard(pruned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result = pruned
    monkeypatch.setattr("torchshear.calibration._progress._SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            warnings.warn("the disk is slow", UserWarning, stacklevel=1)
            return iter(data(3))

    with redirect_stderr(Screen()) as screen, pytest.warns(UserWarning, match="slow"):
        torchshear.distill(result.model, model, Loader(), steps=4)
    assert "distilling" in screen.getvalue()


def test_a_foreign_file_is_not_overwritten(pruned: Any, tmp_path: Path) -> None:
    model, result = pruned
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        torchshear.distill(result.model, model, data(), steps=2, checkpoint=path, progress=False)
    assert path.read_bytes() == content
    path.write_bytes(b"no file of tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        torchshear.distill(result.model, model, data(), steps=2, checkpoint=path, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "fact"),
    [
        ({"steps": 0}, ArgumentError, "steps"),
        ({"learning_rate": 0}, ArgumentError, "learning_rate"),
        ({"temperature": float("nan")}, ArgumentError, "temperature"),
        ({"layer_weight": -1}, ArgumentError, "layer_weight"),
        ({"weight_decay": True}, ArgumentError, "weight_decay"),
        ({"plan": 3}, ArgumentError, "plan"),
        ({"loader": []}, DataError, "no more"),
        ({"loader": data(1)}, DataError, "at least two"),
        ({"loader": iter(data(3))}, DataError, "3 batches"),
        ({"loader": [torch.ones(2)] * 2}, DataError, "does not run"),
        ({"loader": 5}, DataError, "int"),
        ({"loader": [(noise(4, 3, 6, 6) * torch.nan,)] * 2}, DataError, "nan"),
        ({"small": Small().half()}, WeightError, "float16"),
        ({"small": Small().to("meta")}, WeightError, "meta"),
        ({"small": Small().requires_grad_(False)}, ArgumentError, "requires_grad"),
        ({"small": nn.Sequential(nn.Flatten(), nn.Linear(108, 5))}, DataError, "same outputs"),
        ({"model": "dense"}, ArgumentError, "model"),
    ],
)
def test_bad_input_is_refused(pruned: Any, given: dict[str, Any], error: type[Exception], fact: str) -> None:
    model, result = pruned
    call: dict[str, Any] = {"small": result.model, "model": model, "loader": data(), "steps": 4, "progress": False}
    with pytest.raises(error, match=fact):
        torchshear.distill(**(call | given))


def test_an_endless_loader_is_stopped(pruned: Any) -> None:
    model, result = pruned
    endless = (noise(4, 3, 6, 6, seed=number) for number in itertools.count())
    assert torchshear.distill(result.model, model, endless, steps=5, progress=False).n_steps == 5
