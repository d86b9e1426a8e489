"""The registry of operator rules: for each operator, how the axes of its operands and its result are related."""

from collections.abc import Callable

import torch
from torch import fx

from torchshear.dependency.algebra._axis import Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.errors import ArgumentError
from torchshear.graph._operator_record import Operator, describe_operator, forget_operator, operator_name, operator_of
from torchshear.graph.masked._call import forget_masked_form

Rule = Callable[[Call], Result]

_RULES: dict[str, Rule] = {}


def operator_rule(*names: str, operator: Operator | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators, and what else is known of them.

    Args:
        names: operator names with namespace, as in "aten.conv2d"; all overloads are meant unless one is named, as in
            "aten.add.Tensor".
        operator: what is known of them beside the rule, as that they are norms; nothing if it is not given.

    Raises:
        ArgumentError: a name has a rule already, or is not "namespace.operator[.overload]".
    """
    for name in names:
        if name in _RULES:
            raise ArgumentError(f"operator {name!r} has a rule already: {_RULES[name].__name__}.")
    describe_operator(*names, operator=operator or Operator())

    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


PositionRule = Callable[[Call, Axis, Rule], Result]

_POSITION_RULES: dict[str, PositionRule] = {}


def position_rule(*names: str) -> Callable[[PositionRule], PositionRule]:
    """Register what operators do with an operand whose values are positions along an axis.

    The rule is given the call, the axis, and the operator's own rule. An operator without one fixes the axis.

    Args:
        names: operator names, as for `operator_rule`.
    """

    def add(rule: PositionRule) -> PositionRule:
        _POSITION_RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def find_position_rule(node: fx.Node) -> PositionRule | None:
    """Find the rule for a call that is given positions; None if there is none."""
    name = operator_name(node)
    rule = _POSITION_RULES.get(name) or _POSITION_RULES.get(".".join(name.split(".")[:2]))
    return _POSITION_RULES["torchshear.passing"] if rule is None and operator_of(node).keeps_values else rule


def unregister(name: str) -> None:
    """Forget all that is known of an operator: its rule, its record and its masked form.

    Args:
        name: name of the operator, as it was registered.

    Raises:
        ArgumentError: there is none.
    """
    if _RULES.pop(name, None) is None:
        raise ArgumentError(f"operator {name!r} has no rule.")
    forget_operator(name)
    forget_masked_form(name)


def find_rule(node: fx.Node) -> Rule | None:
    """Find the rule for a call; None if the operator is unknown. Elementwise ones are told by torch's tag."""
    name = operator_name(node)
    rule = _RULES.get(name) or _RULES.get(".".join(name.split(".")[:2]))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _RULES["torchshear.pointwise"]
    return rule


def registered_operators() -> tuple[str, ...]:
    """Return the names of all operators that have a rule of their own, sorted."""
    return tuple(sorted(_RULES))
