"""Without its library a module of integrations says what is missing."""

import sys
from importlib import import_module

import pytest

from torchshear.errors import MissingLibraryError


@pytest.mark.parametrize(
    ("name", "hidden"), [("lightning", "lightning.pytorch"), ("transformers", "transformers")]
)  # fmt: skip
def test_a_library_that_is_missing(name: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delitem(sys.modules, f"torchshear.integrations.{name}", raising=False)
    with pytest.raises(MissingLibraryError, match=f"needs {name}, .*pip install"):
        import_module(f"torchshear.integrations.{name}")
