"""What products say of the dimensions of weights that they read directly or with dimensions moved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net

EXPERTS, READ, MADE = 3, 4, 5


class Product(nn.Module):
    """A weight between two linear layers."""

    def __init__(self, shape: tuple[int, ...], run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, READ), nn.Linear(MADE, 2)
        self.weight, self.run = nn.Parameter(torch.randn(shape)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.stem(x), self.weight))


def all_experts(x: Tensor) -> Tensor:
    return x.expand(EXPERTS, *x.shape)


def picked(x: Tensor, w: Tensor) -> Tensor:
    return w[x.argmax(1) % EXPERTS]


# Shape of the weight, the call, and the dimension that it sums over and the one that its result keeps.
PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "linear": ((MADE, READ), functional.linear, 1, 0),
    "matmul": ((READ, MADE), lambda x, w: x @ w, 0, 1),
    "transposed": ((MADE, READ), lambda x, w: x @ w.T, 1, 0),
    "one of several": ((EXPERTS, MADE, READ), lambda x, w: functional.linear(x, w[1]), 2, 1),
    "bmm": ((EXPERTS, READ, MADE), lambda x, w: torch.bmm(all_experts(x), w).sum(0), 1, 2),
    "bmm, transposed": ((EXPERTS, MADE, READ), lambda x, w: (all_experts(x) @ w.transpose(1, 2)).sum(0), 2, 1),
    "picked": ((EXPERTS, READ, MADE), lambda x, w: torch.bmm(x[:, None], picked(x, w))[:, 0], 1, 2),
    "picked, on the left": ((EXPERTS, MADE, READ), lambda x, w: torch.bmm(picked(x, w), x[..., None])[..., 0], 2, 1),
    "baddbmm": ((EXPERTS, READ, MADE), lambda x, w: torch.baddbmm(w[:, :1], all_experts(x), w).sum(0), 1, 2),
    "einsum": ((EXPERTS, READ, MADE), lambda x, w: torch.einsum("ebd,edf->ebf", all_experts(x), w).sum(0), 1, 2),
    "einsum of three": (
        (EXPERTS, READ, MADE),
        lambda x, w: torch.einsum("bed,edf,be->bf", x[:, None].expand(-1, EXPERTS, -1), w, x[:, :EXPERTS]),
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_tell_what_a_weight_reads_and_makes(name: str) -> None:
    shape, run, read, made = PRODUCTS[name]
    groups = torchshear.analyze(torchshear.trace(Product(shape, run), (torch.randn(7, 6),)))
    assert groups.facts.purposes["weight", read] == {"in"}
    assert groups.facts.purposes["weight", made] == {"out"}
    assert groups.facts.purposes.get(("weight", 3 - read - made), set()) == set()


@pytest.mark.parametrize("equation", ["bd,d->bd", "bd,ed->bed", "bd,d->b"])
def test_a_scale_or_a_sum_is_no_layer(equation: str) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"d": (READ,), "ed": (EXPERTS, READ)}[equation.split(",")[1].split("->")[0]]
            self.stem, self.weight = nn.Linear(6, READ), nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, self.stem(x), self.weight)

    groups = torchshear.analyze(torchshear.trace(Scale(), (torch.randn(7, 6),)))
    assert not any(name == "weight" for name, _ in groups.facts.purposes)


def named_norm() -> Net:
    """A batch norm under the name of its operator, which its parameters carry too."""
    return Net(
        lambda m, x: m.two(m.batch_norm(m.one(x)).relu()),
        one=nn.Conv2d(3, 8, 1, bias=False),
        batch_norm=nn.BatchNorm2d(8),
        two=nn.Conv2d(8, 2, 1),
    )


def test_a_norm_may_be_called_as_its_operator_is() -> None:
    groups = torchshear.analyze(torchshear.trace(named_norm().eval(), (torch.randn(2, 3, 4, 4),)))
    (group,) = groups.prunable
    assert {member.name: member.norm_scale for member in group.members if member.norm_scale} == {
        "one.weight": "batch_norm.weight"
    }
