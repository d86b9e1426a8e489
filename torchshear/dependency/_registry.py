"""The registry of operator rules: for each operator, how the axes of its operands and its result are related."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torchshear.dependency._axis import Axis
from torchshear.dependency._call import Call, Result
from torchshear.errors import ArgumentError
from torchshear.graph.masked._call import forget_masked_form

Rule = Callable[[Call], Result]

_RULES: dict[str, Rule] = {}


def operator_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators.

    Args:
        names: operator names with namespace, as in "aten.conv2d"; all overloads are meant unless one is named, as in
            "aten.add.Tensor".

    Raises:
        ArgumentError: a name has a rule already, or is not "namespace.operator[.overload]".
    """
    for name in names:
        if not 2 <= len(name.split(".")) <= 3:
            raise ArgumentError(f"operator name {name!r}; expected 'namespace.operator' or with an overload.")

    def add(rule: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ArgumentError(f"operator {name!r} has a rule already: {_RULES[name].__name__}.")
            _RULES[name] = rule
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
    """What is registered for a call that is given positions, or None."""
    name = operator_name(node)
    return _POSITION_RULES.get(name) or _POSITION_RULES.get(".".join(name.split(".")[:2]))


def unregister(name: str) -> None:
    """Forget the rule of an operator, and its masked form, so that it is unknown again.

    Raises:
        ArgumentError: there is none.
    """
    if _RULES.pop(name, None) is None:
        raise ArgumentError(f"operator {name!r} has no rule.")
    forget_masked_form(name)


def find_rule(node: fx.Node) -> Rule | None:
    """The rule for a call, or None if the operator is unknown. Elementwise ones are told by their tag."""
    name = operator_name(node)
    rule = _RULES.get(name) or _RULES.get(".".join(name.split(".")[:2]))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _RULES["torchshear.pointwise"]
    return rule


def is_elementwise(node: fx.Node) -> bool:
    """Whether a call computes each value from the values at the same position, and is known to."""
    return find_rule(node) is _RULES["torchshear.pointwise"]


def registered_operators() -> tuple[str, ...]:
    """Names of all operators that have a rule of their own, sorted."""
    return tuple(sorted(_RULES))


def operator_name(node: fx.Node) -> str:
    """Name of the operator that a node calls, as in "aten.conv2d.default"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"python.{getattr(target, '__name__', target)}"
