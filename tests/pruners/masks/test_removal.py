"""Units that masks have ended are removed, and the shrunk model computes what the masked one did; no others are."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import (
    Attention,
    Between,
    FeedForward,
    Grouped,
    Net,
    Residual,
    Separate,
    Tied,
    TwoReaders,
    analyzed,
    image,
    randomise,
    zero,
)
from tests.oracle import assert_outputs_equal, fresh_inputs
from tests.strategies import RandomNetwork, example_input, random_description
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners import masks as m
from torchshear.pruners.masks._removal import _keeps_outputs, _State

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def ready(net: nn.Module) -> nn.Module:
    return randomise(net.double().eval())


def removed(net: nn.Module, x: Tensor, masks: m.Masks) -> tuple[dict[str, int], nn.Module]:
    """Lay masks on, remove what has ended, compare; gives how many units went of each group."""
    dense = copy.deepcopy(net)
    m.apply(net, masks)
    inputs = [x, fresh_inputs(x, 11)]
    expected = [net(one) for one in inputs]
    m.make_permanent(net)
    plan = m.plan_from_masks(analyzed(net, x))
    assert plan == m.plan_from_masks(analyzed(dense, x), masks), "the same, whether masks are permanent yet or not"
    small = torchshear.shrink(net, plan)
    with torch.no_grad():
        for one, output in zip(inputs, expected, strict=True):
            assert_outputs_equal(small(one), output.detach(), 1e-9)
    return {group.name: group.width - len(group.kept) for group in plan.groups}, small


def ended(net: nn.Module, x: Tensor) -> torchshear.PruningPlan:
    """The plan of what has ended in a network, which shrunk computes the same."""
    plan = m.plan_from_masks(analyzed(net, x))
    assert_outputs_equal(torchshear.shrink(net, plan)(x), net(x), 1e-9)
    return plan


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str, dict[str, int]]] = {
    "residual_columns": (Residual, image().double(), "channelx1", {"stem.weight[0]": 3, "one.weight[0]": 8}),
    "residual_rows": (Residual, image().double(), "1xchannel", {"stem.weight[0]": 0, "one.weight[0]": 8}),
    "grouped_columns": (Grouped, image().double(), "channelx1", {"one.weight[0]": 3, "two.weight[0]": 3}),
    "grouped_rows": (Grouped, image().double(), "1xchannel", {"one.weight[0]": 3, "two.weight[0]": 3}),
    "feed_forward_columns": (FeedForward, TOKENS, "channelx1", {"up.weight[0]": 12}),
    "feed_forward_rows": (FeedForward, TOKENS, "1xchannel", {"up.weight[0]": 12}),
    "gated_columns": (lambda: FeedForward(True), TOKENS, "channelx1", {"up.weight[0]": 12}),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_shrunk(name: str) -> None:
    make, x, pattern, expected = CASES[name]
    net = randomise(make().double().eval(), seed=1)  # with which masks of all rows of a channel meet in every case
    found, small = removed(net, x, m.choose_masks(net, pattern, 0.5))
    assert {group: count for group, count in found.items() if group in expected} == expected
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "make", [lambda: Attention(16, 4), Separate, lambda: Separate(4, 2)], ids=["fused", "separate", "shared"]
)
def test_heads(make: Callable[[], nn.Module]) -> None:
    net = ready(make())
    masks = m.choose_masks(net, "heads", 0.5, groups=analyzed(net, TOKENS))
    found, small = removed(net, TOKENS, masks)
    (report,) = masks.layers
    assert found[report.name] == report.n_masked == report.n_units // 2
    proj = "proj" if isinstance(net, Attention) else "out"
    assert small.get_submodule(proj).weight.shape[1] == net.get_submodule(proj).weight.shape[1] // 2


def test_the_width_of_a_head_stays_where_queries_and_keys_read_it() -> None:
    net = ready(Attention(16, 4))
    zero(net.proj.weight.view(16, 4, 4)[:, :, 1])
    found = m.plan_from_masks(analyzed(net, TOKENS))
    assert found.n_cut == 0


@pytest.mark.parametrize("is_alive", [True, False])
@pytest.mark.parametrize("other", ["sum", "largest", "product"])
def test_units_that_something_else_reads_stay(other: str, is_alive: bool) -> None:
    net = ready(TwoReaders(other))
    with torch.no_grad():
        net.down.weight[:, :6] = 0
        if not is_alive:
            net.up.bias[:6] = -1e6  # no example shows these units, yet other inputs would
    assert m.plan_from_masks(analyzed(net, torch.randn(3, 6).double())).n_cut == 0


@pytest.mark.parametrize("is_alive", [True, False])
def test_units_that_a_buffer_reads_stay(is_alive: bool) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        hidden = torch.relu(m.up(x))
        return m.down(hidden) + torch.nn.functional.linear(hidden, m.fixed)

    net = ready(Net(run, up=nn.Linear(6, 12), down=nn.Linear(12, 5), fixed=torch.ones(5, 12)))
    with torch.no_grad():
        net.down.weight[:, :6] = 0
        if not is_alive:
            net.up.bias[:6] = -1e6
    x = torch.randn(3, 6).double()
    assert m.plan_from_masks(analyzed(net, x)).n_cut == 0
    net.fixed[:, :6] = 0
    assert ended(net, x).n_cut == 6


def test_the_trial_finds_readers_of_units_that_are_silent_on_every_example() -> None:
    net = ready(TwoReaders("sum"))
    net.down.weight.data[:, :6] = 0
    net.up.bias.data[:6] = -1e6
    groups = analyzed(net, torch.randn(3, 6).double())
    state = _State.of(groups, {name: entry.tensor.detach() for name, entry in groups.graph.state.items()})
    goes = {"up.weight[0]": np.arange(12) < 6}
    assert not _keeps_outputs(groups, state, goes, goes)
    assert _keeps_outputs(groups, state, goes, {"up.weight[0]": np.zeros(12, bool)}), "no claim that nobody reads them"


def test_a_group_that_fails_does_not_hold_back_others() -> None:
    net = ready(nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)))
    x = torch.randn(3, 6).double()
    zero(net[0].weight[4:], net[0].bias[4:], net[4].weight[:, 3:])
    plan = ended(net, x)
    assert {group.name: len(group.kept) for group in plan.groups} == {"0.weight[0]": 8, "2.weight[0]": 3}
    assert plan.groups[0].note == "stays whole: its masked units still change the outputs"


@pytest.mark.parametrize(
    ("activation", "n_cut"), [(nn.GELU(), 4), (nn.ReLU(), 4), (nn.Sigmoid(), 0), (nn.Softplus(), 0)]
)
def test_rows_of_zeros_go_only_if_they_stay_zero(activation: nn.Module, n_cut: int) -> None:
    net = ready(nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)))
    zero(net[0].weight[4:], net[0].bias[4:])
    assert m.plan_from_masks(analyzed(net, torch.randn(3, 6).double())).n_cut == n_cut


@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_of_zeros_before_a_norm(has_bias: bool) -> None:
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 1, bias=has_bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        net[0].weight[4:] = 0
        if has_bias:
            net[0].bias[4:] = 0
    x = image().double()
    assert m.plan_from_masks(analyzed(net, x)).n_cut == 0, "the norm shifts zeros"
    zero(net[1].weight[4:])
    assert m.plan_from_masks(analyzed(net, x)).n_cut == 0
    zero(net[1].bias[4:])
    plan = ended(net, x)
    assert plan.kept["0.weight[0]"].tolist() == [0, 1, 2, 3]
    plain = ready(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1)))
    plain[0].weight.data[4:] = 0
    plain[0].bias.data[4:] = 0
    assert m.plan_from_masks(analyzed(plain, x)).n_cut == 0, "the norm takes its mean from zeros"


def test_a_stream_with_a_norm_stays_whole() -> None:
    net = ready(nn.Sequential(nn.Linear(6, 16), FeedForward(), nn.Linear(16, 3)))
    zero(net[1].up.weight[:, :8], net[2].weight[:, :8])
    plan = m.plan_from_masks(analyzed(net, torch.randn(2, 4, 6).double()))
    assert plan.n_cut == 0
    assert plan.groups[0].note == "stays whole: a norm, softmax or mean runs over it"


def test_one_unit_is_left_of_a_group_that_ended_whole() -> None:
    net = ready(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    nn.init.zeros_(net[2].weight)
    x = torch.randn(3, 6).double()
    plan = ended(net, x)
    assert plan.kept["0.weight[0]"].tolist() == [7]
    assert plan.groups[0].note == "1 masked units stay: blocks keep equally many, and a least number stays"


def test_blocks_keep_equally_many() -> None:
    net = ready(Grouped())
    zero(net.two.weight[:4, 0], net.two.weight[:4, 1], net.two.weight[4:8, 1], net.two.weight[8:, 3])
    x = image().double()
    plan = ended(net, x)
    assert plan.kept["one.weight[0]"].tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("masked", "goes", "left"),
    [
        ([0, 1, 2, 5], [0, 5], 2),  # 3 and 1 of two blocks of 4: one of each, the earlier ones
        ([0, 1, 2, 3], [], 4),  # a whole block, and nothing of the other
        ([0, 3, 4, 7], [0, 3, 4, 7], 0),
    ],
)
def test_filter_groups_lose_as_many_as_the_one_that_ended_least(masked: list[int], goes: list[int], left: int) -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    net, x = ready(nn.Sequential(*layers)), image().double()
    net[0].weight.data[masked] = 0
    net[0].bias.data[masked] = 0
    plan = ended(net, x)
    (group,) = [group for group in plan.groups if group.width == 8]
    assert sorted(set(range(8)) - set(group.kept.tolist())) == goes
    assert group.note.startswith(f"{left} masked units stay") is bool(left)


def test_coupled_layers_keep_what_any_of_them_keeps() -> None:
    parts = {"one": nn.Conv2d(3, 4, 1), "two": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1)}
    net, x = ready(Net(lambda m, x: m.head(torch.relu(m.one(x) + m.two(x))), **parts)), image().double()
    with torch.no_grad():
        for layer, kept in ((net.one, [1, 0, 0, 1]), (net.two, [1, 1, 0, 0])):
            layer.weight *= torch.tensor(kept)[:, None, None, None]
            layer.bias *= torch.tensor(kept)
    plan = ended(net, x)
    assert plan.kept["one.weight[0]"].tolist() == [0, 1, 3]


def test_recurrent_units() -> None:
    net = ready(Between(lambda results: results[0], nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)))
    x = torch.randn(2, 4, 5).double()
    zero(net.two.weight[:, 5:])
    assert m.plan_from_masks(analyzed(net, x)).n_cut == 0, "the next step reads them"
    zero(net.one.weight_hh_l0[:, 5:])
    assert ended(net, x).n_cut == 3


def test_tied_weights() -> None:
    net = ready(Tied())
    tokens = torch.arange(11)[None]
    found, _ = removed(net, tokens, m.choose_masks(net, "channelx1", 0.5, layers=["back"]))
    assert found["hidden.weight[0]"] == 16


def test_partial_masks_remove_nothing() -> None:
    net = ready(Residual())
    found, _ = removed(net, image().double(), m.choose_masks(net, "2:4", 0.5))
    assert not any(found.values())


def test_bad_arguments() -> None:
    net = ready(Residual())
    with pytest.raises(ArgumentError, match="groups is Residual; .*torchshear.analyze"):
        m.plan_from_masks(net)
    groups = analyzed(net, image().double())
    with pytest.raises(MaskError, match="'stem.wight' .*: stem.weight"):
        m.plan_from_masks(groups, m.Masks.of({"stem.wight": torch.ones(1).bool()}))
    with pytest.raises(MaskError, match=r"another model: shape \(1,\), not \(8, 3, 3, 3\)"):
        m.plan_from_masks(groups, m.Masks.of({"stem.weight": torch.ones(1).bool()}))
    with pytest.raises(MaskError, match="meta device"):
        m.plan_from_masks(analyzed(Residual().to("meta").eval(), image().to("meta")))


@pytest.mark.parametrize("pattern", ["channelx1", "1xchannel"])
def test_random_networks(pattern: str) -> None:
    n_cut = []
    for seed in range(6):
        description = random_description(100 * len(pattern) + seed)
        net, x = RandomNetwork(description), example_input(description)
        m.apply(net, m.choose_masks(net, pattern, 0.5))
        inputs = [x, fresh_inputs(x, 5), 3 * fresh_inputs(x, 6)]
        with torch.no_grad():
            expected = [net(one) for one in inputs]
            m.make_permanent(net)
            plan = m.plan_from_masks(analyzed(net, x))
            small = torchshear.shrink(net, plan)
            for one, output in zip(inputs, expected, strict=True):
                assert_outputs_equal(small(one), output, 1e-9)
        n_cut.append(plan.n_cut)
    assert sum(n > 0 for n in n_cut) >= 3, n_cut


def test_sums_in_another_order_are_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels choose the order of summation by where tensors lie; here it is turned round from run to run."""
    calls: list[int] = []

    class Turned(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.addmm.default:
                calls.append(1)
                turn = slice(None) if len(calls) % 4 in (1, 2) else torch.arange(args[1].shape[1] - 1, -1, -1)
                args = (args[0], args[1][:, turn].contiguous(), args[2][turn].contiguous())
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    model[2].weight.data[:, :100] = 0
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(16, 64),)))
    with Turned():
        plan = m.plan_from_masks(groups)
    assert calls
    assert len(plan.kept["0.weight[0]"]) == 156
