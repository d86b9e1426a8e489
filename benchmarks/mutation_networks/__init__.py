"""Small networks for `mutations.py`, for each operator that has a rule; and what is to be said of some of them."""

from mutation_networks import (
    _elementwise,
    _layout,
    _places,
    _products,
    _recurrent,
    _reductions,
    _refused,
    _routers,
)
from mutation_networks._base import CASES, Case
from mutation_networks._explained import EXPLAINED, WITHOUT_CASE

__all__ = ["CASES", "EXPLAINED", "WITHOUT_CASE", "Case"]

assert all((_elementwise, _layout, _places, _products, _recurrent, _reductions, _refused, _routers))
