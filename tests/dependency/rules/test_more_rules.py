"""Rules of less usual operators, and of layers that hold an operator of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.dependency.rules.calls import Case, check_rule
from tests.networks import Net, randomise
from tests.oracle import assert_outputs_equal


def _features_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., _index(1, 2)] = 0.5 * x[:, :, 3:5]
    return y


def _index(*positions: int) -> Tensor:
    return torch.tensor(positions)


def _like(x: Tensor, *index: int) -> Tensor:
    """An index along dimension 1 of tokens, the same for every feature."""
    return torch.tensor(index).view(1, -1, 1).expand(x.shape[0], -1, x.shape[2])


def _rope_complex(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(2, (6, 2)).contiguous())
    turn = torch.polar(torch.ones(5, 1, dtype=x.dtype), torch.arange(5, dtype=x.dtype).view(5, 1))
    return torch.view_as_real(pairs * turn).flatten(2)


def _normed(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    deviation, again = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 0.1).sqrt() + (x - again) * deviation


def _sampled(x: Tensor) -> Tensor:
    grid = torch.linspace(-0.9, 0.9, 6, dtype=x.dtype)
    place = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    return functional.grid_sample(x, place.expand(x.shape[0], -1, -1, -1), align_corners=False)


def _unpooled(x: Tensor) -> Tensor:
    values, where = functional.max_pool2d(x, 2, return_indices=True)
    return functional.max_unpool2d(values, where, 2)


def _written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, _index(0, 2)] = x[:, :2]
    y = y.index_add(1, _index(1, 3), x[:, 1:3])
    return y.index_copy(1, _index(4), x[:, :1]).index_fill(1, _index(0), 0.5)


def _scattered(x: Tensor) -> Tensor:
    y = torch.zeros_like(x).scatter(1, _like(x, 1, 0), x[:, :2])
    y = y.scatter_add(1, _like(x, 2, 2), x[:, 2:4])
    return y.scatter_reduce(1, _like(x, 3), x[:, :1], "amax")


T, M = "tokens", "maps"
A = torch.ops.aten
FOLDED = [12, 4, 1]  # strides of twelve features as three times four
CASES = (
    Case("hstack", lambda x: torch.hstack([x, x.relu()]).unflatten(1, (2, -1)).sum(1)),
    Case("reshape_with_strides", lambda x: A._reshape_alias(x, [len(x), 3, 4], FOLDED).sin().flatten(1), 2, sizes=True),
    Case("hstack_vectors", lambda x: x * torch.hstack([x[0], x[0]]).sum()),
    Case("vstack", lambda x: x * torch.vstack([x, x.relu()]).sum(0)),
    Case("vstack_vectors", lambda x: x * torch.vstack([x.sum(0), x.relu().sum(0)]).sum(0)),
    Case("dstack", lambda x: torch.dstack([x, x.relu()]).sum(2)),
    Case("column_stack", lambda x: x * torch.column_stack([x.sum(0), x.relu().sum(0)]).sum(1)),
    Case("concatenate", lambda x: torch.concatenate([x, x], 1).unflatten(1, (2, -1)).sum(1)),
    Case("at_least_three", lambda x: torch.atleast_3d(x).squeeze(2) * torch.atleast_2d(x.sum(0))),
    Case("block_diagonal", lambda x: x + torch.block_diag(x[:1], x[:1]).unflatten(1, (2, -1)).sum((0, 1))),
    Case("tile", lambda x: torch.tile(x, (2,)).unflatten(1, (2, -1)).sum(1)),
    Case("tile_in_front", lambda x: x * torch.tile(x, (2, 1, 1)).sum((0, 1))),
    Case("broadcast_to", lambda x: x * torch.broadcast_to(x[:1] * 1.0, (3, *x.shape)).sum(0)),
    Case("broadcast_width", lambda x: x * torch.broadcast_to(x.sum(1, True), (x.shape[0], 12)), sizes=True),
    Case("tensordot", lambda x: x * torch.tensordot(x, x, ([1], [1])).sum(1, True)),
    Case("inner", lambda x: x * torch.inner(x, x).sum(1, True)),
    Case("outer", lambda x: x * torch.outer(x.sum(0), x.sum(1)).sum(1)),
    Case("addr", lambda x: x * torch.addr(x, x.sum(1), x.sum(0)).relu()),
    Case("kron", lambda x: x * torch.kron(x.sum(0), torch.tensor([1.0, 2.0], dtype=x.dtype)).view(-1, 2).sum(1)),
    Case("addmv", lambda x: x * torch.addmv(x.sum(1), x, x.sum(0)).unsqueeze(1)),
    Case("addbmm", lambda x: x * torch.addbmm(x[0], x @ x.mT, x), kind=T),
    Case("multi_dot", lambda x: torch.linalg.multi_dot([x, x.T, x])),
    Case("bilinear", lambda x: x * functional.bilinear(x, x, torch.ones(1, 12, 12, dtype=x.dtype)), sizes=True),
    Case("cosine_similarity", lambda x: x * functional.cosine_similarity(x, x.relu(), 1).unsqueeze(1)),
    Case("pairwise_distance", lambda x: x * functional.pairwise_distance(x, x.relu()).unsqueeze(1)),
    Case("vecdot", lambda x: x * torch.linalg.vecdot(x, x).unsqueeze(1)),
    Case("cdist", lambda x: torch.cdist(x, x.relu()) @ x, kind=T),
    Case("var_mean", _normed),
    Case("aminmax", lambda x: (x - torch.aminmax(x, dim=1, keepdim=True).min) * 2),
    Case("nansum", lambda x: x * x.nansum(1, True) + x.nanmean(0)),
    Case("linalg_norm", lambda x: x / torch.linalg.norm(x, dim=1, keepdim=True) + torch.linalg.matrix_norm(x)),
    Case("median_of_tokens", lambda x: x * x.median(1, keepdim=True).values, kind=T),
    Case("quantile", lambda x: x * x.quantile(0.3, 1, keepdim=True), kind=T),
    Case("quantiles", lambda x: x * x.quantile(torch.tensor([0.3, 0.9], dtype=x.dtype), 1).sum(0)[:, None], kind=T),
    Case("kth_of_tokens", lambda x: x * x.kthvalue(2, 1, True).values, kind=T),
    Case("kth_of_features", lambda x: x * x.kthvalue(2, 1, True).values, 0),
    Case("renorm", lambda x: x.renorm(2, 0, 0.5)),
    Case("cumprod", lambda x: x.cumprod(1) + x.logcumsumexp(1)),
    Case("cummax", lambda x: x.cummax(1).values),
    Case("cummax_positions", lambda x: x * x.cummax(1).indices, 0),
    Case("sort_tokens", lambda x: x.sort(1).values, kind=T),
    Case("sort_features", lambda x: x.sort(2).values, 0, T),
    Case("topk_tokens", lambda x: x.topk(2, 1).values, kind=T),
    Case("argsort_gather", lambda x: x.gather(1, x.argsort(1)), kind=T),
    Case("diff", lambda x: x.diff(dim=1, prepend=x[:, :1] * 2) + torch.trapezoid(x, dim=1)[:, None], kind=T),
    Case("gather", lambda x: x.gather(1, _like(x, 2, 0, 1)), kind=T),
    Case("gather_first_features", lambda x: x * x.gather(1, _like(x, 2, 0)[:, :, :5]).sum((1, 2), True), 0, T),
    Case("gather_features", lambda x: x * x.gather(2, _like(x, 2, 0)[:, :, :1]).sum(1, True), 0, T),
    Case("take_along", lambda x: x.take_along_dim(_index(2, 0).view(1, 2, 1), 1), kind=T),
    Case("scatter", _scattered, kind=T),
    Case("scatter_features", lambda x: x.scatter(2, _like(x, 2)[:, :, :1], 0.5), 0, T),
    Case("index_writes", _written, kind=T),
    Case("write_features", _features_written, 0, T),
    Case("select_scatter", lambda x: x.select_scatter(x[:, 3] * 2, 1, 5), sizes=True),
    Case("slice_scatter", lambda x: x.slice_scatter(x[:, :4] * 2, 1, 8, 12), sizes=True, shrinks=2),
    Case("one_hot", lambda x: x + functional.one_hot(torch.arange(5) % 2, 12).to(x.dtype), 0, T),
    Case("bucketize", lambda x: x * torch.bucketize(x, torch.tensor([-0.2, 0.3], dtype=x.dtype))),
    Case("diagonal", lambda x: (x @ x.mT).diagonal(dim1=1, dim2=2)[:, :, None] * x, kind=T),
    Case("diag_embed", lambda x: x * torch.diag_embed(x).sum(2)),
    Case("diag_embed_beside", lambda x: x * torch.diag_embed(x, 1).sum(2)[:, 1:], 0),
    Case("rotated", lambda x: x.rot90(1, (2, 3)) * x.rot90(3, (0, 1)).rot90(1, (0, 1)), kind=M),
    Case("flipped_up", lambda x: x.flipud() * x.fliplr()),
    Case("moveaxis", lambda x: x.moveaxis(1, 2).swapdims(1, 2) * x.adjoint().mH, kind=T),
    Case("ravel", lambda x: x * x[0].ravel()),
    Case("hsplit", lambda x: torch.cat(x.hsplit(2)[::-1], 1), 2, sizes=True),
    Case("dsplit", lambda x: torch.cat(x.dsplit(3)[::-1], 2), 3, T, sizes=True),
    Case("complex_rotation", _rope_complex, kind=T, sizes=True),
    Case("fourier_over_tokens", lambda x: torch.fft.fft(x, dim=1).real + torch.fft.fft(x.mT).imag.mT, kind=T),
    Case("fourier_filter", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:]), kind=M),
    Case("fourier_over_features", lambda x: torch.fft.fft(x, dim=1).real, 0),
    Case("grid_sample", _sampled, kind=M),
    Case("max_unpool", _unpooled, kind=M),
    Case("kernel_of_one", lambda x: functional.conv1d(x, torch.ones(5, 5, 1, dtype=x.dtype)), kind=T),
    Case("steps_of_two", lambda x: x * functional.conv1d(x, x.new_ones(5, 5, 1), stride=2).sum(2, True), 0, T),
    Case("kernel_and_edge", lambda x: functional.conv1d(x, x.new_ones(5, 5, 1), padding=1)[..., :12], 0, T),
    Case("inverse", lambda x: x @ torch.linalg.inv(x.mT @ x + torch.eye(12, dtype=x.dtype)), 0, T),
    Case("cross", lambda x: torch.cat([torch.linalg.cross(x[:, :3], x[:, 3:6]), x[:, :9]], 1), 2, sizes=True),
    Case("gumbel_noise", lambda x: x + 0 * torch.empty_like(x).exponential_(), 0),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rule_is_exact(case: Case) -> None:
    check_rule(case)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "embedding_bag": (lambda: nn.EmbeddingBag(20, 12, mode="mean"), lambda m, x: m.layer(x)),
    "embedding_bag_sum": (
        lambda: nn.EmbeddingBag(20, 12, mode="sum"),
        lambda m, x: m.layer(x, per_sample_weights=x.double() / 7),
    ),
    "embedding_bag_max": (lambda: nn.EmbeddingBag(20, 12, mode="max"), lambda m, x: m.layer(x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_embedding_bag(name: str) -> None:
    layer, run = LAYERS[name]
    model = randomise(Net(lambda m, x: m.two(run(m, x)), layer=layer(), two=nn.Linear(12, 3))).double().eval()
    x = torch.arange(15).view(3, 5)
    result = torchshear.prune(model, (x,), ratio=0.5)
    kept = result.plan.kept["layer.weight[1]"]
    assert len(kept) == 6
    model.layer.weight = nn.Parameter(model.layer.weight[:, kept])
    expected = functional.linear(run(model, x), model.two.weight[:, kept], model.two.bias)
    assert_outputs_equal(result.model(x), expected, 1e-12)


def test_bilinear_layer_has_three_groups() -> None:
    parts = {"a": nn.Linear(4, 12), "b": nn.Linear(4, 10), "both": nn.Bilinear(12, 10, 8), "two": nn.Linear(8, 3)}
    model = randomise(Net(lambda m, x: m.two(m.both(m.a(x), m.b(x)).relu()), **parts)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5)
    a, b, out = (result.plan.kept[name] for name in ("a.weight[0]", "b.weight[0]", "both.weight[0]"))
    assert (len(a), len(b), len(out)) == (6, 5, 4)
    left, right = x @ model.a.weight[a].T + model.a.bias[a], x @ model.b.weight[b].T + model.b.bias[b]
    weight = model.both.weight[out][:, a][:, :, b]
    hidden = (torch.einsum("bi,oij,bj->bo", left, weight, right) + model.both.bias[out]).relu()
    expected = hidden @ model.two.weight[:, out].T + model.two.bias
    assert_outputs_equal(result.model(x), expected, 1e-12)
    assert (result.model.both.in1_features, result.model.both.in2_features) == (6, 5)
