"""Rules for the ATen operators, one file a family. Importing this package registers them all."""

from torchshear.dependency.rules import (
    _attention,
    _choosing,
    _contraction,
    _convolution,
    _creation,
    _elementwise,
    _indexing,
    _joining,
    _layout,
    _normalization,
    _recurrent,
    _reduction,
    _refused,
    _reshape,
    _scattering,
    _spatial,
)

__all__ = [
    "_attention",
    "_choosing",
    "_contraction",
    "_convolution",
    "_creation",
    "_elementwise",
    "_indexing",
    "_joining",
    "_layout",
    "_normalization",
    "_recurrent",
    "_reduction",
    "_refused",
    "_reshape",
    "_scattering",
    "_spatial",
]
