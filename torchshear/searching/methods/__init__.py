"""Methods of search, one file each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from torchshear.searching._method import SearchMethod
from torchshear.searching.methods._allocation import Milp
from torchshear.searching.methods._amc import AMC
from torchshear.searching.methods._annealing import Annealing
from torchshear.searching.methods._controls import RandomSearch, Uniform
from torchshear.searching.methods._evolution import Evolution
from torchshear.searching.methods._netadapt import NetAdapt
from torchshear.searching.methods._sensitivity import Sensitivity

METHODS: Final[Mapping[str, type[SearchMethod]]] = MappingProxyType(
    {
        "uniform": Uniform,
        "random": RandomSearch,
        "sensitivity": Sensitivity,
        "netadapt": NetAdapt,
        "annealing": Annealing,
        "evolution": Evolution,
        "amc": AMC,
        "milp": Milp,
    }
)
"""Name -> method with its own settings."""
