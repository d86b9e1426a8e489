"""Plans from weights that are given apart from the model: from a checkpoint on disk, or a mapping."""

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchshear
from tests.networks import Attention, Grouped, Residual, Tied, image, randomise
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError, CheckpointError, WeightError

MODELS = {
    "residual": (Residual, lambda: image()),
    "grouped": (Grouped, lambda: image()),
    "attention": (Attention, lambda: torch.randn(2, 5, 24)),
    "tied": (Tied, lambda: torch.zeros(2, 3, dtype=torch.long)),
}


def on_meta(name: str) -> ChannelGroups:
    build, example = MODELS[name]
    with torch.device("meta"):
        model = build()
    return torchshear.analyze(torchshear.trace(model.eval(), (example().to("meta"),)))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def dense(name: str) -> tuple[nn.Module, torchshear.PruningPlan]:
    build, example = MODELS[name]
    model = randomise(build()).eval()
    return model, torchshear.plan(torchshear.analyze(torchshear.trace(model, (example(),))))


class OneAtATime(Mapping[str, Tensor]):
    """Reads a tensor when it is asked for and fails if an earlier one is still alive."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.last: weakref.ref[Any] | None = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        assert self.last is None or self.last() is None, "two weights are held at a time"
        values = self.tensors[name].numpy().copy()  # kept by the storage of the tensor that is made of it
        self.last = weakref.ref(values)
        return torch.from_numpy(values)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_on_meta_with_weights_from_disk_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    model, expected = dense(name)
    save_file(weights_of(model), tmp_path / "model.safetensors")
    assert torchshear.plan(on_meta(name), weights=tmp_path) == expected
    assert torchshear.plan(on_meta(name), weights=str(tmp_path / "model.safetensors")) == expected
    assert torchshear.plan(on_meta(name), weights=weights_of(model)) == expected


def test_weights_are_held_one_at_a_time() -> None:
    model, expected = dense("residual")
    assert torchshear.plan(on_meta("residual"), weights=OneAtATime(weights_of(model))) == expected


def test_a_tied_weight_may_have_either_name(tmp_path: Path) -> None:
    model, expected = dense("tied")
    names = dict(model.named_parameters(remove_duplicate=False))
    aliases = expected.aliases
    assert aliases
    renamed = {
        next((alias for alias, canonical in aliases.items() if canonical == name), name): tensor.detach()
        for name, tensor in names.items()
        if name not in aliases
    }
    assert torchshear.plan(on_meta("tied"), weights=renamed) == expected


def test_a_prefix_may_be_missing_or_added() -> None:
    model, expected = dense("residual")
    longer = {f"net.{name}": tensor for name, tensor in weights_of(model).items()}
    assert torchshear.plan(on_meta("residual"), weights=longer) == expected
    whole = torchshear.analyze(
        torchshear.trace(nn.Sequential(Residual().to("meta")), (torch.empty(2, 3, 8, 8, device="meta"),))
    )
    plan = torchshear.plan(whole, weights=weights_of(model))
    assert [kept.tolist() for kept in plan.kept.values()] == [kept.tolist() for kept in expected.kept.values()]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = dense("residual")
    groups = on_meta("residual")
    weights = weights_of(model)
    with pytest.raises(WeightError, match="no weight 'two.weight' of group"):
        torchshear.plan(groups, weights={name: t for name, t in weights.items() if name != "two.weight"})
    with pytest.raises(WeightError, match=r"'two.weight' has shape \(8, 9, 3, 3\)"):
        torchshear.plan(groups, weights=weights | {"two.weight": torch.zeros(8, 9, 3, 3)})
    with pytest.raises(WeightError, match=r"weight 'two.weight' has type list"):
        torchshear.plan(groups, weights=weights | {"two.weight": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(WeightError, match=r"is on the meta device and has no values"):
        torchshear.plan(groups, weights={name: t.to("meta") for name, t in weights.items()})
    with pytest.raises(ArgumentError, match="weights is list"):
        torchshear.plan(groups, weights=[])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nowhere' .*model.safetensors"):
        torchshear.plan(groups, weights=tmp_path / "nowhere")
