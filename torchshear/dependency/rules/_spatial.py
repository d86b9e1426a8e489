"""Operators over space: pooling, interpolation, padding, unfolding, pixel and channel shuffles."""

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule


def _over_last(call: Call, n_space: int, shape: tuple[int, ...] | None = None) -> Axes:
    """Everything before the last `n_space` axes passes; space is computed anew."""
    x = call.axes(call.tensor_args[0])
    call.fix(x[-n_space:], "space")
    return (*x[:-n_space], *(call.fixed_axis(size, "space") for size in (shape or call.out_shape)[-n_space:]))


@operator_rule("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
@operator_rule("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d")
def _windows(call: Call) -> Axes:
    """Windows move over the last axes; one along which each of them is a single position passes."""
    x = call.axes("self")
    n_space = next(n for n in (1, 2, 3) if f"pool{n}d" in str(call.node.target))
    kernel, stride, padding = (_each(call.arg(name), n_space) for name in ("kernel_size", "stride", "padding"))
    result = list(x)
    for i, window in enumerate(zip(kernel, stride or kernel, padding, strict=True), len(x) - n_space):
        if window != (1, 1, 0):
            call.fix([x[i]], "space")
            result[i] = call.fixed_axis(call.out_shape[i], "space")
    return tuple(result)


def _each(given: int | list[int], n_space: int) -> list[int]:
    """A number for each axis of space, of which one may stand for all; none where none is given."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * n_space if len(numbers) == 1 else numbers


@operator_rule(
    "aten.adaptive_avg_pool1d",
    "aten.upsample_nearest1d",
    "aten.upsample_linear1d",
)
def _one_dimension(call: Call) -> Axes:
    return _over_last(call, 1)


@operator_rule(
    "aten.adaptive_avg_pool2d",
    "aten.upsample_nearest2d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten._upsample_bicubic2d_aa",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_nearest_exact2d",
)
def _two_dimensions(call: Call) -> Axes:
    return _over_last(call, 2)


@operator_rule(
    "aten.adaptive_avg_pool3d",
    "aten.upsample_nearest3d",
    "aten.upsample_trilinear3d",
)
def _three_dimensions(call: Call) -> Axes:
    return _over_last(call, 3)


@operator_rule("aten.adaptive_max_pool1d", "aten.max_pool1d_with_indices")
def _one_dimension_with_indices(call: Call) -> Result:
    return [_over_last(call, 1, call.out_shape[0])] * 2


@operator_rule("aten.adaptive_max_pool2d", "aten.max_pool2d_with_indices")
def _two_dimensions_with_indices(call: Call) -> Result:
    return [_over_last(call, 2, call.out_shape[0])] * 2


@operator_rule("aten.adaptive_max_pool3d", "aten.max_pool3d_with_indices")
def _three_dimensions_with_indices(call: Call) -> Result:
    return [_over_last(call, 3, call.out_shape[0])] * 2


@operator_rule("aten.max_unpool2d", "aten.max_unpool3d")
def _unpool(call: Call) -> Axes:
    """Maxima go back to where they were, plane by plane."""
    x, indices = call.axes("self"), call.axes("indices")
    n_space = 2 if "2d" in str(call.node.target) else 3
    for axis, other in zip(x, indices, strict=True):
        call.tie(axis, other)
    return _over_last(call, n_space)


@operator_rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def _grid_sample(call: Call) -> Axes:
    """Input (N, C, *space) read at the places that a grid (N, *out, coordinates) names: channels pass."""
    x, grid = call.axes("input"), call.axes("grid")
    call.fix([*x[2:], *grid[1:]], "space that a grid samples")
    call.tie(x[0], grid[0])
    return (*x[:2], *grid[1:-1])


@operator_rule("aten.fft_fft", "aten.fft_ifft", "aten.fft_rfft", "aten.fft_irfft", "aten.fft_hfft", "aten.fft_ihfft")
@operator_rule("aten.fft_fft2", "aten.fft_ifft2", "aten.fft_rfft2", "aten.fft_irfft2")
@operator_rule("aten.fft_fftn", "aten.fft_ifftn", "aten.fft_rfftn", "aten.fft_irfftn")
@operator_rule("aten.fft_fftshift", "aten.fft_ifftshift")
def _fourier(call: Call) -> Axes:
    """Axes that are transformed stay; all others pass."""
    x, given = call.axes("self"), call.arg("dim")
    if given is None:
        n_last = len(call.arg("s") or x)
        given = range(len(x) - n_last, len(x))
    dims = {int(dim) % len(x) for dim in ([given] if isinstance(given, int) else given)}
    call.fix([x[dim] for dim in dims], "transformed into frequencies or back")
    shape = call.out_shape
    return tuple(call.fixed_axis(shape[i], "frequencies") if i in dims else axis for i, axis in enumerate(x))


@operator_rule("aten.pad", "aten.constant_pad_nd")
def _pad(call: Call) -> Axes:
    """Constant positions are added at the ends of axes; along channels they can be cut like any other."""
    x, pad = list(call.axes("self")), call.arg("pad")
    for i in range(len(pad) // 2):
        dim = len(x) - 1 - i
        x[dim] = _pad_axis(call, x[dim], 2 * i, call.out_shape[dim])
    return tuple(x)


def _pad_axis(call: Call, axis: Axis, index: int, size: int) -> Axis:
    before, after = call.arg("pad")[index : index + 2]
    if (before, after) == (0, 0):
        return axis
    constant = call.arg("mode") in (None, "constant")
    literal = isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0
    if call.algebra.is_fixed(axis) or not constant or not literal:
        call.fix([axis], "padded by other than a constant")
        return call.fixed_axis(size, "padded")
    parts = [call.algebra.virtual(before), axis, call.algebra.virtual(after)]
    call.edit_size("pad", parts[0], index)
    call.edit_size("pad", parts[2], index + 1)
    return call.algebra.concat([part for part in parts if part.size])


@operator_rule("aten.pixel_shuffle")
def _pixel_shuffle(call: Call) -> Axes:
    """(..., C r r, H, W) to (..., C, H r, W r): channel c is made of a run of r r inputs."""
    x = call.axes("self")
    factor = int(call.arg("upscale_factor")) ** 2
    channels, inside = call.algebra.factor(x[-3], (x[-3].size // factor, factor))
    call.fix([inside, *x[-2:]], "becomes space")
    return (*x[:-3], channels, *(call.fixed_axis(size, "space") for size in call.out_shape[-2:]))


@operator_rule("aten.pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Axes:
    x = call.axes("self")
    call.fix(x[-2:], "space")
    inside = call.fixed_axis(int(call.arg("downscale_factor")) ** 2, "was space")
    return (*x[:-3], call.algebra.merge((x[-3], inside)), *(call.fixed_axis(s, "space") for s in call.out_shape[-2:]))


@operator_rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def _channel_shuffle(call: Call) -> Axes:
    """Channels as (groups, rest) become (rest, groups)."""
    x = call.axes("self")
    groups = int(call.arg("groups"))
    group, rest = call.algebra.factor(x[1], (groups, x[1].size // groups))
    call.edit_size("groups", group)
    return (x[0], call.algebra.merge((rest, group)), *x[2:])


@operator_rule("aten.im2col")
def _im2col(call: Call) -> Axes:
    """(N, C, H, W) to (N, C k k, windows)."""
    x = call.axes("self")
    call.fix(x[-2:], "space")
    size, windows = call.out_shape[-2:]
    patch = call.fixed_axis(size // x[-3].size, "positions in a window")
    return (*x[:-3], call.algebra.merge((x[-3], patch)), call.fixed_axis(windows, "windows"))


@operator_rule("aten.col2im")
def _col2im(call: Call) -> Axes:
    """(N, C k k, windows) to (N, C, H, W)."""
    x = call.axes("self")
    kernel = call.arg("kernel_size")
    patch = int(kernel[0]) * int(kernel[1])
    channels, inside = call.algebra.factor(x[-2], (x[-2].size // patch, patch))
    call.fix([inside, x[-1]], "becomes space")
    return (*x[:-2], channels, *(call.fixed_axis(size, "space") for size in call.out_shape[-2:]))
