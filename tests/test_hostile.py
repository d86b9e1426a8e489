"""Models that look at their batch, at their mode or at numbers that happen to be equal; all must stay correct."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from torchshear.errors import ArgumentError, VerificationError
from torchshear.speedup import TracedModule


class Pair(nn.Module):
    """Two layers with a function between them that sees the module."""

    def __init__(self, between: Callable[["Pair", Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5)
        self.width, self.longest = 8, 8
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self, self.one(x)))


BATCHES = {
    "divided by the batch": lambda m, h: h / int(h.shape[0]),
    "branch on the batch": lambda m, h: 2 * h if h.shape[0] > 1 else h,
    "branch on its parity": lambda m, h: 2 * h if h.shape[0] % 2 else h,
    "loop over samples": lambda m, h: torch.stack([h[i].relu() for i in range(h.shape[0])]),
    "rolled over samples": lambda m, h: h.relu().roll(-1, 0),
    "last sample": lambda m, h: h.relu()[-1:],
    "squeezed": lambda m, h: h.unsqueeze(1).squeeze().relu(),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", BATCHES)
def test_the_batch_in_python(name: str, batch: int) -> None:
    model = randomise(Pair(BATCHES[name])).eval()
    x = torch.randn(batch, 6)
    result = torchshear.prune(model, (x,))
    assert result.report.achieved_ratio == 0.5
    kept = result.plan.kept["one.weight[0]"]
    with torch.no_grad():
        hidden = BATCHES[name](model, x @ model.one.weight[kept].T + model.one.bias[kept])
        expected = hidden @ model.two.weight[:, kept].T + model.two.bias
    torch.testing.assert_close(result.model(x), expected)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(4, 1, 6))
            self.q, self.k, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return self.out(
                torch.tanh(self.q(q + self.position)) * self.k(k).split([3, 5], 2)[1].repeat(1, 1, 2)[:, :, :8]
            )

    x, other = torch.randn(4, 2, 6), torch.randn(4, 2, 6)
    small = torchshear.prune(randomise(Cross()).eval(), (x, x)).model
    assert not torch.allclose(small(x, x), small(x, other))


def test_an_attribute_that_equals_a_width_by_chance_stays() -> None:
    def between(model: Pair, h: Tensor) -> Tensor:
        return h[:, : model.longest].reshape(-1, model.width).reshape(h.shape[0], -1, model.width)

    model = randomise(Pair(between)).eval()
    result = torchshear.prune(model, (torch.randn(2, 3, 6),))
    assert result.form == "native"
    assert (result.model.width, result.model.longest) == (4, 8)
    assert result.model(torch.randn(2, 8, 6)).shape == (2, 8, 5)


def test_the_traced_form_refuses_sizes_that_it_holds_as_constants() -> None:
    model = randomise(Pair(lambda m, h: torch.cat(h.split([5, 3], -1)[::-1], -1) / h.shape[1])).eval()
    small = torchshear.prune(model, (torch.randn(2, 3, 6),)).model
    assert isinstance(small, TracedModule)
    assert small(torch.randn(7, 3, 6)).shape == (7, 3, 5)
    with pytest.raises(ArgumentError, match=r"input 0 .*\(2, 4, 6\); .*\(any, 3, 6\)"):
        small(torch.randn(2, 4, 6))


def test_a_train_method_with_side_effects_is_not_called() -> None:
    class Merging(Pair):
        def train(self, mode: bool = True) -> "Merging":
            self.one.weight.data.mul_(2)
            return super().train(mode)

    model = randomise(Merging(lambda m, h: h.relu()))
    before = model.one.weight.detach().clone()
    torchshear.prune(model, (torch.randn(2, 6),))
    assert torch.equal(model.one.weight, before)


def test_buffers_that_only_training_reads_shrink() -> None:
    def between(model: Pair, h: Tensor) -> Tensor:
        if model.training:
            model.average.mul_(0.9).add_(h.detach().mean(0) * 0.1)
        return h.relu()

    model = Pair(between)
    model.register_buffer("average", torch.zeros(8))
    small = torchshear.prune(randomise(model).eval(), (torch.randn(2, 6),)).model
    assert small.get_buffer("average").shape == (4,)
    assert small.train()(torch.randn(2, 6)).shape == (2, 5)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: torch.where(torch.arange(8) >= 0, h.float(), 0.0).float(),
        lambda m, h: (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype),
        lambda m, h: h / (h.std(-1, keepdim=True) + 1),
        lambda m, h: h.masked_fill(h > 1e6, float("-inf")),
    ],
)
def test_casts_and_extremes_inside_are_no_obstacle(between: Callable[[Pair, Tensor], Tensor]) -> None:
    model = randomise(Pair(between)).eval()
    x = torch.randn(3, 6)
    result = torchshear.prune(model, (x,))
    assert torch.isfinite(result.model(x)).all()


def test_a_forward_with_random_numbers_of_torch_is_proved_on_equal_ones() -> None:
    class Noisy(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1) + torch.rand(5)

    model = randomise(Noisy(lambda m, h: h.softmax(1)))
    assert torchshear.prune(model, (torch.randn(2, 6),)).verification.max_error < 1e-12


def test_a_forward_with_random_numbers_of_python_is_not_proved_by_its_graph() -> None:
    class Noisy(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1) + random.random()

    model = randomise(Noisy(lambda m, h: h.softmax(1)))
    with pytest.raises(VerificationError, match="stateful"):
        torchshear.prune(model, (torch.randn(2, 6),))
