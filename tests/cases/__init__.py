"""The named cases, in order of their numbers."""

from tests.cases import attention, plain, routing, signatures, weights
from tests.cases._base import REGISTERED, Case

CASES = tuple(sorted(REGISTERED, key=lambda case: case.number))

__all__ = ["CASES", "Case", "attention", "plain", "routing", "signatures", "weights"]
