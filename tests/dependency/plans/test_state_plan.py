"""What a plan says of single tensors: enough to cut them without the network, from a file as well."""

from pathlib import Path

import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Grouped, Tied, image, randomise
from torchshear import PruningPlan
from torchshear.pruners import plan_from_kept
from torchshear.speedup.rewriting._slicing import slice_tensor


class Shuffled(nn.Module):
    """Channels picked by a saved buffer of positions, and scaled by one that is not saved."""

    order: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor([7, 1, -3, 0, 3, 6, 2, 4]))
        self.register_buffer("scale", torch.rand(8) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two((self.one(x) * self.scale)[:, self.order])  # takes negative positions, too


def reloaded(plan: PruningPlan, tmp_path: Path) -> PruningPlan:
    plan.save(tmp_path / "plan.json")
    return PruningPlan.load(tmp_path / "plan.json")


def test_what_a_state_dict_leaves_out_is_marked(tmp_path: Path) -> None:
    groups = torchshear.analyze(torchshear.trace(Shuffled(), (torch.randn(2, 4),)))
    plan = reloaded(plan_from_kept(groups, {groups[0].name: [0, 3, 7]}), tmp_path)
    assert {name: entry.is_saved for name, entry in plan.state.items()} == {
        "one.weight": True,
        "one.bias": True,
        "two.weight": True,
        "order": True,
        "scale": False,
    }
    assert plan.whole == {"two.bias": (3,)}


def test_tensors_are_cut_as_the_model_is(tmp_path: Path) -> None:
    cases = [(Shuffled(), torch.randn(2, 4)), (Grouped(), image()), (Tied(), torch.zeros(2, 3, dtype=torch.long))]
    for model, example in cases:
        randomise(model).eval()
        plan = reloaded(torchshear.plan(torchshear.analyze(torchshear.trace(model, (example,)))), tmp_path)
        small = torchshear.shrink(model, plan)
        of_small = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        of_model = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert plan.state
        for name, entry in plan.state.items():
            assert torch.equal(slice_tensor(of_model[name].detach(), entry), of_small[name])
            assert of_small[name].shape == entry.new_shape
        for name, shape in plan.whole.items():
            assert of_small[name].shape == shape
            assert torch.equal(of_model[name], of_small[name])


def test_positions_are_counted_anew() -> None:
    model = Shuffled()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 4),)))
    plan = plan_from_kept(groups, {groups[0].name: [0, 3, 7]})
    kept = plan.state["one.weight"].kept[0].tolist()
    order = slice_tensor(model.order, plan.state["order"])
    assert [kept[i] for i in order.tolist()] == [i % 8 for i in model.order.tolist() if i % 8 in kept]
