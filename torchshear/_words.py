"""The words of `plan` and `prune`: typed keywords, for what may shrink, how much goes where, and by which data."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torchshear._other_tools import unknown_keyword
from torchshear.calibration import Loss
from torchshear.configs import ConfigList
from torchshear.dependency.alignment import Alignment
from torchshear.pruners import Ratio


class Shares(TypedDict, total=False):
    """How units are ranked, and the limits of a group's share; see `Selection`."""

    scope: str
    min_ratio: Ratio
    max_ratio: Ratio | None
    combine: str
    normalize: str


class Selection(Shares, total=False):
    """How much goes where, as keywords of `plan` and `prune`.

    Attributes:
        scope: which units are ranked against one another. "local": those of a group, each of which loses its own ratio.
            "global": those of all groups, or of all that one key of `ratio` decides; scores that cannot be compared
            between groups are divided by their mean over the group. "isomorphic": those of groups with the same
            operators around them (arXiv:2407.04616).
        target_macs: multiply-accumulate operations that may be left, in place of a ratio: a share of the dense model's
            in (0, 1], or a number. The result is at most that, and as near as widths allow. Within a local scope all
            groups lose the same share, or shares in proportion to a mapping of ratios.
        target_params: parameters that may be left, likewise. With both, both hold.
        min_ratio: share that each group loses in any case, in [0, 1), or a mapping as for `ratio`.
        max_ratio: the largest share that a group may lose, likewise. Left away, 0.98 where groups are ranked together,
            and no limit else.
        combine: how scores of a group's members become one: "sum", the criterion's own formula over the whole group;
            "filters", the same over the weights of the layers that make the units, without scales of norms; or the
            "mean", "max", "normalized" (mean of each member's scores over their mean) or "geometric" mean of the
            scores of each layer, norm or table by itself. Criteria that score the group as a whole (activations, gates
            on all of its layers) give the same by "sum", "mean", "max" and "geometric".
        normalize: whether scores are divided by their mean over the group before groups are ranked together: "mean" or
            "none"; "auto" does where the criterion's scores mean nothing outside of their group.
    """

    target_macs: float | None
    target_params: float | None


class Subject(TypedDict, total=False):
    """What may shrink.

    Attributes:
        axes: roles that may shrink, see `torchshear.plan`.
        exclude: what stays whole, see `torchshear.plan`.
        prunable_outputs: names of outputs that may shrink, see `torchshear.analyze`; all others keep their shapes.
        submodules: names of modules to prune inside a model that cannot be captured whole, see `torchshear.trace`.
    """

    axes: str | Collection[str] | None
    exclude: str | Collection[str]
    prunable_outputs: str | Collection[str]
    submodules: Sequence[str] | None


class Sight(TypedDict, total=False):
    """Data that is looked at.

    Attributes:
        data: batches for criteria that look at activations or gradients and for `recalibrate`, see
            `torchshear.collect`.
        loss_fn: called as `loss_fn(output, target)`, for criteria that look at gradients.
        batches: how many batches to run, left away 32.
        recalibrate: whether batch norms get new statistics of the data after the cut, see `torchshear.recalibrate`.
    """

    data: Iterable[Any] | None
    loss_fn: Loss | None
    batches: int
    recalibrate: bool


class Choice(Selection, Subject, Sight, total=False):
    """What may shrink, how much goes where, and by which data, as keywords of `prune`.

    Attributes:
        config: a config list of NNI or Neural Compressor, or the path of a file of one, in place of a ratio and of all
            words that say what may shrink and how much goes where; see docs/config-lists.md.
        form: what the result is. "native": a copy of the model's own class; where only whole groups give that, they
            stay whole at any cost. "traced": the rewritten graphs. "auto", the default: native where leaving groups
            whole costs at most a tenth of what the cut saves, in parameters and MACs; else traced.
    """

    config: ConfigList | None
    form: Literal["auto", "native", "traced"]


class Comparing(Shares, Subject, Sight, total=False):
    """Keywords of `torchshear.comparison.compare`.

    Attributes:
        target_macs: what may be left of the multiply-accumulate operations, as in `Selection`; one or several.
        target_params: what may be left of the parameters, likewise.
        ratio: share of each group's units to remove, one or several.
        align: see `torchshear.plan`.
        min_width: the fewest units to keep in a group.
    """

    target_macs: float | Sequence[float] | None
    target_params: float | Sequence[float] | None
    ratio: float | Sequence[float] | None
    align: int | str | Alignment | None
    min_width: int


def check_keywords(function: str, given: Mapping[str, object], known: type, own: str) -> None:
    """Raise KeywordError for keywords that do not exist: they would do nothing in silence."""
    for name in given:
        if name not in known.__annotations__:
            raise unknown_keyword(function, name, f"{own}, {', '.join(known.__annotations__)}")
