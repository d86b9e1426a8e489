"""A weight that several calls read: one system over all of them."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.speedup.compensation._least_squares import LinearFit, Moments, fit_linear
from torchshear.speedup.compensation._linear_layer import LinearLayer


class SharedLayer:
    """Sums of the calls that read a weight.

    Args:
        module: name of the module of the first call.
        layer: the layer as the first call reads it.
        n_reads: how many calls read the weight.
    """

    def __init__(self, module: str, layer: LinearLayer, n_reads: int) -> None:
        self.module, self.layer, self.n_reads = module, layer, n_reads
        self._moments: tuple[Moments, Moments] | None = None
        self._n_calls = 0

    def has_form_of(self, layer: LinearLayer) -> bool:
        """Check that another call reads weight and bias in the same way."""
        return _form_of(self.layer) == _form_of(layer)

    def add(self, moments: tuple[Moments, Moments]) -> None:
        """Add the sums of a call, of samples to fit to and of samples held out."""
        if self._moments is None:
            self._moments = moments
        else:
            for own, more in zip(self._moments, moments, strict=True):
                own.merge(more)
        self._n_calls += 1

    def fit(self, state: Mapping[str, Tensor]) -> LinearFit | str:
        """Fit weight and bias over all calls, or return the reason why they stay.

        Args:
            state: canonical name -> tensor of the smaller network.
        """
        layer = self.layer
        if self._n_calls < self.n_reads or self._moments is None:
            name = layer.weight.tensor
            return f"{name!r} is read by {self.n_reads} calls, {self._n_calls} of which could be fitted together"
        fitting, held_out = self._moments
        if not fitting.n or not held_out.n:
            return "no sample gives it finite values"
        weight = layer.to_matrix(layer.weight.read(state))
        bias = weight.new_zeros(weight.shape[:2])
        if layer.bias is not None:
            bias = layer.bias.read(state).reshape(bias.shape)
        return fit_linear(fitting, held_out, weight, bias, layer.bias is not None)


def _form_of(layer: LinearLayer) -> tuple[object, ...]:
    """Return all that calls of one weight must have in common to make one system."""
    bias = None if layer.bias is None else (layer.bias.key, layer.bias.form)
    return bias, layer.weight.form, layer.kind, layer.order, layer.is_rows_first, layer.n_groups
