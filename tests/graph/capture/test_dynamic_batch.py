"""The batch: which numbers of a captured graph follow it, as captures at two batches say."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Between
from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._graph import AffineSize, affine_size, shape_with_batch
from torchshear.graph._run import graph_output
from torchshear.graph.capture import _dynamic_batch
from torchshear.speedup import shrink_to_form


def outputs(graph: Graph, *args: Tensor) -> Tensor:
    state = {name: entry.tensor for name, entry in graph.state.items()}
    with torch.no_grad():
        output: Tensor = graph_output(graph.fx_graph, state, list(args))[0]
    return output


def assert_free(model: nn.Module, *args: Tensor) -> Graph:
    """See that the graph takes other batches and is the model there."""
    graph = torchshear.trace(model.eval(), args)
    assert graph.batch_hint is not None
    for batch in (1, 2, 3, 7, 59, 118):
        inputs = ExampleInputs.of(args).with_batch(batch).args
        with torch.no_grad():
            torch.testing.assert_close(outputs(graph, *inputs), model(*inputs))
    return graph


def sizes_of(graph: Graph, operator: str) -> tuple[int | None, ...]:
    """Sizes of what the last call of an operator gives, None where they follow the batch."""
    return shape_with_batch(graph, [node for node in graph if str(node.target).startswith(f"aten.{operator}")][-1])


class Attention(nn.Module):
    """Attention over tokens, of which those called `pad_id` are masked."""

    pad_id = 118

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(200, width), nn.Linear(width, 5)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        batch, n, width = h.shape
        q, k, v = (layer(h).view(batch, n, 4, width // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)).masked_fill((tokens == self.pad_id)[:, None, None], -1e9)
        y: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def test_a_token_that_the_probed_batch_divides_stays_a_token() -> None:
    model, tokens = Attention().eval(), torch.randint(0, 100, (2, 12))
    tokens[:, 8:] = 118
    graph = assert_free(model, tokens)
    assert [node.args[1] for node in graph if str(node.target).startswith("aten.eq")] == [118]
    result = torchshear.prune(model, (tokens.clamp(max=99),), ratio=0.5)
    masked = copy.deepcopy(model)
    for name, keep in result.plan.masks().items():
        masked.get_parameter(name).data[~keep] = 0
    traced = shrink_to_form(model, result.plan, form="traced").model
    torch.testing.assert_close(traced(tokens), masked(tokens))


class Chunk(nn.Module):
    """A running sum over a chunk of 64 rows, position by position, of which index 59 is one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.pad(self.one(x), (0, 0, 0, 64 - x.shape[1]))
        rows = [h[:, 0]]
        for i in range(1, 64):
            rows.append(h[:, i] + 0.5 * rows[-1])
        y: Tensor = self.two(torch.stack(rows, 1)[:, : x.shape[1]])
        return y


def test_an_index_that_the_probed_batch_divides_stays_an_index() -> None:
    graph = assert_free(Chunk(), torch.randn(2, 12, 8))
    picked = [node.args[2] for node in graph if str(node.target) == "aten.select.int"]
    assert picked == list(range(64))


def wrapped(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A layer on both sides of a function of the values between them."""
    return Between(function, nn.Linear(6, 8), nn.Linear(8, 3))


def window(h: Tensor) -> Tensor:
    batch, tokens, width = h.shape
    inside = h.view(batch, tokens // 4, 4, width).reshape(batch * (tokens // 4), 4, width)
    return inside.softmax(1).view(batch, tokens, width)


def heads(h: Tensor) -> Tensor:
    batch, tokens, width = h.shape
    q = h.view(batch, tokens, 2, width // 2).transpose(1, 2).reshape(batch * 2, tokens, width // 2)
    y = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    return y.view(batch, 2, tokens, width // 2).transpose(1, 2).reshape(batch, tokens, width)


@pytest.mark.parametrize(
    "function",
    [
        window,
        heads,
        lambda h: h + torch.arange(118, dtype=h.dtype)[::59].sum(),
        lambda h: h.new_full((h.shape[0], 1, 1), 59.0) + h,
        lambda h: (h.flatten(1).mean(1) + torch.arange(h.shape[0] + 1)[1:] + 118)[:, None, None] * h,
        lambda h: h + torch.cat([h.new_ones(3, 8, 8), h])[3 : h.shape[0] + 3],
        lambda h: h + torch.cat([h, h[: h.shape[0] - 1]])[-h.shape[0] :].mean() * 0,
        lambda h: h @ (h.flatten(1) @ h.flatten(1).t()).flatten().mean().expand(8, 8),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_numbers_follow_the_batch_only_where_both_captures_say_so(
    function: Callable[[Tensor], Tensor], batch: int
) -> None:
    assert_free(wrapped(function), torch.randn(batch, 8, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * float(h.shape[0]),
        lambda h: h[: (h.shape[0] + 1) // 2],
        lambda h: h * torch.tensor(float(h.shape[0])),
        lambda h: h * h.shape[0] ** 2,
        lambda h: h.sum(0, keepdim=True) if h.shape[0] > 10 else h,
        lambda h: h * 2 if h.shape[0] % 2 else h,
        lambda h: h * 2 if h.shape[0] == 1 else h,
        lambda h: h * (2 if h.shape[0] < 59 else 3),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_what_follows_the_batch_in_another_way_fixes_it(function: Callable[[Tensor], Tensor], batch: int) -> None:
    model, x = wrapped(function).eval(), torch.randn(batch, 8, 6)
    graph = torchshear.trace(model, (x,))
    if graph.batch_hint is not None:  # the example's own batch is odd and more than one, and nobody ran a batch of one
        assert function(torch.ones(1, 8, 6)).shape[0] == 1
        assert batch == 3
    torch.testing.assert_close(outputs(graph, x), model(x).detach())


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * float(h.shape[0]),
        lambda h: h[: (h.shape[0] + 1) // 2],
        lambda h: h * torch.tensor(float(h.shape[0])),
        lambda h: h * h.shape[0] ** 2,
        lambda h: h.sum(0, keepdim=True) if h.shape[0] > 10 else h,
        lambda h: h.squeeze(0) if h.shape[0] < 10 else h,
        lambda h: h.relu() if h.shape[0] < 10 else h.tanh(),
        lambda h: h[None] if h.shape[0] < 10 else h,
    ],
)
def test_the_captures_alone_say_what_follows_the_batch(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.setattr("torchshear.graph.capture._trace.agrees_with_model", lambda graph, model: True)
    assert torchshear.trace(wrapped(function), (torch.randn(2, 8, 6),)).batch_hint is None


def test_a_dimension_that_the_probed_batch_divides_is_not_free() -> None:
    model = wrapped(lambda h: h.repeat(1, 118 // h.shape[1] + 1, 1)[:, :118])
    graph = assert_free(model, torch.randn(2, 6, 6))
    assert sizes_of(graph, "slice") == (None, 118, 8)
    assert sizes_of(graph, "linear") == (None, 118, 3)


@pytest.mark.parametrize("hint", [59, 61])
def test_sizes_are_told_apart_even_where_no_prime_is_left(monkeypatch: pytest.MonkeyPatch, hint: int) -> None:
    monkeypatch.setattr(_dynamic_batch, "_PRIMES", (hint,))
    model = wrapped(lambda h: h.repeat(1, 2 * hint // h.shape[1] + 1, 1)[:, : 2 * hint])
    graph = assert_free(model, torch.randn(2, 6, 6))
    assert graph.batch_hint == hint
    assert sizes_of(graph, "linear") == (None, 2 * hint, 3)


def test_rows_that_join_the_batch_are_told() -> None:
    model = wrapped(lambda h: torch.cat([h.new_ones(3, 8), h]).view(h.shape[0] + 3, 8)[3:])
    graph = assert_free(model, torch.randn(4, 6))
    view = next(node for node in graph if str(node.target) == "aten.view.default")
    assert graph.is_dynamic(view, 0)
    assert str(graph.batch_formula(view, 0)) == "batch+3"
    assert not graph.is_dynamic(view, 1)
    values = torchshear.analyze(graph).describe()
    assert next(value for value in values if value.name == view.name).tensors[0][0].size == "batch+3"


def test_learned_rows_that_join_the_batch_stay_where_a_size_counts_them() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.one, self.two = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.rows, x])
            y: Tensor = self.two(self.one(h).view(x.shape[0] + 5, 8)).mean(0, keepdim=True) + x[:, :3]
            return y

    model, x = Joined().eval(), torch.randn(4, 6)
    graph = assert_free(model, x)
    assert [group.name for group in torchshear.analyze(graph)] == ["one.weight[0]"]
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert shrink_to_form(model, result.plan, form="traced").model(torch.randn(7, 6)).shape == (7, 3)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (59, 2, AffineSize(1, 0)),
        (118, 4, AffineSize(2, 0)),
        (-59, -2, AffineSize(-1, 0)),
        (60, 3, AffineSize(1, 1)),
        (58, 1, AffineSize(1, -1)),
        (124, 10, AffineSize(2, 6)),
        (118, 118, None),  # a constant
        (59**2, 2**2, None),
        (59**3, 2**3, None),
        (59 * 58 // 2, 1, None),
        (29, 1, None),
        (30, 1, None),
    ],
)
def test_numbers_that_lie_on_a_line_of_whole_numbers(first: int, second: int, expected: AffineSize | None) -> None:
    found = affine_size((first, second), (59, 2))
    assert found == expected
    if found is not None:
        assert (found.at(59), found.at(2)) == (first, second)


def test_arguments_are_merged_with_sizes_in_place_of_numbers_that_differ() -> None:
    one = (59, [118, 3], {"end": slice(0, 60)}, math.nan, None)
    two = (2, [4, 3], {"end": slice(0, 3)}, math.nan, None)
    merged = _dynamic_batch._merge_arguments(one, two, (59, 2), {})
    expected = (AffineSize(1, 0), [AffineSize(2, 0), 3], {"end": slice(0, AffineSize(1, 1))})
    assert merged[:3] == expected
    assert math.isnan(merged[3])
    assert merged[4] is None


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((59, [2, 3]), (2, [2, 3, 4])),
        ((59, [2, 3]), (2, [2])),
        ((59, [2, 3]), (2, (2, 3))),
        ({"a": 59}, {"b": 2}),
        ((1,), (True,)),
        ((1,), (1.0,)),
        ((0.5,), (0.25,)),
        ((59 * 59,), (4,)),
        ((None,), (3,)),
    ],
)
def test_arguments_that_differ_in_more_than_sizes_are_of_another_network(one: object, two: object) -> None:
    with pytest.raises(_dynamic_batch._OtherNetworkError):
        _dynamic_batch._merge_arguments(one, two, (59, 2), {})
