"""Orders of channels that a model keeps in a buffer: a plan is for the values that it was made with, and says so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchshear
from torchshear import PruningPlan
from torchshear.errors import CheckpointError, PlanError, WeightError
from torchshear.graph import parameters_on_meta


class Permuted(nn.Module):
    """Channels in the order of a saved buffer, or of one that is not saved, or of a list in the source."""

    order: Tensor

    def __init__(self, seed: int, persistent: bool = True, literal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)
        order = torch.randperm(16)
        self.literal = order.tolist() if literal else None
        self.register_buffer("order", order, persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()[:, self.order if self.literal is None else self.literal])


X = torch.linspace(-1, 1, 18).reshape(3, 6)


def groups_of(model: nn.Module) -> torchshear.dependency.ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (X,)))


def saved(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def by_hand(model: Permuted, kept: Tensor) -> Tensor:
    """What a network with these channels of the first layer gives, in plain torch."""
    columns = torch.isin(model.order, kept)
    hidden = (X @ model.one.weight.T + model.one.bias).relu()[:, model.order][:, columns]
    return hidden @ model.two.weight[:, columns].T + model.two.bias


@pytest.fixture
def trained() -> Permuted:
    return Permuted(1).eval()


def test_a_checkpoint_with_another_order_is_refused(trained: Permuted, tmp_path: Path) -> None:
    with parameters_on_meta():
        other = Permuted(2).eval()
    plan = torchshear.plan(groups_of(other), "random")
    plan.save(tmp_path / "plan.json")
    source = saved(trained, tmp_path / "src")
    for given in (plan, tmp_path / "plan.json"):
        with pytest.raises(CheckpointError, match="'order' holds other values .*src"):
            torchshear.shrink_checkpoint(given, source, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_checkpoint_without_the_order_is_refused(trained: Permuted, tmp_path: Path) -> None:
    plan = torchshear.plan(groups_of(trained))
    (tmp_path / "src").mkdir()
    state = {name: tensor for name, tensor in trained.state_dict().items() if name != "order"}
    save_file(state, tmp_path / "src" / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'order', which .*Permuted saves"):
        torchshear.shrink_checkpoint(plan, tmp_path / "src", tmp_path / "small")


def test_weights_with_another_order_are_not_scored(trained: Permuted, tmp_path: Path) -> None:
    with parameters_on_meta():
        other = Permuted(2).eval()
    groups = groups_of(other)
    for source in (saved(trained, tmp_path / "src"), trained.state_dict()):
        with pytest.raises(WeightError, match="'order' holds other values"):
            torchshear.plan(groups, "l1", weights=source)
    parameters = dict(trained.named_parameters())
    assert torchshear.plan(groups, "l1", weights=parameters).n_cut == 8


def test_a_model_on_meta_with_the_order_of_the_checkpoint_is_cut_right(trained: Permuted, tmp_path: Path) -> None:
    source = saved(trained, tmp_path / "src")
    with parameters_on_meta():
        meta = Permuted(2).eval()
    meta.load_state_dict({"order": trained.order.int()}, strict=False)
    plan = torchshear.plan(groups_of(meta), "l1", weights=source)
    torchshear.shrink_checkpoint(plan, source, tmp_path / "small")
    small = torchshear.shrink(meta, plan)
    torchshear.load_checkpoint(small, tmp_path / "small")
    kept = torch.from_numpy(plan.kept["one.weight[0]"])
    torch.testing.assert_close(small(X), by_hand(trained, kept))
    rank = {int(channel): new for new, channel in enumerate(kept)}
    written = load_file(tmp_path / "small" / "model.safetensors")["order"].tolist()
    assert written == [rank[channel] for channel in trained.order.tolist() if channel in rank]


@pytest.mark.parametrize("kind", ["saved", "not saved", "literal"])
def test_a_model_with_another_order_is_refused(kind: str, tmp_path: Path) -> None:
    options = {"persistent": kind != "not saved", "literal": kind == "literal"}
    torchshear.plan(groups_of(Permuted(1, **options))).save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="holds other values in this Permuted"):
        torchshear.shrink(Permuted(2, **options), plan)
    assert torchshear.shrink(Permuted(1, **options), plan)(X).shape == (3, 4)


def test_an_order_that_changes_after_planning_is_seen(trained: Permuted) -> None:
    plan = torchshear.plan(groups_of(trained))
    trained.order.copy_(trained.order.flip(0))
    with pytest.raises(PlanError, match="'order' holds other values in this Permuted"):
        torchshear.shrink(trained, plan)


def test_without_values_there_is_no_order_to_compare(trained: Permuted) -> None:
    plan = torchshear.plan(groups_of(trained))
    with torch.device("meta"):
        empty = Permuted(1)
    empty.order = torch.empty(16, dtype=torch.long, device="meta")
    with pytest.raises(PlanError, match="'order' is on the meta device"):
        torchshear.shrink(empty, plan)


def test_plans_for_other_orders_are_other_plans() -> None:
    plans = [torchshear.pruners.plan_from_kept(groups_of(Permuted(seed)), {}) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
