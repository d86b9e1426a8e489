"""The masked forms of ATen's operators that mix positions; see `MaskedCall`."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from torchshear.errors import VerificationError
from torchshear.graph._location import locate
from torchshear.graph.masked._call import MaskedCall, masked_operator

# Dimensions that products of two operands sum over: operator -> argument -> dimensions.
_CONTRACTED: dict[str, dict[str, tuple[int, ...]]] = {
    "aten.addbmm": {"batch1": (0, 2)},
    "aten.addmm": {"mat1": (-1,)},
    "aten.addmv": {"mat": (-1,)},
    "aten.baddbmm": {"batch1": (-1,)},
    "aten.bilinear": {"input1": (-1,), "input2": (-1,)},
    "aten.bmm": {"self": (-1,)},
    "aten.conv1d": {"input": (-2,)},
    "aten.conv2d": {"input": (-3,)},
    "aten.conv3d": {"input": (-4,)},
    "aten.conv_transpose1d": {"input": (-2,)},
    "aten.conv_transpose2d": {"input": (-3,)},
    "aten.conv_transpose3d": {"input": (-4,)},
    "aten.dot": {"self": (-1,)},
    "aten.inner": {"self": (-1,)},
    "aten.linear": {"input": (-1,)},
    "aten.matmul": {"self": (-1,)},
    "aten.mm": {"self": (-1,)},
    "aten.mv": {"self": (-1,)},
    "aten.vdot": {"self": (-1,)},
}


@masked_operator(*_CONTRACTED, zeros_are_exact=True)
def _product(call: MaskedCall) -> Any:
    """Fill one operand: a term of a sum of products vanishes if one of its factors is zero."""
    name = str(call.node.target).rpartition(".")[0]
    return call.run(**{operand: call.fill_cut(operand, dims) for operand, dims in _CONTRACTED[name].items()})


@masked_operator("aten.tensordot", zeros_are_exact=True)
def _tensordot(call: MaskedCall) -> Any:
    return call.run(self=call.fill_cut("self", call.arg("dims_self")))


@masked_operator("aten.linalg_multi_dot", "aten.chain_matmul", zeros_are_exact=True)
def _chain(call: MaskedCall) -> Any:
    """Fill all matrices but the last: each is summed over with the next one."""
    name = "tensors" if call.arg("matrices") is None else "matrices"
    return call.run(
        **{name: [call.fill_cut(name, [-1], i) for i in range(len(call.arg(name)) - 1)] + call.arg(name)[-1:]}
    )


@masked_operator("aten.einsum", zeros_are_exact=True)
def _einsum(call: MaskedCall) -> Any:
    """Fill over every letter that the result does not have."""
    inputs, arrow, output = call.arg("equation").replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = [letter for letter in "".join(terms) if letter != "."]
        output = "".join(letter for letter in letters if letters.count(letter) == 1)
    tensors = []
    for number, term in enumerate(terms):
        before, dots, after = term.partition("...")
        places = [(letter, dim) for dim, letter in enumerate(before)]
        places += [(letter, dim - len(after)) for dim, letter in enumerate(after)] if dots else []
        tensors.append(call.fill_cut("tensors", [dim for letter, dim in places if letter not in output], number))
    return call.run(tensors=tensors)


@masked_operator(
    "aten._grouped_mm",
    "aten.bincount",
    "aten.embedding",
    "aten.gather",
    "aten.histc",
    "aten.index",
    "aten.one_hot",
    "aten.scatter",
    "aten.scatter_",
    "transformers.grouped_mm_fallback",
    zeros_are_exact=True,
)
def _lookup(call: MaskedCall) -> Any:
    """Look positions that data choose up in the full row, where the kept ones still have their numbers."""
    return call.run()


@masked_operator(
    "aten.any",
    "aten.count_nonzero",
    "aten.linalg_matrix_norm",
    "aten.linalg_norm",
    "aten.linalg_vector_norm",
    "aten.nansum",
    "aten.norm",
    "aten.sum",
    zeros_are_exact=True,
)
@masked_operator(
    "aten.all",
    "aten.amax",
    "aten.amin",
    "aten.logsumexp",
    "aten.mean",
    "aten.nanmean",
    "aten.nanquantile",
    "aten.prod",
    "aten.quantile",
    "aten.std",
    "aten.std_mean",
    "aten.var",
    "aten.var_mean",
    "aten.aminmax",
)
def _reduction(call: MaskedCall) -> Any:
    return call.run(self=call.select_kept("self", call.dims("dim", "self")))


@masked_operator(
    "aten.argmax",
    "aten.argmin",
    "aten.max",
    "aten.median",
    "aten.min",
    "aten.mode",
    "aten.nanmedian",
    "aten.topk",
)
def _extremes(call: MaskedCall) -> Any:
    """Choose among the kept positions, and return their numbers in the full row."""
    dims = call.dims("dim", "self")
    found = call.run(self=call.select_kept("self", dims))
    mask = call.kept_masks("self").get(dims[0]) if len(dims) == 1 else None
    if mask is None or (isinstance(found, Tensor) and found.is_floating_point()):
        return found
    numbers = mask.nonzero().flatten()
    return numbers[found] if isinstance(found, Tensor) else (found[0], numbers[found[1]])


@masked_operator(
    "aten._log_softmax",
    "aten._softmax",
    "aten.log_softmax",
    "aten.softmax",
)
def _softmax(call: MaskedCall) -> Any:
    dims = call.dims("dim", "self")
    return call.scatter_kept(call.run(self=call.select_kept("self", dims)), "self", dims)


# Values that leave a running product or extreme as it is, so that it does not change at cut positions.
_NEUTRAL = {
    "aten.cummax": -torch.inf,
    "aten.cummin": torch.inf,
    "aten.cumprod": 1,
    "aten.logcumsumexp": -torch.inf,
}


@masked_operator(*_NEUTRAL)
def _cumulative(call: MaskedCall) -> Any:
    dims = call.dims("dim", "self")
    found = call.run(self=call.fill_cut("self", dims, value=_NEUTRAL[str(call.node.target).rpartition(".")[0]]))
    mask = call.kept_masks("self").get(dims[0])
    if mask is None or isinstance(found, Tensor):
        return found if mask is None else call.zero_cut(found, "self", dims)
    return call.zero_cut(found[0], "self", dims), found[1]


@masked_operator("aten.cumsum", zeros_are_exact=True)
def _cumulative_sum(call: MaskedCall) -> Any:
    return call.run(self=call.fill_cut("self", call.dims("dim", "self")))


@masked_operator("aten.cosine_similarity", "aten.linalg_vecdot", "aten.pairwise_distance", "aten.cdist")
def _comparison(call: MaskedCall) -> Any:
    """Compare two operands along one dimension, counted from the last since others may be broadcast."""
    names = ("x", "y") if call.arg("x1") is None else ("x1", "x2")
    dim = -1 if call.arg("dim") is None else int(call.arg("dim"))
    rank = max(call.arg(name).ndim for name in names)
    places = {name: call.arg(name).ndim + (dim - rank if dim >= 0 else dim) for name in names}
    whole = [torch.ones(call.arg(name).shape[place], dtype=torch.bool) for name, place in places.items()]
    masks = [call.kept_masks(n).get(place, all_).cpu() for (n, place), all_ in zip(places.items(), whole, strict=True)]
    if min(map(len, masks)) > 1 and not masks[0].equal(masks[1]):  # a single position is compared with all
        raise VerificationError(
            f"{call.node.name!r} compares two operands that are cut at different positions, {locate(call.node)}: its "
            f"rule does not tie them."
        )
    return call.run(**{name: call.select_kept(name, [place]) for name, place in places.items()})


@masked_operator("aten.layer_norm", "aten.rms_norm")
def _layer_norm(call: MaskedCall) -> Tensor:
    x: Tensor = call.arg("input")
    dims = list(range(x.ndim - len(call.arg("normalized_shape")), x.ndim))
    kept = call.select_kept("input", dims)
    if "layer_norm" in str(call.node.target):
        kept = kept - kept.mean(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if call.arg("eps") is None else call.arg("eps")
    result = call.scatter_kept(kept * (kept.square().mean(dims, keepdim=True) + eps).rsqrt(), "input", dims)
    return _scale_and_shift(result, call.arg("weight"), call.arg("bias"))


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@masked_operator("aten.group_norm")
def _group_norm(call: MaskedCall) -> Tensor:
    x, n_groups = call.arg("input"), int(call.arg("num_groups"))
    kept = call.kept_masks("input")
    mask = x.new_ones(x.shape[1]) if 1 not in kept else kept[1].to(x.dtype)
    mask = mask.reshape(1, n_groups, -1, 1)
    rows = x.reshape(x.shape[0], n_groups, x.shape[1] // n_groups, -1)
    count = mask.sum(2, keepdim=True).clamp_min(1) * rows.shape[3]
    mean = (rows * mask).sum((2, 3), keepdim=True) / count
    rows = (rows - mean) * mask
    variance = rows.square().sum((2, 3), keepdim=True) / count
    normal = (rows * (variance + call.arg("eps")).rsqrt()).reshape(x.shape).movedim(1, -1)
    return _scale_and_shift(normal, call.arg("weight"), call.arg("bias")).movedim(-1, 1)


@masked_operator("aten.batch_norm", "aten.instance_norm")
def _batch_norm(call: MaskedCall) -> Tensor:
    """Normalise by statistics of the input, over space and, for batch norms, samples; or by running statistics."""
    x: Tensor = call.arg("input")
    is_over_batch = "batch_norm" in str(call.node.target)
    if not call.arg("training" if is_over_batch else "use_input_stats"):
        whole: Tensor = call.run()
        return whole
    first = 0 if is_over_batch else 2
    dims = [dim for dim in range(first, x.ndim) if dim != 1]
    kept = call.select_kept("input", dims)
    kept = kept - kept.mean(dims, keepdim=True)
    normal = kept * (kept.square().mean(dims, keepdim=True) + call.arg("eps")).rsqrt()
    result = call.scatter_kept(normal, "input", dims).movedim(1, -1)
    return _scale_and_shift(result, call.arg("weight"), call.arg("bias")).movedim(-1, 1)


@masked_operator("aten._weight_norm")
def _weight_norm(call: MaskedCall) -> Tensor:
    v, g = call.select_kept("v"), call.arg("g")
    dim = int(call.arg("dim")) % v.ndim
    if dim in call.kept_masks("v"):
        g = g.index_select(dim, call.kept_masks("v")[dim].nonzero().flatten())
    others = [i for i in range(v.ndim) if i != dim]
    return call.scatter_kept(v * g / v.square().sum(others, keepdim=True).sqrt(), "v")


@masked_operator("aten.renorm")
def _renorm(call: MaskedCall) -> Tensor:
    return call.scatter_kept(call.run(self=call.select_kept("self")), "self")


@masked_operator("aten.scaled_dot_product_attention")
def _attention(call: MaskedCall) -> Tensor:
    """Compute softmax(q k^T * scale) v over the kept keys; the scale is that of all features."""
    full_width = call.arg("query").shape[-1]
    q, k, v = call.fill_cut("query", [-1]), call.fill_cut("key", [-1]), call.arg("value")
    if call.arg("enable_gqa"):
        k, v = (one.repeat_interleave(q.shape[-3] // one.shape[-3], -3) for one in (k, v))
    scale = 1 / sqrt(full_width) if call.arg("scale") is None else call.arg("scale")
    scores = q @ k.transpose(-2, -1) * scale
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if call.arg("is_causal"):
        hidden = torch.ones_like(hidden).triu(1)
    gone = call.kept_masks("key").get(call.arg("key").ndim - 2)
    hidden = hidden if gone is None else hidden | ~gone
    mask = call.arg("attn_mask")
    if mask is not None:
        scores, hidden = (scores, hidden | ~mask) if mask.dtype == torch.bool else (scores + mask, hidden)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    shares = shares.masked_fill(hidden.all(-1, keepdim=True), 0)  # a query that sees no key gets zeros
    if call.arg("dropout_p"):
        shares = torch.dropout(shares, call.arg("dropout_p"), True)
    result: Tensor = shares @ v
    return result
