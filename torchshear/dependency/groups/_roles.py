"""The roles of channel groups, told from the graph and the algebra alone, never from names of modules.

Every rule of an operator that multiplies and sums notes a contraction: which axes were summed over, which only one
operand has, and which both have side by side. What a contraction says of a group depends on its operands. With a weight
on one side it makes the group or reads it. Between two computed values it is attention: what is summed over while
queries meet keys is `qk_dim`, what runs along the values is `v_dim`, what stands beside both is `heads`. The rest
follows from sums of different branches, from weights that are applied again and again, and from what lies between two
layers.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Algebra, Axes, Axis
from torchshear.dependency.algebra._units import PAD
from torchshear.dependency.groups._groups import ChannelGroup
from torchshear.dependency.rules._findings import Facts
from torchshear.dependency.rules._role_evidence import Contraction
from torchshear.graph import Graph
from torchshear.graph._nodes import tensor_operands
from torchshear.graph._operator_record import operator_of

_NORMS = frozenset({"norm", "statistic"})
# Words about groups that take part in products of values, and about those that a layer makes or reads; of tokens, as
# learned queries are, there is one of the former and none of the latter.
_OF_PRODUCTS = frozenset({"outer", "scored"})
_OF_LAYERS = frozenset({"carried", "convolved", "inner", "looked up", "made", "read", "state"})


def assign_roles(
    analysed: Iterable[tuple[Graph, Facts]], algebra: Algebra, groups: Sequence[ChannelGroup]
) -> tuple[ChannelGroup, ...]:
    """Give each group its role.

    Args:
        analysed: each captured graph of the network with what rules noted of it.
        algebra: the relations between units.
        groups: the groups, without roles.
    """
    evidence = _Evidence(algebra, groups)
    for graph, facts in analysed:
        _Reader(graph, facts, evidence).read()
    return tuple(replace(group, role=_role(evidence, number)) for number, group in enumerate(groups))


class _Evidence:
    """The evidence about each group, by its number: words, and for heads the groups that stand beside it."""

    def __init__(self, algebra: Algebra, groups: Sequence[ChannelGroup]) -> None:
        self.groups = groups
        self.declared: dict[int, str] = {}
        self.beside: dict[int, set[int]] = defaultdict(set)
        self.words: dict[int, set[str]] = defaultdict(set)
        self._algebra = algebra
        self._group_of = np.full(len(algebra.store), -1, np.int64)
        for number, group in enumerate(groups):
            self._group_of[group.atoms] = number
        self._seen: dict[int, tuple[Axis, frozenset[int]]] = {}
        self.add("changed", [i for i, group in enumerate(groups) if any(m.purposes & _NORMS for m in group.members)])

    def along(self, axes: Axes) -> frozenset[int]:
        """Return the numbers of the groups whose units stand along any of the axes."""
        found: set[int] = set()
        for axis in axes:
            known = self._seen.get(id(axis.units))
            if known is None:
                rows = self._algebra.store.resolve(axis.units)
                numbers = np.unique(self._group_of[rows[rows != PAD]])
                known = (axis, frozenset(int(number) for number in numbers if number >= 0))
                self._seen[id(axis.units)] = known
            found |= known[1]
        return frozenset(found)

    def are_same(self, axis: Axis, others: Axes) -> bool:
        """Return True if an axis holds the same units as one of others."""
        rows = [self._algebra.store.resolve(one.units) for one in (axis, *others)]
        return any(np.array_equal(rows[0], other) for other in rows[1:])

    def add(self, word: str, groups: Iterable[int]) -> None:
        """Note a word about groups."""
        for number in groups:
            self.words[number].add(word)

    def has(self, number: int, *words: str) -> bool:
        """Return True if all of the words were noted about a group."""
        return self.words[number].issuperset(words)

    def is_inside_experts(self, number: int) -> bool:
        """Return True if all weights in which a group stands hold one slice for each expert."""
        experts = [group for i, group in enumerate(self.groups) if self.has(i, "expert")]
        of_experts = {member.name for group in experts for member in group.members}
        return all(member.name in of_experts for member in self.groups[number].members)

    def reach(self, number: int) -> int:
        """Count the positions of parameters and buffers in which a group stands."""
        return sum(len(np.unique(member.positions)) for member in self.groups[number].members)


_T = TypeVar("_T")


def _union(known: Mapping[fx.Node, frozenset[_T]], nodes: Sequence[fx.Node]) -> frozenset[_T]:
    """Return everything that is known of any of the nodes."""
    empty: frozenset[_T] = frozenset()
    return empty.union(*(known.get(node, empty) for node in nodes))


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """Walks one graph and collects evidence.

    Attributes:
        graph: the captured graph.
        facts: what rules noted of it.
        evidence: added to.
        origins: value -> where it comes from: the layers and sums whose results reach it through nothing but
            elementwise operators, norms and changes of layout.
        computed: values that an input of the model reaches.
        lookups: values looked up in tables.
        products: values that are made of a product of two computed values.
        scores: those of which that product is one of queries and keys.
        sources: value that no input reaches -> the tensors of the model that it is computed of.
        chosen: value -> groups along which computed indices choose a part of a parameter.
        weights: names of the tensors that layers multiply with.
        met: pairs of groups, one summed over in a product and one beside it.
        turns: weight and group -> how often the weight is applied to the group and makes it again.
    """

    graph: Graph
    facts: Facts
    evidence: _Evidence
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    computed: set[fx.Node] = field(default_factory=set)
    lookups: set[fx.Node] = field(default_factory=set)
    products: set[fx.Node] = field(default_factory=set)
    scores: set[fx.Node] = field(default_factory=set)
    sources: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    chosen: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    met: list[tuple[int, int]] = field(default_factory=list)
    turns: Counter[tuple[fx.Node, int]] = field(default_factory=Counter)

    def read(self) -> None:
        """Collect all evidence that the graph holds."""
        for role, axes in self.facts.declared_roles.items():
            for number in self.evidence.along(tuple(axes)):
                self.evidence.declared[number] = role
        for node in self.graph:
            if node.op == "placeholder":
                self.computed.add(node)
                self.origins[node] = frozenset({node})
            elif node.op == "get_attr":
                self.sources[node] = frozenset({str(node.target)})
            elif node.op == "call_function":
                self._call(node)
        # State-space layers are told from attention by a parameter that is no layer's weight and spans state and
        # channels: the decay, one number for each channel and each entry of its state.
        for number, other in set(self.met):
            mine, others = self._loose(number), self._loose(other)
            if any(others.get(name, dim) != dim for name, dim in mine.items()):
                self.evidence.add("state", [number])
                self.evidence.add("inner", [other])
        self.evidence.add("repeated", [number for (_, number), turns in self.turns.items() if turns > 1])

    def _call(self, node: fx.Node) -> None:
        operands = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor | list | tuple)]
        if operator_of(node).passes is not None:  # of other operands it reads the shape, the type, or positions
            operands = operands[:1]
        if any(operand in self.computed for operand in operands):
            self.computed.add(node)
        else:
            self.sources[node] = _union(self.sources, operands)
        for marked in (self.products, self.scores):
            if any(operand in marked for operand in operands):
                marked.add(node)
        self.origins[node] = _union(self.origins, operands)
        # Groups along the dimensions of a parameter from which computed indices pick.
        picks: frozenset[int] = frozenset()
        if str(node.target).startswith("aten.index.") and len(node.args) > 1:
            source, indices = node.args[:2]
            axes = self.facts.axes.get(source.name) if isinstance(source, fx.Node) else None
            if isinstance(axes, tuple) and source not in self.computed and isinstance(indices, list | tuple):
                pairs = zip(axes, indices, strict=False)
                picks = self.evidence.along(tuple(axis for axis, index in pairs if index in self.computed))
        self.chosen[node] = _union(self.chosen, operands) | picks
        contractions = self.facts.contractions.get(node.name, [])
        for contraction in contractions:
            self._contraction(node, contraction)
        if not contractions:
            self._elementwise(node)

    def _elementwise(self, node: fx.Node) -> None:
        """Note sums of different branches, which make a stream, and calls that change values between two layers."""
        axes = self.facts.axes.get(node.name)
        if not isinstance(axes, tuple):
            return
        tensors = tensor_operands(node)
        is_sum = operator_of(node).is_sum and len(tensors) == 2
        if is_sum and all(tensor in self.computed for tensor in tensors):
            left, right = (self.origins[tensor] for tensor in tensors)
            if left - right and right - left and not left | right <= self.lookups:
                self.evidence.add("summed", self.evidence.along(axes))
                self.origins[node] = frozenset({node})
        if operator_of(node).is_pointwise or node.name in self.facts.cross_channel:
            self.evidence.add("changed", self.evidence.along(axes))

    def _contraction(self, node: fx.Node, found: Contraction) -> None:
        if found.kind == "depthwise":
            self.evidence.add("changed", self.evidence.along(found.columns))
            return
        values = [operand is node or operand in self.computed for operand in found.operands]
        self.weights.update(_union(self.sources, found.operands))
        self.origins[node] = frozenset({node})
        if found.kind == "lookup":
            self.lookups.add(node)
        if found.kind == "product" and (all(values) or self._has_learned_queries(node, found, values)):
            self._of_values(node, found)
        elif not self._mixes_heads(found, values):
            self._with_weight(found, is_weight_left=not values[0])
            self.products.discard(node)
            self.scores.discard(node)

    def _has_learned_queries(self, node: fx.Node, found: Contraction, values: Sequence[bool]) -> bool:
        """Return True if a parameter is queries or keys and no weight: a softmax runs over an axis that it lacks."""
        if operator_of(node).has_softmax:  # one of its own, as attention has
            return True
        if any(operand in self.scores for operand in found.operands):  # heads that talk
            return False
        others = found.rows if values[0] else found.columns
        reached = [node]
        for value in reached:
            for user in value.users:
                axes, known, dim = self.facts.axes.get(user.name), operator_of(user), user.args[1:2]
                if known.has_softmax and isinstance(axes, tuple) and isinstance(dim[0], int):
                    return self.evidence.are_same(axes[dim[0]], others)
                if known.is_pointwise and user not in reached:
                    reached.append(user)
        return False

    def _mixes_heads(self, found: Contraction, values: Sequence[bool]) -> bool:
        """Return True if scores of heads are made into scores of other heads, and note that these are heads then."""
        heads = self.evidence.along(found.contracted)
        of_scores = any(operand in self.scores for operand in found.operands)
        if not of_scores or not heads or not all(self.evidence.has(number, "batched") for number in heads):
            return False
        self.evidence.add("batched", self.evidence.along(found.columns if values[0] else found.rows))
        return True

    def _with_weight(self, found: Contraction, is_weight_left: bool) -> None:
        """Note that a layer reads what is contracted, and makes what only its weight has."""
        evidence = self.evidence
        weight, made = (0, found.rows) if is_weight_left else (1, found.columns)
        read, written = evidence.along(found.contracted), evidence.along(made)
        evidence.add("read", read)
        evidence.add("looked up" if found.kind == "lookup" else "made", written)
        if found.kind == "convolution":
            evidence.add("convolved", read | written)
        if found.kind == "product" and any(axis.size > 1 for axis in found.batch):
            evidence.add("expert", evidence.along(found.batch) | self.chosen.get(found.operands[weight], frozenset()))
            evidence.add("in experts", read | written)
        for number in read & written:
            self.turns[found.operands[weight], number] += 1

    def _of_values(self, node: fx.Node, found: Contraction) -> None:
        """Note the groups of a product of two computed values: of queries and keys, or of scores and values."""
        evidence = self.evidence
        contracted, batch = evidence.along(found.contracted), evidence.along(found.batch)
        evidence.add("scored", contracted)
        evidence.add("batched", batch)
        for number in batch:
            evidence.beside[number] |= batch - {number}
        sides = [evidence.along(found.rows) - contracted - batch, evidence.along(found.columns) - contracted - batch]
        for mine, other in ((0, 1), (1, 0)):
            evidence.add(self._word(node, found.operands[mine], found.operands[other], bool(contracted)), sides[mine])
        of_product = [operand is node or operand in self.products for operand in found.operands]
        self.products.add(node)
        self.scores.discard(node)
        if contracted and not any(of_product):
            self.scores.add(node)
        self.met.extend((number, other) for number in contracted for other in sides[0] | sides[1] | batch)

    def _word(self, node: fx.Node, mine: fx.Node, other: fx.Node, has_contracted: bool) -> str:
        """Return the word for an axis that only the operand `mine` of a product has.

        Scores times values: the values' axis is carried, and what scores have beside their tokens are heads of one key.
        Where keys met values first, that product is read by queries, and its other axis is carried.
        """
        is_product = {operand: operand is node or operand in self.products for operand in (mine, other)}
        if has_contracted:
            return "carried" if is_product[mine] else "outer"
        if is_product[other] and not is_product[mine]:
            return "carried"
        return "batched" if mine in self.scores and not is_product[other] else "outer"

    def _loose(self, number: int) -> dict[str, int]:
        """Return the dimension of the group in each parameter that is no layer's weight."""
        members = self.evidence.groups[number].members
        loose = [m for m in members if m.name not in self.weights and m.name in self.graph.state]
        return {m.name: m.dim for m in loose if self.graph.state[m.name].kind == "parameter"}


def _role(evidence: _Evidence, number: int) -> str:
    """Return the role that the evidence speaks for, the most telling first."""
    if number in evidence.declared:
        return evidence.declared[number]
    words = evidence.words[number]
    if words & _OF_PRODUCTS and not words & _OF_LAYERS:
        return "queries"
    for telling, role in _TELLING:
        if evidence.has(number, *telling) and (role != "expert_ffn" or evidence.is_inside_experts(number)):
            return _kind_of_heads(evidence, number) if role == "heads" else role
    return "other"


# Evidence that must be there together -> role; the first that fits is taken.
_TELLING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("state",), "state"),
    (("inner",), "inner"),
    (("batched",), "heads"),
    (("scored", "carried"), "head_dim"),
    (("carried",), "v_dim"),
    (("repeated",), "hidden"),
    (("summed", "read"), "residual"),
    (("expert",), "experts"),
    (("scored", "outer", "read"), "head_dim"),
    (("scored",), "qk_dim"),
    (("outer",), "v_dim"),
    (("looked up",), "embedding"),
    (("convolved",), "channels"),
    (("in experts",), "expert_ffn"),
    (("made", "changed"), "ffn"),
    (("made", "read"), "rank"),
    (("made",), "ffn"),
    (("read",), "ffn"),
)


def _kind_of_heads(evidence: _Evidence, number: int) -> str:
    """Tell query heads from key and value heads: of two groups in one product, the latter stand in more weights."""
    beside = [other for other in evidence.beside[number] if evidence.has(other, "batched")]
    if not beside:
        return "heads"
    return "kv_heads" if all(evidence.reach(number) > evidence.reach(other) for other in beside) else "q_heads"
