"""The exception tree: every failure that torchshear raises on purpose derives from `TorchshearError`.

A message says what was given, what was expected, where (module, operator, source line) and what to do.
"""

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "KeywordError",
    "LatencyError",
    "MaskError",
    "MissingLibraryError",
    "NotFasterError",
    "OtherToolImportError",
    "OtherToolNameError",
    "OutputError",
    "PlanError",
    "SearchError",
    "TorchshearError",
    "VerificationError",
    "WeightError",
]


class TorchshearError(Exception):
    """Root of everything that torchshear raises on purpose."""


class ArgumentError(TorchshearError, ValueError):
    """An argument is outside what the function accepts: a ratio, a name, a file that is missing."""


class OtherToolNameError(TorchshearError, AttributeError):
    """A name of another tool was looked up; the message says what to use here."""


class OtherToolImportError(TorchshearError, ImportError):
    """A name of another tool was imported; the message says what to use here."""


class KeywordError(ArgumentError, TypeError):
    """Arguments do not fit a signature; the message says what there is, and what to use for words of other tools."""


class CaptureError(TorchshearError):
    """torch.export could not turn the model into a graph; the message names the module and the source line."""


class WeightError(TorchshearError, ValueError):
    """A weight cannot be scored: it is NaN, infinite, missing, or on the meta device."""


class PlanError(TorchshearError, ValueError):
    """A plan does not fit the model, is damaged, or no plan can meet the request."""


class MaskError(TorchshearError, ValueError):
    """Masks do not fit the model, cannot be laid on it or taken off it, or their file is damaged."""


class MissingLibraryError(TorchshearError, ImportError):
    """A library that a part of torchshear works with is not installed, or cannot be imported."""


class CheckpointError(TorchshearError, ValueError):
    """A checkpoint is missing, damaged, or of another model; or a folder holds something else than expected."""


class DataError(TorchshearError, ValueError):
    """Data or a loss does not fit: a loader that is too short, a batch of another structure, a loss that is NaN."""


class VerificationError(TorchshearError):
    """The shrunk model is not equal to the masked model; the message names the first value that differs."""


class ExportError(TorchshearError):
    """A model could not be written as ONNX, or its ONNX file does not compute what the model computes."""


class LatencyError(TorchshearError):
    """A model could not be timed: its ONNX file is missing or invalid, or the runtime does not run it."""


class NotFasterError(TorchshearError):
    """The pruned model is not measurably faster than the one that was given; the message says what to change."""


class SearchError(TorchshearError):
    """A search cannot go on: the user's function keeps failing, no widths are left to try, a storage is damaged."""


class OutputError(TorchshearError, OSError):
    """A file could not be written; what was on disk before is unchanged."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
