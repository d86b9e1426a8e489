"""Base class of our dispatch modes."""

from torch.utils._python_dispatch import TorchDispatchMode


class LeanDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode without the wrapper that torch puts around each call for its compiler, which costs as much as the call."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
