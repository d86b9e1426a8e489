"""The axis algebra: which channels must be cut together, which cannot be cut, and plans of what is cut."""

from torchshear.dependency import _forecast as _forecast  # provides what parts of a model would save
from torchshear.dependency._analysis import analyze
from torchshear.dependency._axis import Algebra, Axes, Axis
from torchshear.dependency._call import Call, Keep, Result
from torchshear.dependency._computed import computed_weights
from torchshear.dependency._cut import Cut, dense_cost
from torchshear.dependency._form import Form, FormKind, Part, Scales, Sizes, Slot
from torchshear.dependency._groups import ChannelGroup, ChannelGroups, FixedDimension, Member, check_groups
from torchshear.dependency._network import Dimension, Value
from torchshear.dependency._outputs import OutputPlan
from torchshear.dependency._part_cost import part_costs
from torchshear.dependency._plan import GroupPlan, PruningPlan, make_plan
from torchshear.dependency._registry import operator_rule, registered_operators, unregister
from torchshear.dependency._state_plan import Renumbering, StatePlan, make_state_plan
from torchshear.dependency._uses import FAMILIES, ROLES
from torchshear.dependency._width_cost import WidthCost
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
