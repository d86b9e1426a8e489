"""The request for a plan: the criterion, the share or budget, and the limits."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from torchshear._arguments import MOST, is_whole
from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.graph._names import close_names
from torchshear.pruners.criteria._criterion import Criterion
from torchshear.pruners.selection._per_group import Ratio, check_ratio
from torchshear.pruners.selection._scoring import GROUP_REDUCTIONS

SCOPES: Final[Mapping[str, str]] = {
    "local": "every group loses its own share",
    "global": "units of all groups are ranked together",
    "isomorphic": "units of groups with the same operators around them are ranked together",
}
"""Scope -> which units are ranked against one another."""

_ANY_WIDTH: Final = Alignment.none()
NORMALIZE: Final = ("auto", "mean", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Request for a plan; `torchshear.plan` explains each field.

    Raises:
        ArgumentError: a value is outside what it may be, or two contradict each other.
    """

    criterion: str | Criterion = "l1"
    ratio: Ratio | None = None
    scope: str = "local"
    target_macs: float | None = None
    target_params: float | None = None
    min_ratio: Ratio = 0.0
    max_ratio: Ratio | None = None
    alignment: Alignment = _ANY_WIDTH
    min_width: int = 1
    roles: str | Collection[str] | None = None
    exclude: str | Collection[str] = ()
    group_reduction: str = "sum"
    normalize: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what means nothing; what only a network can tell is refused when a plan is made."""
        for name, words in (("scope", SCOPES), ("group_reduction", GROUP_REDUCTIONS), ("normalize", NORMALIZE)):
            word = getattr(self, name)
            if not isinstance(word, str) or word not in words:
                raise ArgumentError(
                    f"{name}={word!r}; expected one of {', '.join(words)}.{close_names(str(word), words)}"
                )
        if not is_whole(self.min_width) or not 1 <= self.min_width <= MOST:
            raise ArgumentError(
                f"min_width={self.min_width!r}; expected an integer of at least 1, the fewest channels to keep."
            )
        for name in ("target_macs", "target_params"):
            _check_target(name, getattr(self, name))
        if self.has_budget and self.ratio is not None and not isinstance(self.ratio, Mapping):
            raise ArgumentError(
                f"ratio={self.ratio} and a target of MACs or parameters both say how much is to go; give one. A "
                f"mapping of ratios may stand beside a target, and says how fast groups shrink beside each other."
            )
        if self.ratio is not None and not isinstance(self.ratio, Mapping):
            check_ratio("ratio", self.ratio)

    @property
    def has_budget(self) -> bool:
        """True if a target of MACs or parameters is given."""
        return self.target_macs is not None or self.target_params is not None

    @property
    def shares(self) -> Ratio:
        """The ratio, or the default one."""
        return 0.5 if self.ratio is None else self.ratio

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain data, without fields at their default; the first four are always there."""
        criterion = self.criterion
        said: dict[str, Any] = {
            "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
            "alignment": self.alignment.name,
            "min_width": self.min_width,
        }
        if self.ratio is not None or not self.has_budget:
            said["ratio"] = _plain(self.shares)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*said, "alignment", "ratio") and value != field.default:
                said[field.name] = (
                    [value] if field.name in ("roles", "exclude") and isinstance(value, str) else _plain(value)
                )
        return said


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, Collection) and not isinstance(value, str) else value


def _check_target(name: str, target: object) -> None:
    """Raise ArgumentError for what is neither None, nor a share in (0, 1], nor a whole number of at least 2."""
    if target is None:
        return
    is_number = isinstance(target, int | float | np.integer | np.floating) and not isinstance(target, bool)
    is_share = is_number and 0 < target <= 1  # type: ignore[operator]
    is_amount = is_number and target >= 2 and (is_whole(target) or target == math.inf or target.is_integer())  # type: ignore
    if not is_share and not is_amount:
        raise ArgumentError(
            f"{name}={target!r}; expected what may be left: a share of the dense model in (0, 1], or a whole number of "
            f"at least 2."
        )
