"""Operators of which no part may shrink, each with its reason, so that reports say why and not only where."""

from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule


@operator_rule(
    "aten.linalg_cholesky",
    "aten.linalg_det",
    "aten.linalg_eigh",
    "aten.linalg_householder_product",
    "aten.linalg_inv",
    "aten.linalg_matrix_exp",
    "aten.linalg_pinv",
    "aten.linalg_qr",
    "aten.linalg_slogdet",
    "aten.linalg_solve",
    "aten.linalg_svd",
    "aten.linalg_svdvals",
    "aten.matrix_exp",
)
def _whole_matrix(call: Call) -> Result:
    """Each value of the result depends on all rows and columns together (a decomposition, an inverse)."""
    return call.refuse("a matrix is decomposed or inverted as a whole")


@operator_rule("aten.linalg_cross")
def _cross(call: Call) -> Result:
    return call.refuse("vectors of three coordinates")


@operator_rule("aten.as_strided", "aten.view.dtype", "aten.take", "aten.put", "aten.masked_scatter")
def _memory(call: Call) -> Result:
    """Positions are counted in memory, over all dimensions at once."""
    return call.refuse("positions are counted over all dimensions at once")


@operator_rule("aten.fill_diagonal_", "aten.diagonal_scatter", "aten.affine_grid_generator", "aten.pdist")
def _positions(call: Call) -> Result:
    """Values are made or chosen by their position."""
    return call.refuse("made or chosen by position")


@operator_rule("aten.histc", "aten.searchsorted", "aten.nonzero", "aten.masked_select", "aten.bincount")
def _counted(call: Call) -> Result:
    """The number of values, or their places, are the result."""
    return call.refuse("counted or searched as a whole")


@operator_rule("torchvision.deform_conv2d")
def _deformable(call: Call) -> Result:
    """Offsets and masks are laid out by kernel position and offset group, which are computed from channel counts."""
    return call.refuse("a deformable convolution is fixed at its boundary")
