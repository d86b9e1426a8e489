"""Choosing masks: layers, a pattern and a share become a mask for each weight."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from torch import Tensor, nn

from torchshear._arguments import check_kind, check_one_of, check_share, close_names, parse_names
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners.masks._candidates import Candidate, layer_candidate
from torchshear.pruners.masks._heads import head_candidate, head_groups, is_default, weights_of_heads
from torchshear.pruners.masks._layers import MaskableLayer, find_maskable_layers
from torchshear.pruners.masks._masks import LayerReport, Masks
from torchshear.pruners.masks._parametrization import parameter_shapes
from torchshear.pruners.masks._patterns import HEADS, Reduce, parse_pattern
from torchshear.pruners.masks._scores import Score, find_scorer
from torchshear.pruners.masks._selection import count_of, keep_highest

Scope = Literal["local", "global"]
Layers = Collection[str] | Mapping[str, float] | None

_REDUCTIONS: Final = ("mean", "sum", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Shares of the weights to mask.

    Attributes:
        ratio: fraction of the weights to mask, where a layer has none of its own.
        scope: whether layers are ranked against one another.
        least: fraction that each layer loses at least in the end.
        most: fraction that each layer loses at most.
        final: fraction that will be masked in the end, for a share that grows; None if this is the end.
    """

    ratio: float
    scope: Scope
    min_ratio: float
    max_ratio: float
    final: float | None

    def __post_init__(self) -> None:
        """Refuse shares that contradict one another."""
        check_share("ratio", self.ratio)
        check_share("min_ratio", self.min_ratio)
        check_share("max_ratio", self.max_ratio)
        check_one_of("scope", self.scope, ("local", "global"))
        if self.min_ratio > self.max_ratio:
            raise ArgumentError(
                f"min_ratio={self.min_ratio} is above max_ratio={self.max_ratio}; expected at most that."
            )
        if self.final is not None:
            check_share("final_ratio", self.final)
            if self.final < self.ratio:
                raise ArgumentError(f"final_ratio={self.final} is below ratio={self.ratio}; expected at least that.")

    def check(self, ratios: Collection[float]) -> None:
        """Refuse a minimum that the layers' own ratios do not reach."""
        end = min(ratios) if self.final is None else self.final
        if self.min_ratio > end:
            raise ArgumentError(
                f"min_ratio={self.min_ratio} is above the ratio {end} of a layer, or of all; lower it, or raise the "
                f"ratio."
            )


class NothingFitsError(MaskError):
    """A pattern fits none of the layers, of which it holds the reports."""

    def __init__(self, message: str, layers: tuple[LayerReport, ...]) -> None:
        super().__init__(message)
        self.layers = layers


def choose_masks(  # noqa: PLR0913 - keywords, each a choice of its own
    model: nn.Module,
    pattern: str = "1x1",
    ratio: float = 0.5,
    *,
    layers: Layers = None,
    scope: Scope = "local",
    min_ratio: float = 0.0,
    max_ratio: float = 0.98,
    final_ratio: float | None = None,
    score: Score = "magnitude",
    reduce: Reduce = "mean",
    previous: Masks | None = None,
    groups: ChannelGroups | None = None,
) -> Masks:
    """Choose which weights to mask. The model is not changed; see `apply`.

    The defaults are the level pruner: in each layer the floor(n * ratio + 1e-9) weights of least magnitude go, exactly
    as many, and of equal ones the later first. Weights are seen as (outputs, taps, inputs), whatever the layer. Units:

    - "NxM": blocks of N consecutive outputs and M consecutive inputs at one tap. "1x1": single weights.
    - "N:M": exactly N **pruned** of M consecutive inputs at one tap, Neural Compressor's meaning; the literature counts
      those kept. They agree on "2:4". A group is switched to the pattern or left dense, floor(groups * ratio * M / N)
      are switched.
    - "channelx1": all weights that read one input channel, at all taps. In a grouped convolution the channel's group.
    - "1xchannel": a whole filter or row, with its bias.
    - "heads": rows of an attention head in its projections, with their biases, and the columns that read it.

    Args:
        model: the model; masks may lie on it, scores are of the dense weights below.
        pattern: the units.
        ratio: fraction of the weights to mask, in [0, 1), for "N:M" at most N / M.
        layers: names of layers, or a mapping from them to a ratio each; None for all but tables of embeddings. For
            "heads" names of channel groups; None for all but query heads that share keys and values.
        scope: "local" takes the ratio from each layer; "global" ranks the units of all layers in one row.
        min_ratio: fraction that each layer loses at least. In a global choice a budget that is reserved: the layer has
            lost it once `final_ratio` is reached, and may have lost less before.
        max_ratio: fraction that each layer loses at most.
        final_ratio: what the ratio will be in the end, where it grows from call to call; None if this is the end.
        score: of each weight, the lowest go: "magnitude" |W|, "gradient" |dL/dW|, "snip" |W dL/dW| (Lee et al.,
            ICLR 2019, arXiv:1810.02340) of the gradients that lie at the weights; a mapping from layers to tensors of
            the weight's shape; or a function of a layer's name and its dense weight.
        reduce: how the scores of a unit's weights become one: "mean", "sum" or "max".
        previous: masks that were chosen before; what they mask stays masked and counts as such.
        groups: channel groups of the model, for "heads".

    Returns:
        The masks, with a report of every layer: those that the pattern does not fit are skipped and say why.

    Raises:
        ArgumentError: an argument is none of those above, a layer is not in the model, or no layer has a gradient.
        WeightError: weights or scores are NaN, infinite, of another shape, or on the meta device.
        MaskError: no layer can be masked, or `previous` is of another model.
    """
    share = _Share(ratio=ratio, scope=scope, min_ratio=min_ratio, max_ratio=max_ratio, final=final_ratio)
    if final_ratio is not None and isinstance(layers, Mapping):
        raise ArgumentError("final_ratio goes with one ratio for all layers; layers give a ratio each here.")
    check_one_of("reduce", reduce, _REDUCTIONS)
    if groups is not None:
        check_kind("groups", groups, ChannelGroups, "what torchshear.analyze gives, or None")
    check_kind("pattern", pattern, str, "'NxM', 'N:M', 'channelx1', '1xchannel' or 'heads'")
    if pattern == HEADS:
        found, ratios = _head_candidates(model, layers, ratio, score, reduce, previous, groups)
    else:
        found, ratios = _layer_candidates(model, pattern, layers, ratio, score, reduce, previous)
    share.check(ratios)
    return _build_masks(found, ratios, share, pattern)


def _layer_candidates(
    model: nn.Module, text: str, names: Layers, ratio: float, score: Score, reduce: Reduce, previous: Masks | None
) -> tuple[list[Candidate | LayerReport], list[float]]:
    pattern, known = parse_pattern(text), find_maskable_layers(model)
    ratios = _ratios(names, ratio, known, [name for name, one in known.items() if one.form.kind != "embedding"])
    chosen: dict[int, tuple[str, float]] = {}
    for name, own in ratios.items():
        first, other = chosen.setdefault(id(known[name]), (name, own))
        if other != own:
            raise ArgumentError(f"{first!r} and {name!r} share one weight and are given two ratios, {other} and {own}.")
        if own > pattern.largest + 1e-9:
            raise ArgumentError(
                f"ratio={own} with pattern {text!r}, which masks {pattern.largest:.4g} of the weights at most; ask for "
                f"no more."
            )
    masked: list[MaskableLayer] = [known[name] for name, _ in chosen.values()]
    for layer in masked:
        layer.require_values()
    _check_previous(previous, model)
    scorer = find_scorer(score, masked)
    found = [layer_candidate(layer, pattern, scorer, reduce, previous) for layer in masked]
    return found, [own for _, own in chosen.values()]


def _head_candidates(
    model: nn.Module,
    names: Layers,
    ratio: float,
    score: Score,
    reduce: Reduce,
    previous: Masks | None,
    groups: ChannelGroups | None,
) -> tuple[list[Candidate | LayerReport], list[float]]:
    known = head_groups(groups)
    assert groups is not None, "head_groups takes no other"
    ratios = _ratios(names, ratio, known, [name for name, group in known.items() if is_default(group)])
    chosen: list[ChannelGroup] = [known[name] for name in ratios]
    weights = weights_of_heads(model, groups, chosen)
    _check_previous(previous, model)
    scorer = find_scorer(score, list(weights.values()))
    found = [head_candidate(groups, group, weights, scorer, reduce, previous) for group in chosen]
    return found, list(ratios.values())


def _ratios(names: Layers, ratio: float, known: Collection[str], default: list[str]) -> dict[str, float]:
    """Ratio of each layer that is to be masked, in the order of the model.

    Raises:
        ArgumentError: a name is not known, or a ratio is out of range.
        MaskError: there are no layers.
    """
    given = dict.fromkeys(default, ratio) if names is None else names
    if not isinstance(given, Mapping):
        given = dict.fromkeys(parse_names("layers", given), ratio)
    for name, own in given.items():
        if name not in known:
            listed = ", ".join([*list(known)[:6], *(["..."] if len(known) > 6 else [])])
            raise ArgumentError(
                f"layer {name!r} is not one that can be masked in this model; it has {listed or 'none'}."
                f"{close_names(str(name), known)}"
            )
        check_share(f"ratio of layer {name!r}", own)
    if not given:
        raise MaskError("no layer to mask: the model holds none of a registered type, or none was named.")
    return {name: float(given[name]) for name in known if name in given}


def _check_previous(previous: object, model: nn.Module) -> None:
    """Refuse masks of another model.

    Raises:
        ArgumentError: they are no masks.
        MaskError: a name or shape is not that of a parameter.
    """
    if previous is None:
        return
    if not isinstance(previous, Masks):
        raise ArgumentError(f"previous is {type(previous).__name__}; expected the Masks of an earlier choice, or None.")
    shapes = parameter_shapes(model)
    for name, mask in previous.tensors.items():
        if shapes.get(name) != tuple(mask.shape):
            what = f"which has shape {shapes[name]}" if name in shapes else "which is no parameter of this model"
            raise MaskError(
                f"the previous masks hold one of shape {tuple(mask.shape)} for {name!r}, {what}: they are of another "
                f"model.{close_names(name, shapes) if name not in shapes else ''}"
            )


def _build_masks(found: list[Candidate | LayerReport], ratios: list[float], share: _Share, pattern: str) -> Masks:
    """Rank the units, and put masks and reports together."""
    items = [(one, own) for one, own in zip(found, ratios, strict=True) if isinstance(one, Candidate)]
    if not items:
        skipped = tuple(
            replace(one, requested=own) for one, own in zip(found, ratios, strict=True) if isinstance(one, LayerReport)
        )
        raise NothingFitsError(
            f"pattern {pattern!r} fits none of {len(found)} layers: {skipped[0].name!r} was {skipped[0].note}.", skipped
        )
    limits = [min(len(one.scores), count_of(one.n_all, share.max_ratio)) for one, _ in items]
    kept = iter(zip(_keep_units(items, share, limits), limits, strict=True))
    tensors: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for one, own in zip(found, ratios, strict=True):
        if isinstance(one, LayerReport):
            reports.append(replace(one, requested=own))
            continue
        units, limit = next(kept)
        report, masks = one.choice(units, own, limit)
        reports.append(report)
        for name, mask in masks.items():
            tensors[name] = tensors[name] & mask if name in tensors else mask
    return Masks.of(tensors, tuple(reports), pattern)


def _keep_units(items: list[tuple[Candidate, float]], share: _Share, limits: list[int]) -> list[Tensor]:
    """Units that stay, for each candidate."""
    if share.scope == "local":
        counts = [count_of(one.n_all, own) for one, own in items]
        return [
            keep_highest([one.scores], count, count, [0], [limit])[0]
            for (one, _), count, limit in zip(items, counts, limits, strict=True)
        ]
    now = count_of(sum(one.n_all * own for one, own in items), 1.0)
    final = now if share.final is None else count_of(sum(one.n_all for one, _ in items), share.final)
    min_ratio = [count_of(one.n_all, share.min_ratio) for one, _ in items]
    return keep_highest([one.scores for one, _ in items], now, final, min_ratio, limits)


def pattern_lock(model: nn.Module, layers: Collection[str] | None = None) -> Masks:
    """Masks of the zeros that weights have now, to train on without losing them: mask = (W != 0), element by element.

    The pattern of the zeros makes no difference, so that a 2:4 model stays one.

    Args:
        model: a model with zeros in its weights, or with masks on them.
        layers: names of layers; None for all but tables of embeddings.

    Returns:
        The masks of these layers.

    Raises:
        ArgumentError: a layer is not in the model.
        WeightError: a weight is on the meta device.
        MaskError: there are no layers.
    """
    known = find_maskable_layers(model)
    names = _ratios(layers, 0.0, known, [name for name, one in known.items() if one.form.kind != "embedding"])
    tensors, reports = {}, []
    for layer in {id(known[name]): known[name] for name in names}.values():
        layer.require_values()
        module, _, attribute = layer.weight.rpartition(".")
        mask = (getattr(model.get_submodule(module), attribute).detach() != 0).cpu()
        tensors[layer.weight] = mask
        n_zeros = int((~mask).sum())
        share = n_zeros / max(1, mask.numel())
        shape = tuple(mask.shape)
        reports.append(LayerReport(layer.name, layer.form.kind, shape, "1x1", mask.numel(), n_zeros, share, share))
    return Masks.of(tensors, tuple(reports), "1x1")
