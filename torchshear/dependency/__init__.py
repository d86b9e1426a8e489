"""The axis algebra: which channels must be cut together, which cannot be cut, and plans of what is cut."""

from torchshear.dependency.algebra._axis import Algebra, Axes, Axis
from torchshear.dependency.groups import _forecast as _forecast  # provides what parts of a model would save
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.groups._computed_weights import computed_weights
from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups, FixedDimension, Member, check_groups
from torchshear.dependency.groups._network import Dimension, Value
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import Cut, dense_cost, part_costs
from torchshear.dependency.plans._form import Form, FormKind, Part, Scales, Sizes, Slot
from torchshear.dependency.plans._outputs import OutputPlan
from torchshear.dependency.plans._plan import GroupPlan, PruningPlan, make_plan
from torchshear.dependency.plans._state_plan import Renumbering, StatePlan, make_state_plan
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._contractions import FAMILIES, ROLES
from torchshear.dependency.rules._facts import Keep, Result
from torchshear.dependency.rules._registry import operator_rule, registered_operators, unregister
from torchshear.graph import (
    Activation,
    MaskedCall,
    Norm,
    Operator,
    Product,
    Recurrence,
    masked_operator,
    scatter_into_zeros,
)

__all__ = [
    "FAMILIES",
    "ROLES",
    "Activation",
    "Algebra",
    "Axes",
    "Axis",
    "Call",
    "ChannelGroup",
    "ChannelGroups",
    "Cut",
    "Dimension",
    "FixedDimension",
    "Form",
    "FormKind",
    "GroupPlan",
    "Keep",
    "MaskedCall",
    "Member",
    "Norm",
    "Operator",
    "OutputPlan",
    "Part",
    "Product",
    "PruningPlan",
    "Recurrence",
    "Renumbering",
    "Result",
    "Scales",
    "Sizes",
    "Slot",
    "StatePlan",
    "Value",
    "WidthCost",
    "analyze",
    "check_groups",
    "computed_weights",
    "dense_cost",
    "make_plan",
    "make_state_plan",
    "masked_operator",
    "operator_rule",
    "part_costs",
    "registered_operators",
    "scatter_into_zeros",
    "unregister",
]
