"""From masks to a plan: units whose removal gives the same function as their masks are removed physically."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear._arguments import close_names
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.algebra._units import PAD
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.groups._weights import computed_weights
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError, MaskError
from torchshear.graph import Graph
from torchshear.graph._nodes import compute_from_state, is_from_state
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import graph_output
from torchshear.graph.model._process import run_exclusively
from torchshear.graph.numerics._float64 import compute_in
from torchshear.pruners.masks._masks import Masks
from torchshear.pruners.masks._members import by_position, mask_of_units, unit_values

Bools = npt.NDArray[np.bool_]
Tensors = dict[str, Tensor]

_READS: Final = frozenset({"in"})
_FACTORS: Final = frozenset({"factor"})
_NOT_OWN: Final = _READS | _FACTORS
_N_PROBES: Final = 2  # random inputs, beside the example
_TOLERANCE: Final = 1e-9  # of the largest output; what is proved is the sum of exact zeros


@run_exclusively()
def plan_from_masks(groups: ChannelGroups, masks: Masks | None = None) -> PruningPlan:
    """Plan the removal of units that masks have ended, so that the shrunk model computes what the masked one does.

    A unit can go in two cases. Nothing reads it: all weights of all layers that read it are zero, and there is such a
    layer. Or it is nothing: all parameters of its own (rows, biases, scales and shifts of norms) are zero. Groups that
    a norm, a softmax or a mean runs over stay whole, since fewer channels are another function there. Both cases are
    then tried: on the example and on random inputs, outputs must stay the same when all parameters of the units that
    go are zeroed, and when those that nobody reads are drawn anew. A group that fails, as one that is also summed over
    or whose zeros become something else (a sigmoid), stays whole and says so.

    Balanced blocks lose equally many units, and every minimum is kept; what is left over are zeros as before.

    Args:
        groups: the analysed network. Masks that lie on the model count, those of `torch.nn.utils.prune` as well.
        masks: masks of its parameters that neither lie on it nor are permanent yet; shrink it only once they do.

    Returns:
        The plan, for `torchshear.shrink`; it cuts nothing where no unit can go.

    Raises:
        ArgumentError: `groups` is no analysed network, or `masks` are none.
        MaskError: a mask is of no parameter, or has another shape; the model is on the meta device.
    """
    check_groups(groups)
    if masks is not None and not isinstance(masks, Masks):
        raise ArgumentError(f"masks is {type(masks).__name__}; expected Masks, or None where they are permanent.")
    state = _State.of(groups, _masked_tensors(groups.graph, masks))
    ended = {group.name: _find_removable(groups, group, state.weights) for group in groups.prunable}
    unread = {name: found[0] for name, found in ended.items()}
    goes = {name: _balance(groups[name], found[0] | found[1]) for name, found in ended.items()}
    goes = {name: units for name, units in goes.items() if units.any()}
    mixed = _groups_with_mixing(groups)
    notes = {name: "stays whole: a norm, softmax or mean runs over it" for name in goes if name in mixed}
    goes = {name: units for name, units in goes.items() if name not in notes}
    if goes and not _keeps_outputs(groups, state, goes, unread):
        failing = [name for name in goes if not _keeps_outputs(groups, state, {name: goes[name]}, unread)]
        notes |= dict.fromkeys(failing or goes, "stays whole: its masked units still change the outputs")
        goes = {name: units for name, units in goes.items() if name not in notes}
        if goes and not _keeps_outputs(groups, state, goes, unread):
            notes |= dict.fromkeys(goes, "stays whole: together with others its masked units change the outputs")
            goes = {}
    for name, found in ended.items():
        n_left = int((found[0] | found[1]).sum()) - (int(goes[name].sum()) if name in goes else 0)
        if n_left and name not in notes:
            notes[name] = f"{n_left} masked units stay: blocks keep equally many, and a least number stays"
    kept = {name: np.flatnonzero(~units) for name, units in goes.items()}
    request = {"kept": "masks", "pattern": masks.pattern if masks is not None else ""}
    return make_plan(Cut(groups, kept), kept, request, notes)


@dataclass(frozen=True, slots=True)
class _State:
    """A network's tensors.

    Attributes:
        tensors: canonical name -> tensor, as it is stored.
        weights: canonical name -> tensor, of a weight that the network computes as it is read.
        computed: node that gives such a weight -> canonical name of the parameter that it stands for.
    """

    tensors: Tensors
    weights: Tensors
    computed: Mapping[str, str]

    @classmethod
    def of(cls, groups: ChannelGroups, tensors: Tensors) -> "_State":
        """The tensors of an analysed network with the weights that it computes of them."""
        nodes = computed_weights(groups)
        weights = {name: compute_from_state(found[0], tensors.__getitem__) for name, found in nodes.items()}
        computed = {node.name: name for name, found in nodes.items() for node in found}
        return cls(tensors, {**tensors, **weights}, computed)


def _masked_tensors(graph: Graph, masks: Masks | None) -> dict[str, Tensor]:
    """The network's tensors with zeros where they are masked.

    Raises:
        MaskError: the masks do not fit, or there are no values.
    """
    state = {name: entry.tensor.detach() for name, entry in graph.state.items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise MaskError("the model is on the meta device and has no weights in which to look for zeros; load them.")
    for given, mask in masks.tensors.items() if masks is not None else ():
        name = graph.aliases.get(given, given)
        if name not in state or tuple(mask.shape) != tuple(state[name].shape):
            what = (
                f"shape {tuple(mask.shape)}, not {tuple(state[name].shape)}" if name in state else "no such parameter"
            )
            raise MaskError(f"the mask of {given!r} is for another model: {what}.{close_names(given, graph.aliases)}")
        state[name] = torch.where(mask.to(state[name].device), state[name], 0)
    return state


def _groups_with_mixing(groups: ChannelGroups) -> set[str]:
    """Names of groups that a norm, a softmax or a mean runs over.

    A product with a weight that is computed is none: the zeros that are looked for are those of the computed weight.
    """
    store, facts = groups.algebra.store, groups.facts
    with_computed = {
        node.name
        for node in groups.graph
        if not is_from_state(node) and any(is_from_state(n) and n.op != "get_attr" for n in node.all_input_nodes)
    }
    products = with_computed & facts.contractions.keys()
    rows = [store.resolve(a.units) for name, axes in facts.cross_channel.items() if name not in products for a in axes]
    mixing = np.unique(np.concatenate([np.zeros(0, np.int64), *(units[units != PAD] for units in rows)]))
    return {group.name for group in groups if np.isin(group.atoms, mixing).any()}


def _find_removable(groups: ChannelGroups, group: ChannelGroup, weights: Tensors) -> tuple[Bools, Bools]:
    """Units that no layer reads, and units all of whose own parameters are zero. Buffers may be read with as well."""
    is_parameter = {name: entry.kind == "parameter" for name, entry in groups.graph.state.items()}
    readers = [member for member in group.members if member.purposes & _READS]
    own = [member for member in group.members if not member.purposes & _NOT_OWN and is_parameter[member.name]]
    return _all_zero(readers, weights, group.width), _all_zero(own, weights, group.width)


def _all_zero(members: list[Member], weights: Tensors, width: int) -> Bools:
    """Units of which every weight of all members is zero; none if there is no member."""
    zero = np.full(width, bool(members))
    for member in members:
        lines = (by_position(member, weights[member.name]) != 0).any(1).double().cpu()
        zero &= unit_values(member, lines, width).numpy() == 0
    return zero


def _balance(group: ChannelGroup, ended: Bools) -> Bools:
    """The most units that can go of those that have ended: equally many in each block, the earlier ones first."""
    labels = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    counts = np.bincount(labels[ended], minlength=group.n_blocks)
    n_cut = min(int(counts.min()), group.max_cut // group.n_blocks)
    goes = np.zeros(group.width, bool)
    for block in range(group.n_blocks if n_cut else 0):
        goes[np.flatnonzero(ended & (labels == block))[:n_cut]] = True
    return goes


def _keeps_outputs(
    groups: ChannelGroups, state: _State, goes: Mapping[str, Bools], unread: Mapping[str, Bools]
) -> bool:
    """Return whether outputs stay the same when units are zeroed, and when those that no layer reads are random."""
    graph = groups.graph
    if graph.has_assumed_branches:
        return False
    zeroed, drawn = dict(state.weights), dict(state.weights)
    generator = torch.Generator().manual_seed(0)
    for name, units in goes.items():
        for member in groups[name].members:
            if graph.state[member.name].kind != "parameter" or member.purposes & _FACTORS:
                continue
            zeroed[member.name] = _replace_units(zeroed[member.name], member, units, None)
            if not member.purposes & _READS:
                drawn[member.name] = _replace_units(drawn[member.name], member, units & unread[name], generator)
    for leaves in _probe_inputs(graph):
        expected = _run(graph, state, state.weights, leaves)
        if not all(_are_equal(expected, _run(graph, state, other, leaves)) for other in (zeroed, drawn)):
            return False
    return True


def _replace_units(tensor: Tensor, member: Member, units: Bools, generator: torch.Generator | None) -> Tensor:
    """A weight with zeros, or with random numbers, at some units."""
    stays = mask_of_units(member, tuple(tensor.shape), torch.from_numpy(~units)).to(tensor.device)
    if generator is None:
        return torch.where(stays, tensor, 0)
    values = torch.randn(tensor.shape, generator=generator).to(tensor)
    return torch.where(stays, tensor, values)


def _probe_inputs(graph: Graph) -> Iterable[list[Any]]:
    """Flat inputs: the example, and random ones of its shapes; integers are the given ones in another order."""
    generator = torch.Generator().manual_seed(1)

    def redrawn(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        return value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)

    for number in range(1 + _N_PROBES):
        inputs = graph.inputs.map(redrawn) if number else graph.inputs.copy()
        yield pytree.tree_leaves((inputs.args, inputs.kwargs))


def _run(graph: Graph, state: _State, weights: Tensors, leaves: list[Any]) -> list[Any]:
    """Run the network with other weights than its own.

    In float64 where its operators take that: in float32 sums that zeros are added to differ by the order of summation,
    which kernels choose by the alignment of memory.
    """
    try:
        return _run_in_dtype(graph, state, weights, leaves, torch.float64)
    except (RuntimeError, TypeError):  # an operator that has no float64
        return _run_in_dtype(graph, state, weights, leaves, torch.float32)


def _run_in_dtype(graph: Graph, state: _State, weights: Tensors, leaves: list[Any], dtype: torch.dtype) -> list[Any]:
    """The outputs, computed in float64, or in another dtype as the network does."""
    devices = [tensor.device for tensor in weights.values() if tensor.is_cuda]
    stored = weights | {name: state.tensors[name] for name in state.computed.values()}

    def replaced(node: fx.Node, value: Any) -> Any:
        return weights[state.computed[node.name]] if node.name in state.computed else value

    with torch.no_grad(), torch.random.fork_rng(devices), compute_in(dtype):
        torch.manual_seed(0)  # what is drawn at random inside the model is drawn alike
        copied = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return output_leaves(graph_output(graph.fx_graph, stored, copied, replaced))


def _are_equal(left: list[Any], right: list[Any]) -> bool:
    """Return whether outputs are the same, NaN where the others are NaN."""
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            scale = float(one.abs().nan_to_num(0, 0).max()) if one.numel() else 0.0
            if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
                return False
        elif isinstance(one, Tensor) and not torch.equal(one, other):
            return False
    return True
