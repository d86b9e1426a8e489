"""The drawing: nothing overlaps, lines keep clear of cards, levels hold everything once."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchshear
from tests.networks import Attention, Residual, image
from torchshear.dependency.groups._network import Value
from torchshear.inspection._cards import make_levels
from torchshear.inspection._layout import Layout, lay_out

Graph = tuple[list[tuple[float, float]], list[tuple[int, int]], list[str]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Cards of several sizes with edges from earlier to later ones, some of them long."""
    count = draw(st.integers(1, 60))
    sizes = draw(
        st.lists(st.sampled_from([(188.0, 38.0), (188.0, 74.0), (60.0, 56.0)]), min_size=count, max_size=count)
    )
    edges: set[tuple[int, int]] = set()
    for target in range(1, count):
        edges |= {(source, target) for source in draw(st.sets(st.integers(0, target - 1), max_size=4))}
    modules = [f"block{i // draw(st.integers(1, 7))}.conv" for i in range(count)]
    return sizes, sorted(edges), modules


def assert_drawn_well(layout: Layout, sizes: list[tuple[float, float]], edges: list[tuple[int, int]]) -> None:
    __tracebackhide__ = True
    boxes = [  # less what floating point may add
        (x - width / 2 + 1e-6, y, x + width / 2 - 1e-6, y + height)
        for (x, y), (width, height) in zip(layout.places, sizes, strict=True)
    ]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"cards overlap: {a} {b}"
    for left, top, right, bottom in boxes:
        assert min(left, top) >= 0, "a card lies outside"
        assert right <= layout.width, "a card lies outside"
        assert bottom <= layout.height, "a card lies outside"
    assert set(layout.routes) == set(edges)
    for (source, target), route in layout.routes.items():
        assert route[0] == (layout.places[source][0], boxes[source][3])
        assert route[-1] == layout.places[target]
        for (x1, y1), (x2, y2) in pairwise(route):
            assert x1 == x2 or y1 == y2, f"a slanted line in {route}"
            for left, top, right, bottom in boxes:
                crossed = max(x1, x2) > left and min(x1, x2) < right and max(y1, y2) > top and min(y1, y2) < bottom
                assert not crossed, f"{source} -> {target} crosses a card"


@given(graphs())
def test_cards_and_lines_keep_clear_of_each_other(graph: Graph) -> None:
    sizes, edges, modules = graph
    assert_drawn_well(lay_out(sizes, edges, modules), sizes, edges)


def test_a_long_chain_fills_a_screen() -> None:
    sizes = [(188.0, 38.0)] * 700
    edges = [(i, i + 1) for i in range(699)] + [(i, i + 9) for i in range(0, 690, 10)]
    layout = lay_out(sizes, edges, [f"layers.{i // 20}.part{i}" for i in range(700)])
    assert 0.5 < layout.width / layout.height < 2
    assert_drawn_well(layout, sizes, edges)


def test_columns_begin_with_modules() -> None:
    layout = lay_out([(188.0, 38.0)] * 200, [(i, i + 1) for i in range(199)], [f"layers.{i // 4}" for i in range(200)])
    top = min(y for _, y in layout.places)
    starts = [i for i, (_, y) in enumerate(layout.places) if y == top]
    assert len(starts) > 2
    assert all(start % 4 == 0 for start in starts)


def test_an_empty_network_has_a_layout() -> None:
    assert lay_out([], [], []).places == ()


def values_of(model: torch.nn.Module, *args: torch.Tensor) -> tuple[Value, ...]:
    return torchshear.analyze(torchshear.trace(model, args)).describe()


@pytest.mark.parametrize(("model", "x"), [(Residual(), image()), (Attention(), torch.randn(2, 5, 24))])
def test_levels_hold_each_operator_and_tensor_once(model: torch.nn.Module, x: torch.Tensor) -> None:
    values = values_of(model, x)
    shown = {i for i, value in enumerate(values) if value.tensors or value.kind == "output"}
    levels = make_levels(values)
    full = [number for card in levels[-1].cards for number in (*card.nodes, *card.chips)]
    assert sorted(full) == sorted(shown)
    for level in levels:
        drawn = [number for card in level.cards for number in card.nodes]
        assert len(drawn) == len(set(drawn))
        assert all(source < target for source, target in level.edges)


def test_counters_of_batch_norms_are_not_drawn() -> None:
    class Counting(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out + self.extra(out) if self.training else out

        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(5, 5)

    values = torchshear.analyze(torchshear.trace(Counting(), (image(),))).describe("train")
    assert any(value.state == "norm.num_batches_tracked" for value in values)
    full = make_levels(values)[-1]
    drawn = {number for card in full.cards for number in (*card.nodes, *card.chips)}
    assert {values[n].state for n in drawn} >= {"extra.weight", "norm.running_var"}
    assert not any("num_batches" in value.state for value in (values[n] for n in drawn))
    assert sum(card.title.startswith("add") for card in full.cards) == 2


def test_modules_are_cards_of_their_own() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(*(Residual() for _ in range(1)))
            self.twice = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks(x)
            return self.twice(torch.tanh(self.twice(x)))

    coarse, *_, full = make_levels(values_of(Net(), image()))
    assert [card.title for card in coarse.cards] == ["x", "blocks", "twice", "tanh", "twice", "output"]
    assert set(coarse.edges) == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 4)}
    assert coarse.shared == {(2, 4)}  # the weights, which are drawn where they are read first
    assert len(full.shared) == 2
