"""SizeFactor dot-product attention as one operator."""

from collections.abc import Sequence
from math import prod, sqrt

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.dependency.rules._findings import UNCHANGED
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator, Shape


def _macs(operands: Sequence[Shape], result: Shape) -> int:
    query, key, value = operands[:3]
    return prod(query) * key[-2] + prod(query[:-1]) * key[-2] * value[-1]


@operator_rule("aten.scaled_dot_product_attention", operator=Operator(has_softmax=True, macs=_macs))
def _attention(call: Call) -> Axes:
    """softmax(q k^T * scale) v, with q (..., L, E), k (..., S, E), v (..., S, V) and result (..., L, V).

    The features E of queries and keys are one axis, contracted; the features V of values are another. Without `scale`
    the operator divides by the square root of E as it is, so the original value is written into the call.
    """
    q, k, v = call.axes("query"), call.axes("key"), call.axes("value")
    call.tie(q[-1], k[-1])
    call.tie(k[-2], v[-2])
    call.mix(q[-1], k[-2])
    if call.arg("scale") is None:
        width = q[-1].size
        call.edit("scale", lambda keep: UNCHANGED if keep(q[-1]).all() else 1.0 / sqrt(width))
    n_batch = len(call.out_shape) - 2
    if call.arg("enable_gqa") and q[-3].size != k[-3].size:
        batch = (
            *broadcast(call, [q[:-3], k[:-3], v[:-3]], call.out_shape[: n_batch - 1]),
            _grouped_heads(call, q, k, v),
        )
    else:
        batch = broadcast(call, [q[:-2], k[:-2], v[:-2]], call.out_shape[:n_batch])
    result = (*batch, q[-2], v[-1])
    call.contract((call.arg("query"), call.arg("key")), q[-1:], (q[-2:-1], k[-2:-1]), batch)
    call.contract((call.node, call.arg("value")), k[-2:-1], (q[-2:-1], v[-1:]), batch)
    if call.is_tensor("attn_mask"):
        scores_shape = (*call.out_shape[:n_batch], q[-2].size, k[-2].size)
        broadcast(call, [(*batch, q[-2], k[-2]), call.axes("attn_mask")], scores_shape)
    return result


def _grouped_heads(call: Call, q: Axes, k: Axes, v: Axes) -> Axis:
    """Each key and value head serves a run of query heads; the operator derives how many from the sizes."""
    n_groups = k[-3].size
    groups, _ = call.algebra.factor(q[-3], (n_groups, q[-3].size // n_groups))
    call.tie(groups, k[-3])
    call.tie(k[-3], v[-3])
    return q[-3]
