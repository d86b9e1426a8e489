"""The state of a session as plain data, and the check that it is of the same session."""

import json
from collections.abc import Mapping
from typing import Any, Final

from torchshear.errors import ArgumentError

_FORMAT: Final = "torchshear.session"
_VERSION: Final = 1


def with_header(asked: Mapping[str, Any], fingerprint: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Put what a session was asked for, as text, beside its state."""
    texts = {name: json.dumps(value, default=repr, sort_keys=True) for name, value in asked.items()}
    return {"format": _FORMAT, "version": _VERSION, "asked": texts, "network": fingerprint, **state}


def check_header(state: object, asked: Mapping[str, Any], fingerprint: str) -> None:
    """Raise ArgumentError for what is no state of a session that was asked for the same, of the same network."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT or state.get("version") != _VERSION:
        raise ArgumentError(
            f"state is {type(state).__name__}; expected what state_dict() of a PruningSession of this version gave."
        )
    if state.get("network") != fingerprint:
        raise ArgumentError("the state is of a session of another network; make the session of the same model.")
    own = with_header(asked, fingerprint, {})["asked"]
    given = state.get("asked")
    for name, text in own.items():
        found = given.get(name) if isinstance(given, Mapping) else None
        if found != text:
            raise ArgumentError(
                f"the state is of a session with {name}={found}, and this one has {name}={text}; a training goes on "
                f"with what it began with."
            )
