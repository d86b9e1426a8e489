"""Masked forms: what an operator gives on kept positions is what it gives on tensors sliced by hand."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from torchshear.dependency import registered_operators
from torchshear.errors import ArgumentError
from torchshear.graph.masked._call import (
    _FORMS,
    MaskedCall,
    forget_masked_form,
    masked_form,
    masked_operator,
    scatter_into_zeros,
)

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(3)
KEPT = torch.tensor([True, False, True, True, False, True])  # six positions, not their own mirror image
FEW = torch.tensor([False, True, True])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def call_of(operator: Any, *args: Any, masks: Mapping[int, Mapping[int, Tensor]], **kwargs: Any) -> MaskedCall:
    """A call with tensors for operands; `masks` by the place of an operand among all tensors."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def place(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [place(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        nodes.append(graph.placeholder(f"x{len(nodes)}"))
        return nodes[-1]

    node = graph.call_function(operator, tuple(map(place, args)), {name: place(v) for name, v in kwargs.items()})
    known = {nodes[number]: kept for number, kept in masks.items()}
    return MaskedCall(node, args, kwargs, lambda operand: known.get(operand, {}))


def masked(operator: Any, *args: Any, masks: Mapping[int, Mapping[int, Tensor]], **kwargs: Any) -> Any:
    call = call_of(operator, *args, masks=masks, **kwargs)
    form = masked_form(call.node)
    assert form is not None
    return form(call)


def named(value: Any) -> str:
    return str(value) if callable(value) else ""


X = randn(2, 6, 3)
ON_ONE = [  # operator, arguments behind the operand, whether the result has the dimension (1) that is cut
    (aten.mean.dim, ([1],), False),
    (aten.mean.dim, ([1, 2], True), False),
    (aten.mean.default, (), False),
    (aten.sum.dim_IntList, ([1],), False),
    (aten.prod.dim_int, (1,), False),
    (aten.var.correction, ([1],), False),
    (aten.std.correction, ([1],), False),
    (aten.amax.default, ([1],), False),
    (aten.amin.default, ([1],), False),
    (aten.logsumexp.default, ([1],), False),
    (aten.linalg_vector_norm.default, (2, [1]), False),
    (aten.norm.ScalarOpt_dim, (1, [1]), False),
    (aten.nansum.default, ([1],), False),
    (aten.nanmean.default, ([1],), False),
    (aten.quantile.scalar, (0.3, 1), False),
    (aten.count_nonzero.dim_IntList, ([1],), False),
    (aten.all.dim, (1,), False),
    (aten.any.dim, (1,), False),
    (aten.median.default, (), False),
    (aten.max.default, (), False),
    (aten.softmax.int, (1,), True),
    (aten.log_softmax.int, (1,), True),
    (aten.cumsum.default, (1,), True),
    (aten.cumprod.default, (1,), True),
    (aten.logcumsumexp.default, (1,), True),
    (aten.renorm.default, (2, 0, 0.5), True),
]


@pytest.mark.parametrize(
    ("operator", "rest", "has_dim"), ON_ONE, ids=lambda value: str(value) if callable(value) else ""
)
def test_operators_on_one_tensor(operator: Any, rest: tuple[Any, ...], has_dim: bool) -> None:
    found = masked(operator, X, *rest, masks={0: {1: KEPT}})
    found = found[:, KEPT] if has_dim else found
    torch.testing.assert_close(found, operator(X[:, KEPT], *rest), rtol=1e-12, atol=1e-12)


TWO_RESULTS = [
    (aten.var_mean.correction, ([1],)),
    (aten.std_mean.correction, ([1],)),
    (aten.aminmax.default, ()),
]


@pytest.mark.parametrize(("operator", "rest"), TWO_RESULTS, ids=named)
def test_operators_with_two_results(operator: Any, rest: tuple[Any, ...]) -> None:
    words = {"dim": 1} if operator is aten.aminmax.default else {}
    found = masked(operator, X, *rest, masks={0: {1: KEPT}}, **words)
    torch.testing.assert_close(tuple(found), tuple(operator(X[:, KEPT], *rest, **words)), rtol=1e-12, atol=1e-12)


POSITIONS = [
    (aten.topk.default, (2, 1)),
    (aten.max.dim, (1,)),
    (aten.min.dim, (1,)),
    (aten.median.dim, (1,)),
    (aten.cummax.default, (1,)),
]


@pytest.mark.parametrize(("operator", "rest"), POSITIONS, ids=named)
def test_chosen_positions_are_those_of_the_full_row(operator: Any, rest: tuple[Any, ...]) -> None:
    values, positions = masked(operator, X, *rest, masks={0: {1: KEPT}})
    wanted, inside = operator(X[:, KEPT], *rest)
    if operator is aten.cummax.default:
        values, positions = values[:, KEPT], positions[:, KEPT]
    torch.testing.assert_close(values, wanted, rtol=0, atol=0)
    assert torch.equal(positions, KEPT.nonzero().flatten()[inside])


def test_argmax_is_a_position_of_the_full_row() -> None:
    found = masked(aten.argmax.default, X, 1, masks={0: {1: KEPT}})
    assert torch.equal(found, KEPT.nonzero().flatten()[X[:, KEPT].argmax(1)])


A, B, C, V = randn(2, 4, 6), randn(2, 6, 5), randn(2, 4, 5), randn(6)
PRODUCTS = [  # operator, operands, masks, the operands sliced by hand
    (aten.matmul.default, (A, B), {0: {2: KEPT}, 1: {1: KEPT}}, (A[..., KEPT], B[:, KEPT])),
    (aten.bmm.default, (A, B), {0: {2: KEPT}, 1: {1: KEPT}}, (A[..., KEPT], B[:, KEPT])),
    (aten.mm.default, (A[0], B[0]), {0: {1: KEPT}, 1: {0: KEPT}}, (A[0][:, KEPT], B[0][KEPT])),
    (aten.mv.default, (A[0], B[0, :, 0]), {0: {1: KEPT}, 1: {0: KEPT}}, (A[0][:, KEPT], B[0, KEPT, 0])),
    (aten.dot.default, (A[0, 0], B[0, :, 0]), {0: {0: KEPT}, 1: {0: KEPT}}, (A[0, 0, KEPT], B[0, KEPT, 0])),
    (aten.addmm.default, (C[0], A[0], B[0]), {1: {1: KEPT}, 2: {0: KEPT}}, (C[0], A[0][:, KEPT], B[0][KEPT])),
    (aten.baddbmm.default, (C, A, B), {1: {2: KEPT}, 2: {1: KEPT}}, (C, A[..., KEPT], B[:, KEPT])),
    (aten.addbmm.default, (C[0], A, B), {1: {2: KEPT}, 2: {1: KEPT}}, (C[0], A[..., KEPT], B[:, KEPT])),
    (aten.inner.default, (A, B.mT[0]), {0: {2: KEPT}, 1: {1: KEPT}}, (A[..., KEPT], B.mT[0][:, KEPT])),
    (aten.linear.default, (A, B.mT[0]), {0: {2: KEPT}, 1: {1: KEPT}}, (A[..., KEPT], B.mT[0][:, KEPT])),
]


@pytest.mark.parametrize(
    ("operator", "operands", "masks", "sliced"), PRODUCTS, ids=lambda v: str(v) if callable(v) else ""
)
def test_products(operator: Any, operands: Any, masks: Any, sliced: Any) -> None:
    found = masked(operator, *operands, masks=masks)
    torch.testing.assert_close(found, operator(*sliced), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "bij, bjk", "...ij,...jk->...ik"])
def test_einsum_sums_over_kept_positions(equation: str) -> None:
    found = masked(aten.einsum.default, equation, [A, B], masks={0: {2: KEPT}, 1: {1: KEPT}})
    torch.testing.assert_close(found, torch.einsum(equation, A[..., KEPT], B[:, KEPT]), rtol=1e-12, atol=1e-12)


def test_other_products() -> None:
    both = {0: {2: KEPT}, 1: {1: KEPT}}
    found = masked(aten.tensordot.default, A, B, [2], [1], masks=both)
    torch.testing.assert_close(found, torch.tensordot(A[..., KEPT], B[:, KEPT], ([2], [1])), rtol=1e-12, atol=1e-12)
    chain = [A[0], B[0], randn(5, 2)]
    found = masked(aten.linalg_multi_dot.default, chain, masks={0: {1: KEPT}, 1: {0: KEPT}})
    torch.testing.assert_close(found, A[0][:, KEPT] @ B[0][KEPT] @ chain[2], rtol=1e-12, atol=1e-12)
    weight = randn(5, 6, 3)
    found = masked(aten.bilinear.default, A[0], C[0, :, :3], weight, None, masks={0: {1: KEPT}, 2: {1: KEPT}})
    wanted = aten.bilinear.default(A[0][:, KEPT], C[0, :, :3], weight[:, KEPT], None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    image, kernel = randn(2, 6, 5, 5), randn(4, 6, 3, 3)
    found = masked(aten.conv2d.default, image, kernel, masks={0: {1: KEPT}, 1: {1: KEPT}})
    torch.testing.assert_close(found, aten.conv2d.default(image[:, KEPT], kernel[:, KEPT]), rtol=1e-12, atol=1e-12)


def test_norms_over_the_last_dimension() -> None:
    x, weight, bias = randn(2, 3, 6), randn(6), randn(6)
    masks = {0: {2: KEPT}, 1: {0: KEPT}, 2: {0: KEPT}}
    found = masked(aten.layer_norm.default, x, [6], weight, bias, 1e-5, masks=masks)[..., KEPT]
    wanted = aten.layer_norm.default(x[..., KEPT], [4], weight[KEPT], bias[KEPT], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found = masked(aten.rms_norm.default, x, [6], weight, masks={0: {2: KEPT}, 1: {0: KEPT}})[..., KEPT]
    torch.testing.assert_close(found, aten.rms_norm.default(x[..., KEPT], [4], weight[KEPT]), rtol=1e-12, atol=1e-12)


def test_norms_over_channels() -> None:
    x, weight, bias = randn(2, 6, 4, 4), randn(6), randn(6)
    kept = torch.tensor([True, False, True, True, True, False])  # two in each of two groups
    masks = {0: {1: kept}, 1: {0: kept}, 2: {0: kept}}
    found = masked(aten.group_norm.default, x, 2, weight, bias, 1e-5, masks=masks)[:, kept]
    wanted = aten.group_norm.default(x[:, kept], 2, weight[kept], bias[kept], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    rows = randn(1, 4, 6)  # as weights that are standardized are
    arguments = (None, None, None, None, True, 0.0, 1e-5, False)
    found = masked(aten.batch_norm.default, rows, *arguments, masks={0: {2: KEPT}})[..., KEPT]
    wanted = aten.batch_norm.default(rows[..., KEPT], *arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found = masked(aten.instance_norm.default, rows, *arguments, masks={0: {2: KEPT}})[..., KEPT]
    wanted = aten.instance_norm.default(rows[..., KEPT], *arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_weight_norm() -> None:
    v, g = randn(3, 6), randn(3, 1)
    found = masked(aten._weight_norm.default, v, g, 0, masks={0: {0: FEW, 1: KEPT}, 1: {0: FEW}})
    wanted = aten._weight_norm.default(v[FEW][:, KEPT], g[FEW], 0)
    torch.testing.assert_close(found[FEW][:, KEPT], wanted, rtol=1e-12, atol=1e-12)
    assert not found[~FEW].any()


@pytest.mark.parametrize(
    "operator", [aten.cosine_similarity.default, aten.pairwise_distance.default, aten.cdist.default]
)
def test_comparisons(operator: Any) -> None:
    x, y = randn(3, 6), randn(3, 6)
    masks = {0: {1: KEPT}, 1: {1: KEPT}}
    torch.testing.assert_close(
        masked(operator, x, y, masks=masks), operator(x[:, KEPT], y[:, KEPT]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "words", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}, {"gqa": True}], ids=str
)
def test_attention_over_kept_keys(words: dict[str, Any]) -> None:
    heads = 2 if words.get("gqa") else 4
    q, k, v = randn(2, 4, 6, 6), randn(2, heads, 6, 6), randn(2, heads, 6, 5)
    extra: dict[str, Any] = {name: value for name, value in words.items() if name in ("is_causal", "scale")}
    full = dict(extra)
    if "mask" in words:
        mask = randn(6, 6)
        mask = mask > -1 if words["mask"] == "bool" else mask
        full["attn_mask"], extra["attn_mask"] = mask, mask[:, KEPT]
    if words.get("gqa"):
        full["enable_gqa"] = extra["enable_gqa"] = True
    if words.get("is_causal"):  # keys that go are no longer counted from the left
        extra = {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()[:, KEPT]}
    operator = aten.scaled_dot_product_attention.default
    found = masked(operator, q, k, v, masks={0: {3: KEPT}, 1: {2: KEPT, 3: KEPT}, 2: {2: KEPT}}, **full)
    scale = words.get("scale", 6**-0.5)  # that of all features
    wanted = operator(q[..., KEPT], k[:, :, KEPT][..., KEPT], v[:, :, KEPT], **{**extra, "scale": scale})
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_looked_up_by_position_is_looked_up_in_the_full_row() -> None:
    table, index = randn(6, 3), torch.tensor([0, 3, 5])
    assert torch.equal(masked(aten.embedding.default, table, index, masks={0: {0: KEPT}}), table[index])


def test_positions_are_put_where_they_were() -> None:
    assert scatter_into_zeros(torch.tensor([[1, 2]]), FEW, -1).tolist() == [[0, 1, 2]]


def test_a_masked_form_is_registered_once() -> None:
    with pytest.raises(ArgumentError, match=r"'aten.mean' has a masked form already"):
        masked_operator("aten.mean")(lambda call: call.run())
    masked_operator("torchshear_tests.mixed")(lambda call: call.run())
    forget_masked_form("torchshear_tests.mixed")
    assert "torchshear_tests.mixed" not in _FORMS


def test_every_masked_form_is_of_an_operator_with_a_rule() -> None:
    known = {".".join(name.split(".")[:2]) for name in registered_operators()} | {"aten._softmax", "aten._log_softmax"}
    assert set(_FORMS) <= known | {"aten.histc", "aten.bincount", "aten.one_hot", "aten.scatter_"}
