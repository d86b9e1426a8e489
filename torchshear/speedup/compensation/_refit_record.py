"""Record of a refit: the error of each layer before and after, and layers that were left alone."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RefittedLayer:
    """A layer whose weights or statistics were fitted, or stayed as they were because that did better.

    Attributes:
        name: name of its module; of a recurrent layer, of the weight for inputs of each of its layers and directions.
        kind: "linear", "norm", "recurrent", or "logits" for the layers of queries and keys, fitted together to their
            products.
        error_before: squared error of its output on samples held out, relative to the variance of the output in the
            original model, with its weights as they were and all layers before it refitted. In front of a sum the
            output counts with what the rest of the sum lacks.
        error_after: the same after the refit; equal where it stayed as it was.
        method: how it was fitted: "least squares" or, with many inputs, the steps that helped ("channel form", ...); a
            norm by "statistics" ("statistics, though frozen" with momentum=0.0) or "affine", logits by "closed form" or
            "alternating least squares"; "" where it stayed as it was.
    """

    name: str
    kind: str
    error_before: float
    error_after: float
    method: str


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A layer that no refit was tried on.

    Attributes:
        name: name of its module.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refit:
    """Result of a refit.

    Attributes:
        layers: layers in the order in which they run.
        skipped: layers that were left alone, with reasons.
        n_samples: samples that layers were fitted to.
        n_held_out: samples that errors were measured on.
        error_before: squared error of the model's outputs after the cut, on the samples held out, relative to their
            variance in the original model.
        error_after: the same after the refit.
        is_kept: False where the outputs got worse on the samples held out, and the model stayed as it was.
    """

    layers: tuple[RefittedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    n_samples: int
    n_held_out: int
    error_before: float
    error_after: float
    is_kept: bool = True
