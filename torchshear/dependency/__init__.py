"""The axis algebra: which channels must be cut together, which cannot be cut, and plans of what is cut."""

from torchshear.dependency._alignment import Alignment
from torchshear.dependency.algebra._axis import Algebra, Axes, Axis
from torchshear.dependency.groups import _forecast as _forecast  # provides what parts of a model would save
from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._registry import operator_rule, registered_operators, unregister
from torchshear.dependency.rules._role_evidence import ROLES
from torchshear.graph._operator_record import Activation, Norm, Operator, Product, Recurrence
from torchshear.graph.masked._call import MaskedCall, masked_operator, scatter_into_zeros

__all__ = [
    "ROLES",
    "Activation",
    "Algebra",
    "Alignment",
    "Axes",
    "Axis",
    "Call",
    "ChannelGroup",
    "ChannelGroups",
    "MaskedCall",
    "Member",
    "Norm",
    "Operator",
    "Product",
    "Recurrence",
    "masked_operator",
    "operator_rule",
    "registered_operators",
    "scatter_into_zeros",
    "unregister",
]
