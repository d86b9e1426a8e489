"""Searches: how much of which channel group goes, found by trying."""

from torchshear.searching._method import Outcome, Proposal, SearchMethod
from torchshear.searching._record import SearchResult
from torchshear.searching._space import SearchSpace
from torchshear.searching._trial import SearchTrial
from torchshear.searching.methods._allocation import Milp
from torchshear.searching.methods._amc import AMC
from torchshear.searching.methods._annealing import Annealing
from torchshear.searching.methods._controls import RandomSearch, Uniform
from torchshear.searching.methods._evolution import Evolution
from torchshear.searching.methods._netadapt import NetAdapt
from torchshear.searching.methods._sensitivity import Sensitivity

__all__ = [
    "AMC",
    "Annealing",
    "Evolution",
    "Milp",
    "NetAdapt",
    "Outcome",
    "Proposal",
    "RandomSearch",
    "SearchMethod",
    "SearchResult",
    "SearchSpace",
    "SearchTrial",
    "Sensitivity",
    "Uniform",
]
