"""Outputs that may shrink, by name: they do as the plan says, others keep their shapes, and every value is proved."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import Net, Residual, image, randomise
from tests.oracle import masked_copy
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.errors import ArgumentError, PlanError, VerificationError
from torchshear.pruners import plan_from_kept


class Pyramid(nn.Module):
    """A backbone of two levels; `make` puts a vector, the levels and an auxiliary map into a container."""

    def __init__(self, make: Callable[[Tensor, list[Tensor], Tensor], Any]) -> None:
        super().__init__()
        self.make = make
        self.low, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.high, self.lateral = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        low = self.norm(self.low(x)).relu()
        high = self.high(low).relu()
        return self.make(self.head(high.mean((2, 3))), [low, high], self.lateral(high))


class Outputs(NamedTuple):
    logits: Tensor
    features: list[Tensor]
    aux: Tensor


@dataclass
class Record:
    logits: Tensor
    features: list[Tensor]
    aux: Tensor


torch.export.register_dataclass(Record)
MAKERS = {
    "dict": lambda *parts: dict(zip(("logits", "features", "aux"), parts, strict=True)),
    "named tuple": Outputs,
    "dataclass": Record,
}


def pyramid(kind: str = "dict") -> nn.Module:
    return randomise(Pyramid(MAKERS[kind]).double().eval(), seed=2)


@cache
def pruned(*names: str) -> torchshear.PruneResult:
    """The pyramid of a dictionary, of which outputs of some names may shrink; not to be changed."""
    return torchshear.prune(pyramid(), (batch(),), ratio=0.5, prunable_outputs=names)


def batch() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def shapes(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(model(x))]


@pytest.mark.parametrize("kind", MAKERS)
def test_named_outputs_shrink_and_others_do_not(kind: str) -> None:
    model, x = pyramid(kind), batch()
    result = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs=["features.1", "aux"])
    # The first level is an output as it is, so its channels stay, though they could go inside.
    assert shapes(result.model, x) == [(2, 5), (2, 8, 8, 8), (2, 6, 4, 4), (2, 5, 4, 4)]
    kept = result.plan.kept
    assert {name: len(units) for name, units in kept.items()} == {"high.weight[0]": 6, "lateral.weight[0]": 5}
    reference = pytree.tree_leaves(masked_copy(model, result.plan.masks())(x))
    reference[2] = reference[2][:, kept["high.weight[0]"]]
    reference[3] = reference[3][:, kept["lateral.weight[0]"]]
    for actual, expected in zip(pytree.tree_leaves(result.model(x)), reference, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert type(result.model(x)) is type(model(x))
    assert result.plan.refused["low.weight[0]"] == "model output features.0"


def test_without_names_every_output_keeps_its_shape() -> None:
    result, x = pruned(), batch()
    assert shapes(result.model, x) == shapes(pyramid(), x)
    assert result.plan.n_cut == 0
    assert result.report.outputs == ()


@pytest.mark.parametrize(
    ("names", "widths"), [("features", [5, 4, 6, 10]), ("*", [3, 4, 6, 5]), ("f*.0", [5, 4, 12, 10])]
)
def test_patterns_and_containers(names: str, widths: list[int]) -> None:
    small = torchshear.prune(pyramid(), (batch(),), ratio=0.5, prunable_outputs=names).model
    assert [shape[1] for shape in shapes(small, batch())] == widths


def test_a_single_output_is_called_zero() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double(), seed=1)
    x = torch.randn(3, 4, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs="0")
    kept = result.plan.kept["0.weight[0]"]
    assert torch.allclose(result.model(x), model(x)[:, kept], rtol=0, atol=1e-12)
    assert result.form == "native"


def test_the_report_says_how_outputs_changed() -> None:
    report = pruned("features.1").report
    assert [(o.name, o.before, o.after) for o in report.outputs] == [("features.1", (None, 12, 4, 4), (None, 6, 4, 4))]
    assert "output      features.1 (batch, 12, 4, 4) -> (batch, 6, 4, 4)" in str(report)
    assert report.to_dict()["outputs"][0]["after"] == (None, 6, 4, 4)


def test_an_output_that_cannot_shrink_says_why() -> None:
    """One value under two names, and an input given back."""

    def run(m: Net, x: Tensor) -> dict[str, Tensor]:
        last = m.two(m.one(x).relu())
        return {"last": last, "again": last, "given": x}

    model = randomise(Net(run, one=nn.Linear(4, 6), two=nn.Linear(6, 8)).double(), seed=1)
    x = torch.randn(3, 4, dtype=torch.float64)
    report = torchshear.prune(model, (x,), prunable_outputs=["last", "given"]).report
    assert [output.before == output.after for output in report.outputs] == [True, True]
    text = str(report)
    assert "output      last (batch, 8) unchanged: model output again" in text
    assert "output      given (batch, 4) unchanged: model input 'args_0', dimension 1" in text
    both = torchshear.prune(model, (x,), prunable_outputs=["last", "again"])
    assert {name: tuple(out.shape) for name, out in both.model(x).items()} == dict.fromkeys(
        ("last", "again", "given"), (3, 4)
    )


LISTED = r"Pyramid, .*logits \(batch, 5\), features.0 \(batch, 8, 8, 8\), "


@pytest.mark.parametrize(
    ("names", "message"),
    [
        *((names, LISTED) for names in ("feature", ["aux", "logit"], "features.2")),
        ("logit", "Close to it: logits"),
        (5, "prunable_outputs=5; expected a string"),
    ],
)
def test_unknown_names_list_the_outputs(names: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.analyze(pruned().plan.analysis.graph, prunable_outputs=names)


def test_a_plan_with_outputs_replays_from_its_file_on_a_fresh_model(tmp_path: Path) -> None:
    result, x = pruned("features.*"), batch()
    result.plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == result.plan
    assert loaded.prunable_outputs == ("features.*",)
    assert [(o.name, o.shape, o.shape_after) for o in loaded.outputs] == [
        ("features.0", (None, 8, 8, 8), (None, 4, 8, 8)),
        ("features.1", (None, 12, 4, 4), (None, 6, 4, 4)),
    ]
    fresh = pyramid()
    small = torchshear.shrink(fresh, loaded, (x,))
    assert torchshear.verify(fresh, small, loaded, (x,)).max_error <= 1e-9
    small.load_state_dict(result.model.state_dict())
    for ours, theirs in zip(pytree.tree_leaves(small(x)), pytree.tree_leaves(result.model(x)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "damage",
    [
        lambda o: o.update(shape=5),
        lambda o: o.pop("name"),
        lambda o: o["kept"].update({"7": "0"}),
        lambda o: o["kept"].update({"0": "0"}),
        lambda o: o["kept"].update({"1": "0-99"}),
    ],
)
def test_damaged_outputs_are_damage(tmp_path: Path, damage: Callable[[dict], Any]) -> None:
    pruned("aux").plan.save(tmp_path / "plan.json")
    edit_plan(tmp_path / "plan.json", lambda document: damage(document["outputs"][0]))
    with pytest.raises(PlanError, match="is damaged"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_wrong_output_is_found() -> None:
    """Channels of the output in another order are another output, though every weight is there."""
    small = copy.deepcopy(pruned("aux").model)
    for tensor in (small.lateral.weight, small.lateral.bias):
        tensor.data = tensor.data.flip(0)
    with pytest.raises(VerificationError):
        torchshear.verify(pyramid(), small, pruned("aux").plan, (batch(),))


def test_a_mixed_output_is_proved_on_kept_positions() -> None:
    """Tokens after a norm: cutting channels is another function than zeroing them."""
    model = Net(lambda m, x: {"tokens": m.norm(m.one(x))}, one=nn.Linear(4, 12), norm=nn.LayerNorm(12))
    model, x = randomise(model.double(), seed=3), torch.randn(2, 5, 4, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs="tokens")
    assert result.verification.reference == "kept positions"
    kept = result.plan.kept["one.weight[0]"]
    hidden = (x @ model.one.weight.T + model.one.bias)[..., kept]
    centred = hidden - hidden.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + model.norm.eps).sqrt()
    assert torch.allclose(
        result.model(x)["tokens"], scaled * model.norm.weight[kept] + model.norm.bias[kept], rtol=0, atol=1e-12
    )


def test_a_dimension_that_holds_the_batch_stays() -> None:
    """A value whose first dimension holds batch and channels: the batch's share may not shrink."""
    model, x = Net(lambda m, x: m.one(x).flatten(0, 1), one=nn.Conv1d(3, 6, 1)), torch.randn(2, 3, 5).double()
    result = torchshear.prune(randomise(model.double(), seed=3), (x,), prunable_outputs="0")
    assert result.plan.n_cut == 0
    assert result.model(x).shape == (12, 5)


def test_something_is_left_of_each_part_of_an_output() -> None:
    """Two outputs are halves of one layer: each keeps channels even if the other has the better ones."""
    model, x = Net(lambda m, x: m.one(x).split(4, -1), one=nn.Linear(4, 8)), torch.randn(2, 4)
    model.one.weight.data[:4] *= 100
    result = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs="*")
    assert [tuple(out.shape) for out in result.model(x)] == [(2, 2), (2, 2)]


def test_auxiliary_outputs_of_training_follow() -> None:
    """Train mode returns a second map that eval mode does not: it shrinks with the stream that it is made of."""

    def run(m: Net, x: Tensor) -> dict[str, Tensor]:
        low = m.one(x)
        return {"map": m.two(low)} | ({"aux": m.aux(low)} if m.training else {})

    model = Net(run, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 6, 1), aux=nn.Conv2d(8, 4, 1))
    model, x = randomise(model.double().eval(), seed=1), batch()
    small = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs="map").model
    assert small(x)["map"].shape == (2, 3, 8, 8)
    assert small.train()(x)["aux"].shape == (2, 4, 8, 8)


def test_given_units_and_outputs(tmp_path: Path) -> None:
    model = randomise(Residual().double().eval(), seed=1)
    x = image().double()
    groups = torchshear.analyze(torchshear.trace(model, (x,)), "0")
    plan = plan_from_kept(groups, {"head.weight[0]": [0, 3]})
    small = torchshear.shrink(model, plan)
    assert torchshear.verify(model, small, plan, (x,)).max_error <= 1e-9
    assert torch.allclose(small(x), model(x)[:, [0, 3]], rtol=0, atol=1e-12)
    assert np.array_equal(plan.outputs[0].kept[1], [0, 3])
    file = torchshear.export_onnx(small.float(), tmp_path / "small.onnx", (x.float(),))
    assert file.dynamic_batch


def maps(mixes: bool) -> Net:
    """Gives its maps in train mode, as detectors do for their loss, and scores with the maps in eval mode."""

    def run(m: Net, x: Tensor) -> Any:
        low = m.one(x).relu()
        maps = m.two(low.softmax(1) if m.mixes else low)
        found = {"scores": m.out(maps), "maps": maps}
        return found if m.training else (found["scores"].sigmoid(), found)

    return Net(run, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 12, 1), out=nn.Conv2d(12, 5, 1), mixes=mixes)


@pytest.mark.parametrize("mixes", [False, True], ids=["", "softmax"])
def test_outputs_that_only_train_mode_gives_may_shrink(mixes: bool, tmp_path: Path) -> None:
    model, x = randomise(maps(mixes).double().eval(), seed=1), batch()
    kept = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs="1.maps")
    assert kept.model(x)[1]["maps"].shape[1] == 12
    assert "1.maps (batch, 12, 8, 8) unchanged: model output maps in train mode" in str(kept.report)
    result = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs=("1.maps", "maps"))
    assert result.verification.modes == ("eval", "train")
    assert [(o.name, o.mode, o.index) for o in result.plan.outputs] == [("1.maps", "eval", 2), ("maps", "train", 1)]
    assert "maps in train mode (batch, 12, 8, 8) -> (batch, 6, 8, 8)" in str(result.report)
    rows = torch.from_numpy(result.plan.outputs[1].kept[1].copy())
    assert result.model(x)[1]["maps"].shape[1] == result.model.train()(x)["maps"].shape[1] == 6
    if not mixes:
        masked = masked_copy(model, result.plan.masks()).train()
        assert torch.allclose(result.model(x)["maps"], masked(x)["maps"][:, rows], rtol=0, atol=1e-12)
        assert torch.allclose(result.model(x)["scores"], masked(x)["scores"], rtol=0, atol=1e-12)
    result.plan.save(tmp_path / "plan.json")
    loaded = torchshear.PruningPlan.load(tmp_path / "plan.json")
    assert [output.mode for output in loaded.outputs] == ["eval", "train"]
    again = torchshear.shrink(model, loaded, (x,)).train()
    assert torch.equal(again(x)["maps"], result.model(x)["maps"])


def test_unknown_names_list_the_outputs_of_train_mode_too() -> None:
    with pytest.raises(ArgumentError, match=r"maps \(batch, 12, 8, 8\) in train mode.*: maps, 1.maps"):
        torchshear.prune(maps(False).double().eval(), (batch(),), prunable_outputs="map")


def test_a_wrong_output_of_train_mode_is_found() -> None:
    model, x = randomise(maps(False).double().eval(), seed=1), batch()
    plan = torchshear.prune(model, (x,), ratio=0.5, prunable_outputs=("1.maps", "maps")).plan
    small = torchshear.shrink(model, plan, (x,))

    def turned(module: nn.Module, args: Any, output: Any) -> Any:
        return output | {"maps": output["maps"].flip(1)} if module.training else output

    small.register_forward_hook(turned)
    with pytest.raises(VerificationError, match="in train mode the shrunk model differs"):
        torchshear.verify(model, small, plan, (x,))
