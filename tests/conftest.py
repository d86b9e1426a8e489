"""Settings of the whole run."""

import gc
from collections.abc import Iterator

import pytest

from torchshear.speedup.latency import _candidates


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what imports and collection made out of every search for garbage: up to a fifth of the time of a file."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="session")
def few_rounds() -> Iterator[None]:
    """Let a test measure once, however unsteady the machine is: most ask what follows from times, whatever they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_candidates, "_MOST_SECONDS", 0.0)
        yield
