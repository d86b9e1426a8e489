"""Rise of the loss that is left after the best refit of the layers that read a group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchshear._arguments import check_kind
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._group_readers import Layer, Reader, WideReader, are_seen, find_layers
from torchshear.pruners.criteria._statistic_sums import with_needs

_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)  # of the units, at which that is taken
_POOL, _POOL_SHARE = 32, 8  # units that are looked at together: at least so many, and one of so many
_TIE = 1e-9  # units that cost the same stay in the order in which they went


@criterion("reconstruction", needs=("grams", "output_gradients"), comparable=True, whole=True, per_cost=True)
def reconstruction_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how much its removal raises the loss after all that reads the group is refitted; shape (C,).

    Units go one after another, each time the one with the least

        s_c = sum over readers of  tr((H_cc)^-1 B_cc) / tr(B_0 S),    H = (S + lambda I)^-1,    B = W^T W

    S being the covariance of the reader's inputs and W its weight. That is the error of its output, relative to its
    variance, after the best refit by the inputs that are left; H and B are updated after each removal. Kernels count
    tap by tap, as if what lies under different taps was independent, and so do the inputs of a layer that has more than
    4,608.

    Scores are then what the loss rises by, to second order: the error e of each output on a quarter of the samples,
    which the refit does not see, gives the sum over outputs of f e / 2. f is the squared gradient of the loss by that
    output, summed over positions and averaged over samples, which stands for the curvature (Fisher information). This
    is taken at ten widths of the group, and spread evenly over the units between two of them. Ranked together under a
    budget, groups give way by score for each operation or parameter. Without gradients, as of a model that gives
    integers, errors count relative to the variance of the reader's output.

    Low scores go first: units that others can stand in for. Needs activations: statistics of
    `torchshear.collect(graph, loader, criteria="reconstruction")`, which takes gradients as well, without a `loss_fn`
    those of `loss_fn="dense"`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no layer reads the units of the group whose inputs were seen, are few enough and vary.
        WeightError: a weight is missing, without values, or not finite.

    Reference: optimal brain surgeon on structures, Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580, and Kurtic et
    al., NeurIPS 2023, arXiv:2302.04089; here over all readers of a group at once, weighed by Fisher information as in
    Theis et al., arXiv:1801.05787, and measured on other samples than those of the fit.
    """
    order, added = _remove_all(group, weights, with_needs(statistics, "reconstruction"))
    scores = torch.zeros(group.width, dtype=torch.float64)
    ranks = torch.arange(group.width, dtype=torch.float64)
    scores[order] = added.cummax(0).values * (1 + _TIE * ranks)
    return scores


def reconstruction_errors(groups: ChannelGroups, statistics: Statistics) -> dict[str, Tensor]:
    """Return the rise of the loss at every width of every group, after the best refit of the layers that read it.

    Args:
        groups: the analysed network, with its weights.
        statistics: what `torchshear.collect(graph, loader, criteria="reconstruction")` gave.

    Returns:
        Name of a group -> rise with 0, 1, ... units removed, shape (C + 1,), float64, estimated on samples held out as
        the criterion `reconstruction` does. Groups that no layer reads whose inputs were seen are left out.

    Raises:
        ArgumentError: the statistics are of another network, or were collected for other criteria.
        WeightError: a weight is on the meta device, or not finite.
    """
    check_kind("groups", groups, ChannelGroups, "what torchshear.analyze gives")
    check_kind("statistics", statistics, Statistics, "what torchshear.collect gives")
    if statistics.fingerprint != groups.graph.fingerprint:
        raise ArgumentError(
            "the statistics are of another network than the groups; collect them on the graph that was analysed."
        )
    found: dict[str, Tensor] = {}
    weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
    for group in groups.prunable:
        try:
            _, added = _remove_all(group, weights, with_needs(statistics, "reconstruction"))
        except UnscorableError:
            continue
        found[group.name] = torch.cat([added.new_zeros(1), added.cumsum(0)])
    return found


def _remove_all(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Remove all units greedily.

    Those with the least costs go one after another while they cost no more than any other did, which needs their own
    part of the matrices alone. All others follow then, and the next ones are taken.

    Returns:
        The units in the order in which they went, shape (C,), and the error that each added, shape (C,).
    """
    layers = list(find_layers(group, weights, statistics))
    if not layers or not are_seen(group, weights, statistics):
        raise UnscorableError("reconstruction: no layer reads its units, of whose inputs some vary over the data")
    readers = [Reader.of(layer) if isinstance(layer, Layer) else layer for layer in layers]
    order: list[Tensor] = []
    added: list[Tensor] = []
    is_gone = torch.zeros(group.width, dtype=torch.bool)
    while not bool(is_gone.all()):
        costs = torch.stack([reader.costs() for reader in readers]).sum(0).masked_fill(is_gone, torch.inf)
        n_left = int((~is_gone).sum())
        ranked = costs.argsort(stable=True)[:n_left]
        pool, others = ranked.tensor_split((max(_POOL, n_left // _POOL_SHARE),))
        limit = costs[others[0]] if len(others) else torch.tensor(torch.inf)
        parts = [reader.restricted(pool) for reader in readers]
        is_taken = torch.zeros(len(pool), dtype=torch.bool)
        while not bool(is_taken.all()):
            own = torch.stack([part.costs() for part in parts]).sum(0).masked_fill(is_taken, torch.inf)
            place = own.argmin()
            if bool(is_taken.any()) and own[place] > limit:
                break
            is_taken[place] = True
            order.append(pool[place])
            added.append(own[place].clamp_min(0))
            for part in parts:
                part.remove(place.reshape(1))
        is_gone[pool[is_taken]] = True
        for reader in readers:
            reader.remove(pool[is_taken])
    return _held_out_errors(layers, torch.stack(order), torch.stack(added))


def _held_out_errors(layers: list["Layer | WideReader"], order: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the errors that each unit added by those on samples held out, taken at some widths.

    The error of the fit itself says nothing where there are fewer samples than inputs: it is zero there.
    """
    if any(isinstance(layer, Layer) and layer.apart is None for layer in layers):
        return order, added
    width = len(order)
    counts = sorted({max(1, round(width * share)) for share in _SHARES})
    errors = [
        sum(
            (
                layer.error_without(order[:count]) if isinstance(layer, Layer) else layer.losses[order[:count]].sum()
                for layer in layers
            ),
            order.new_zeros((), dtype=torch.float64),
        )
        for count in counts
    ]
    rises = torch.stack(errors).cummax(0).values.diff(prepend=order.new_zeros(1, dtype=torch.float64))
    sizes = torch.tensor(counts).diff(prepend=torch.zeros(1, dtype=torch.int64))
    return order, (rises / sizes).repeat_interleave(sizes)
