"""Plans: masks, files, damage, composition."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Grouped, Residual, image, randomise
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.dependency.plans import _plan_file
from torchshear.errors import OutputError, PlanError
from torchshear.pruners import plan_from_kept


@pytest.fixture
def model() -> Residual:
    return randomise(Residual()).eval()


@pytest.fixture
def plan(model: Residual) -> PruningPlan:
    return torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))), ratio=0.5)


def test_masks_have_original_shapes_and_multiply_along_dimensions(model: Residual, plan: PruningPlan) -> None:
    masks = plan.masks()
    state = dict(model.state_dict())
    assert all(masks[name].shape == state[name].shape and masks[name].dtype == torch.bool for name in masks)
    kept = plan.kept
    assert masks["one.weight"].sum() == len(kept["one.weight[0]"]) * len(kept["stem.weight[0]"]) * 9
    assert masks["norm.running_mean"].nonzero().flatten().tolist() == kept["stem.weight[0]"].tolist()
    assert "head.bias" not in masks


def test_masks_of_a_grouped_weight_follow_each_block() -> None:
    groups = torchshear.analyze(torchshear.trace(Grouped(), (image(),)))
    kept = {"one.weight[0]": [0, 1, 5, 6, 8, 11], "two.weight[0]": [0, 4, 8]}
    mask = plan_from_kept(groups, kept).masks()["two.weight"]
    for row in range(12):
        inputs = [[0, 1], [1, 2], [0, 3]][row // 4] if row in (0, 4, 8) else []
        assert mask[row, :, 0, 0].nonzero().flatten().tolist() == inputs


def test_a_channel_takes_its_whole_map_out_of_a_linear_layer_behind_a_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 2))
    groups = torchshear.analyze(torchshear.trace(model, (torch.zeros(2, 3, 3, 3),)))
    plan = plan_from_kept(groups, {"0.weight[0]": [0, 1, 3]})
    gone = ~plan.masks()["3.weight"].any(0)
    assert gone.nonzero().flatten().tolist() == list(range(18, 27))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"one.weight[0]": [0, 1, 5]}, r"3 blocks keep \[2, 1, 0\] channels; expected equally many"),
        ({"one.weight[0]": [0, 99]}, "kept units 0..99 of group 'one.weight.0.'; expected indices below its width 12"),
        ({"one.weight[0]": [0, 0, 4, 8]}, "named twice"),
        ({"one.weight[0]": []}, "would keep no unit"),
        ({"one.weight[0]": [[0], [4, 8]]}, "are list, which is no list of indices"),
        (
            {"one.weight[0]": torch.empty(3, dtype=torch.int64, device="meta")},
            "are Tensor, which is no list of indices",
        ),
        ({"one.weight[0]": torch.zeros(3, requires_grad=True)}, "dtype float32; expected integer indices"),
        ({"other[0]": [0]}, "channel group 'other.0.' is not in this network"),
    ],
)
def test_kept_units_are_checked(kept: dict, message: str) -> None:
    groups = torchshear.analyze(torchshear.trace(Grouped(), (image(),)))
    with pytest.raises(PlanError, match=message):
        plan_from_kept(groups, kept)


def test_a_plan_survives_its_file(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.request == plan.request
    assert loaded.refused == plan.refused
    assert loaded.masks().keys() == plan.masks().keys()
    assert all(torch.equal(loaded.masks()[name], mask) for name, mask in plan.masks().items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_long_lists_go_to_a_tensor_file_that_is_replaced_with_the_plan(
    plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan_file, "_LONGEST_TEXT", 3)
    plan.save(tmp_path / "plan.json")
    first = {entry.name for entry in tmp_path.iterdir()}
    assert len(first) == 2
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    other = plan_from_kept(plan.analysis, {"one.weight[0]": [1, 4, 9]})
    other.save(tmp_path / "plan.json")
    assert {entry.name for entry in tmp_path.iterdir()} > first, "a copy of the first plan may need its tensors"
    assert PruningPlan.load(tmp_path / "plan.json") == other


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_damage(plan: PruningPlan, tmp_path: Path, share: float) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    with pytest.raises(PlanError, match="is damaged: it is not whole JSON"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("groups"), "entry 'groups' is missing"),
        (lambda d: d["groups"][0].update(kept="0-99"), r"keeps indices that are not ascending numbers in 0..7"),
        (lambda d: d["groups"][0].update(kept="3,1"), "not ascending"),
        (lambda d: d["groups"][0].update(kept="zero"), "index list 'zero' cannot be read"),
        (lambda d: d["groups"][0].update(kept="@gone"), "index list '@gone' cannot be read"),
        (lambda d: d["state"]["one.weight"]["kept"].update({"9": "0"}), "'one.weight' has no dimension 9"),
        (
            lambda d: d["state"]["one.weight"].update(blocks={"1": 3}),
            "does not keep equally many positions in each of 3",
        ),
        (lambda d: d["state"]["one.weight"].update(blocks={"2": 1}), "blocks of a dimension that it keeps whole"),
        (
            lambda d: d["state"]["one.weight"].update(numbers={"size": 2, "kept": "0-5"}),
            "counts positions that are not",
        ),
        (lambda d: d["state"]["one.weight"].update(shape="x"), "missing or of the wrong kind"),
        (lambda d: d.pop("whole"), "entry 'whole' is missing"),
        (lambda d: d["model"]["inputs"]["args"][0].update(tensor="x"), "missing or of the wrong kind"),
        (lambda d: d["model"]["inputs"].pop("kwargs"), "entry 'kwargs' is missing"),
        (lambda d: d.update(version=99), "format version 99; this torchshear reads 4"),
        (lambda d: d.update(format="other"), "does not say format"),
        (lambda d: d.update(groups=5), "missing or of the wrong kind"),
    ],
)
def test_damage_is_named(plan: PruningPlan, tmp_path: Path, edit, message: str) -> None:  # type: ignore[no-untyped-def]
    plan.save(tmp_path / "plan.json")
    edit_plan(tmp_path / "plan.json", edit)
    with pytest.raises(PlanError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_changed_tensor_file_is_damage(plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan_file, "_LONGEST_TEXT", 3)
    plan.save(tmp_path / "plan.json")
    tensors = next(tmp_path.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PlanError, match="was changed or cut short"):
        PruningPlan.load(tmp_path / "plan.json")
    tensors.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(PlanError, match="not whole JSON"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_full_disk_leaves_the_old_plan(plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = plan_from_kept(plan.analysis, {"one.weight[0]": [0]})
    with pytest.raises(OutputError, match="No space left on device"):
        other.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_missing_folder_is_named(plan: PruningPlan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Expected a folder that exists"):
        plan.save(tmp_path / "no" / "plan.json")


def test_two_plans_compose_into_one(model: Residual, plan: PruningPlan) -> None:
    small = torchshear.shrink(model, plan)
    second = torchshear.plan(torchshear.analyze(torchshear.trace(small, (image(),))), ratio=0.5)
    twice = torchshear.shrink(small, second)
    both = plan.then(second)
    at_once = torchshear.shrink(model, both)
    assert all(
        torch.equal(a, b) for a, b in zip(twice.state_dict().values(), at_once.state_dict().values(), strict=True)
    )
    assert [len(kept) for kept in both.kept.values()] == [2, 4]
    with pytest.raises(PlanError, match="which the first leaves"):
        both.then(plan)


class SharedHeads(nn.Module):
    """Attention of which two query heads share each of three heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 24)
        self.q, self.k, self.v = nn.Linear(24, 6 * 4), nn.Linear(24, 3 * 4), nn.Linear(24, 3 * 4)
        self.o = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        q, k, v = (part(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("role", ["kv_heads", "q_heads", "qk_dim", "v_dim"])
def test_plans_compose_where_groups_change_their_names(role: str) -> None:
    model, x = randomise(SharedHeads()).eval(), torch.randn(2, 3, 6)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    first = plan_from_kept(groups, {g.name: np.arange(1, g.width) for g in groups if g.role == role})
    small = torchshear.shrink(model, first)
    left = torchshear.analyze(torchshear.trace(small, (x,)))
    for cut in left.prunable:
        second = plan_from_kept(left, {cut.name: np.arange(1, cut.width)})
        twice, at_once = torchshear.shrink(small, second), torchshear.shrink(model, first.then(second))
        assert_equal_states(twice, at_once)


def test_a_second_plan_from_a_file_composes(model: Residual, plan: PruningPlan, tmp_path: Path) -> None:
    small = torchshear.shrink(model, plan)
    second = torchshear.plan(torchshear.analyze(torchshear.trace(small, (image(),))), ratio=0.5)
    second.save(tmp_path / "second.json")
    assert plan.then(PruningPlan.load(tmp_path / "second.json")) == plan.then(second)


def assert_equal_states(left: nn.Module, right: nn.Module) -> None:
    state = right.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in left.state_dict().items())


def test_composition_refuses_a_plan_of_another_model(plan: PruningPlan) -> None:
    other = plan_from_kept(torchshear.analyze(torchshear.trace(Grouped(), (image(),))), {})
    with pytest.raises(PlanError, match="it is for another model"):
        plan.then(other)


def test_index_lists_round_trip() -> None:
    for indices in ([0], [0, 1, 2], [1, 3, 5], [0, 2, 3, 4, 9], []):
        array = np.array(indices, np.int64)
        reader = _plan_file.IndexReader(Path("x"), {})
        assert reader.read(_plan_file.IndexWriter().write(array)).tolist() == indices
