"""Integers that forward does not read follow what they are the size of, where their origin is certain."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class C2f(nn.Module):
    """As in ultralytics, whose export takes the other forward."""

    def __init__(self, inside: int = 3, outside: int = 5, c: int = 16) -> None:
        super().__init__()
        self.c = c
        self.enter, self.leave = nn.Conv2d(inside, 2 * c, 1), nn.Conv2d(2 * c, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._end(*self.enter(x).chunk(2, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        return self._end(*self.enter(x).split((self.c, self.c), 1))

    def _end(self, a: Tensor, b: Tensor) -> Tensor:
        return self.leave(torch.cat([b, a.relu()], 1))


class Stage(nn.Module):
    """Keeps its width, and other numbers that are widths of others by chance."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.width, self.depth, self.groups, self.level = outside, 16, outside // 4, outside
        self.conv = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() if self.level else x

    def new_conv(self) -> nn.Conv2d:
        return nn.Conv2d(self.width, self.width, 1)


def test_another_forward_that_gives_the_same_is_kept() -> None:
    model = randomise(C2f().eval(), 3)
    result = torchshear.prune(model, (IMAGE,))
    assert result.form == "native"
    assert (model.c, result.model.c) == (16, 8)
    torch.testing.assert_close(result.model.forward_split(IMAGE), result.model(IMAGE))


def test_it_is_kept_by_plans_and_by_each_module_for_itself(tmp_path: Path) -> None:
    model = randomise(nn.Sequential(C2f(3, 6, 16), C2f(6, 5, 12)).eval(), 3)
    result = torchshear.prune(model, (IMAGE,), ratio={"0": 0.5, "1": 0.25})
    assert [block.c for block in result.model] == [8, 9]
    result.plan.save(tmp_path / "plan.json")
    again = torchshear.shrink(
        nn.Sequential(C2f(3, 6, 16), C2f(6, 5, 12)).eval(), torchshear.PruningPlan.load(tmp_path / "plan.json")
    )
    assert [block.c for block in again] == [8, 9]


def test_halves_of_different_widths_have_no_one_size() -> None:
    model = randomise(C2f().eval(), 3)
    groups = torchshear.analyze(torchshear.trace(model, (IMAGE,)))
    plan = torchshear.plan(groups, ratio={groups.prunable[0].name: 0.5})
    small = torchshear.shrink(model, plan)
    assert getattr(small, "c", 16) == 16


def test_a_size_of_every_module_of_a_class_is_kept() -> None:
    """What forward reads, what is no size in one of them, and what stays: all stay as they are."""
    model = randomise(nn.Sequential(Stage(3, 16), Stage(16, 24), nn.Conv2d(24, 5, 1)).eval(), 3)
    small = torchshear.prune(model, (IMAGE,)).model
    assert [stage.width for stage in small[:2]] == [8, 12]
    assert [stage.depth for stage in small[:2]] == [16, 16]
    assert [stage.groups for stage in small[:2]] == [4, 6]
    assert [stage.level for stage in small[:2]] == [16, 24]
    assert small[1].new_conv()(small[:2](IMAGE)).shape == (2, 12, 8, 8)


def test_one_number_in_one_module_may_be_chance() -> None:
    model = randomise(nn.Sequential(Stage(3, 16), nn.Conv2d(16, 5, 1)).eval(), 3)
    assert torchshear.prune(model, (IMAGE,)).model[0].width == 16


def test_runs_to_find_them_leave_no_traces() -> None:
    model = randomise(C2f(), 3)
    before = io.BytesIO()
    torch.save(model.state_dict(), before)
    state = torch.random.get_rng_state()
    small = torchshear.prune(model, (IMAGE,)).model
    after = io.BytesIO()
    torch.save(model.state_dict(), after)
    assert before.getvalue() == after.getvalue()
    assert torch.equal(state, torch.random.get_rng_state())
    assert small.training
    assert not small.enter._forward_pre_hooks
