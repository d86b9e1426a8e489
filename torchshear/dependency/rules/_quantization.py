"""Fake quantisation, as in quantization-aware training: each value by itself, on a grid of its tensor or channel."""

from torch import fx

from torchshear.dependency.algebra._axis import Axes
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule


@operator_rule("aten.fake_quantize_per_tensor_affine")
def _per_tensor(call: Call) -> Axes:
    """Zero lies on every grid, so what is cut stays zero."""
    return call.axes("self")


@operator_rule("aten.fake_quantize_per_channel_affine")
def _per_channel(call: Call) -> Axes:
    return _with_grids(call, call.dim("axis", len(call.axes("self"))), (call.arg("scale"), call.arg("zero_point")))


@operator_rule("aten.fused_moving_avg_obs_fake_quant")
def _observed(call: Call) -> Result:
    """An observer that is on takes ranges over all values of a tensor: on fewer channels it would find others."""
    is_on = call.constant(call.arg("observer_on"))
    if is_on is None or bool(is_on.any()):
        return call.refuse(
            "an observer of quantization-aware training takes ranges over all channels; prune the model before it is "
            "prepared for that, or switch observers off with model.apply(torch.ao.quantization.disable_observer)"
        )
    if not call.arg("per_row_fake_quant"):
        return call.axes("self")
    grids = [call.arg(name) for name in ("running_min", "running_max", "scale", "zero_point")]
    return _with_grids(call, call.dim("ch_axis", len(call.axes("self"))), grids)


def _with_grids(call: Call, dim: int, grids: "list[fx.Node] | tuple[fx.Node, ...]") -> Axes:
    """The axes of the input, along one of which each position has a grid of its own."""
    x = call.axes("self")
    for grid in grids:
        axes = call.axes(grid)
        if len(axes) == 1 and axes[0].size == x[dim].size:
            call.tie(x[dim], axes[0])
    return x
