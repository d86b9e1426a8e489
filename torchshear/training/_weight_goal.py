"""Single weights as what a session asks for: by a pattern, within layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from torchshear._arguments import close_names
from torchshear.calibration import Statistics
from torchshear.calibration._statistics import Sum
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError
from torchshear.pruners.masks import Masks, choose_masks
from torchshear.pruners.masks._layers import find_maskable_layers
from torchshear.pruners.masks._scores import Score, find_scorer
from torchshear.pruners.schedules import Schedule
from torchshear.training._goals import Choice, Goal, Indices, least_at, ratio_at
from torchshear.training._masked_model import MaskedModel
from torchshear.training._progressive import Pace

_SCORES: Final[Mapping[str, Sum | None]] = {
    "l1": None,
    "magnitude": None,
    "taylor": "taylor",
    "snip": "saliency",
    "snip_momentum": "momentum",
    "gradient": "gradient",
}
"""Criterion -> the sum that is the score of a single weight; None for its magnitude."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightGoal(Goal):
    """Single weights, blocks, N of M or heads, by a pattern; see `torchshear.pruners.masks.choose_masks`.

    Attributes:
        groups: the channel groups of the model.
        pattern: the units.
        ratio: share of the weights that goes in the end.
        score: name of the criterion, or a function as `choose_masks` takes it.
        options: `layers`, `scope`, `min_ratio`, `max_ratio` and `reduce` of `choose_masks`.
        is_soft: whether weights may come back.
        stage: positions from one of the four stages to the next, in which blocks go; 0 where they go at once.
    """

    groups: ChannelGroups
    model: nn.Module
    pattern: str
    ratio: float
    score: Any
    options: Mapping[str, Any]
    is_soft: bool
    stage: int
    all_kept: Masks = field(init=False)

    def __post_init__(self) -> None:
        """Refuse a criterion that scores no single weights, and a pattern that fits nothing."""
        if isinstance(self.score, str) and self.score not in _SCORES:
            raise ArgumentError(
                f"criterion={self.score!r} scores channels, and pattern={self.pattern!r} asks for single weights; "
                f"expected one of {', '.join(_SCORES)}, or a function of a layer's name and weight."
                f"{close_names(self.score, _SCORES)}"
            )
        self._masks("magnitude", None, lambda final: final)
        object.__setattr__(self, "all_kept", self._masks("magnitude", None, lambda final: 0.0))

    @property
    def unit(self) -> str:
        """Weights."""
        return "weights"

    @property
    def target(self) -> float:
        """Share that goes in the end, over all layers."""
        layers = self.options.get("layers")
        return self.ratio if not isinstance(layers, Mapping) else max(layers.values())

    @property
    def needs(self) -> frozenset[Sum]:
        """The sum that scores are read off."""
        summed = _SCORES[self.score] if isinstance(self.score, str) else None
        return frozenset() if summed is None else frozenset({summed})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights of the layers, and of biases that go with them."""
        return tuple(self.all_kept.tensors)

    @property
    def shrinking(self) -> tuple[ChannelGroup, ...]:
        """No channel group."""
        return ()

    @property
    def singles(self) -> tuple[str, ...]:
        """All of the names."""
        return self.names

    @property
    def paces(self) -> Mapping[str, Pace]:
        """One for all weights, if blocks go little by little."""
        return dict.fromkeys(self.names, Pace("", self.stage)) if self.stage else {}

    def _masks(self, score: Score, previous: Masks | None, at: Callable[[float], float], **changed: Any) -> Masks:
        """Choose masks at the ratio that a final one has by now: that of each layer where they have their own."""
        options = dict(self.options) | changed
        if isinstance(options.get("layers"), Mapping):
            options["layers"] = {name: at(own) for name, own in options["layers"].items()}
        else:
            options["final_ratio"] = self.ratio
        groups = self.groups if self.pattern == "heads" else None
        ratio = at(self.ratio)
        return choose_masks(self.model, self.pattern, ratio, score=score, previous=previous, groups=groups, **options)

    def _scores(self, statistics: Statistics | None) -> Score:
        """Scores of single weights by layer, or how to get them."""
        if not isinstance(self.score, str):
            scorer: Score = self.score
            return scorer
        summed = _SCORES[self.score]
        if summed is None:
            return "magnitude"
        assert statistics is not None, "summed on the way"
        names = self.groups.graph.aliases
        found = find_maskable_layers(self.model).items()
        return {
            name: getattr(statistics.weights[names.get(layer.weight, layer.weight)], summed) for name, layer in found
        }

    def scores_of_weights(self, statistics: Statistics | None) -> dict[str, Tensor]:
        """Score of every single weight, by name of the parameter."""
        scorer = find_scorer(self._scores(statistics), list(find_maskable_layers(self.model).values()))
        found = {layer.weight: layer for layer in find_maskable_layers(self.model).values()}
        return {name: scorer(layer) for name, layer in found.items() if name in self.all_kept.tensors}

    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose by scores of the dense weights."""
        asked = ratio_at(share, position, self.ratio)
        if not asked:
            return self.restore({}, before.masks, 0.0)
        previous = Masks.of(before.masks) if before.masks else None

        def at(final: float) -> float:
            return least_at(share, position, final)

        return self._choice(self._masks(self._scores(statistics), previous, at), asked)

    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the heaviest units of the pattern; what is masked of a bias weighs with its row."""
        names, scores = self.groups.graph.aliases, dict(squares)
        for layer in find_maskable_layers(self.model).values():
            weight = squares.get(names.get(layer.weight, layer.weight))
            bias = None if layer.bias is None else squares.get(names.get(layer.bias, layer.bias))
            if weight is not None and bias is not None:
                grid = layer.view(weight)
                share = bias.to(weight.device).reshape(*grid.shape[:2], 1, 1) / (grid.shape[2] * grid.shape[3])
                weight = layer.unview(grid + share)
            if weight is not None:
                scores[layer.name] = weight
        masks = self._masks(scores, None, lambda final: final, reduce="sum")
        return {names.get(name, name): mask for name, mask in masks.tensors.items()}

    def restore(self, kept: Mapping[str, Indices], masks: Mapping[str, Tensor], asked: float) -> Choice:
        """Make a choice of masks."""
        return self._choice(Masks.of(masks), asked)

    def _choice(self, masks: Masks, asked: float) -> Choice:
        tensors = {name: masks.tensors.get(name, mask) for name, mask in self.all_kept.tensors.items()}
        weights = {name: mask for name, mask in tensors.items() if mask.ndim > 1}
        left = {name: int(mask.sum()) for name, mask in weights.items()}
        total = sum(mask.numel() for mask in weights.values())
        return Choice(tensors, {}, asked, 1 - sum(left.values()) / max(1, total), left, tensors)

    def plan(self, choice: Choice, said: Mapping[str, Any]) -> PruningPlan | None:
        """Nothing is known of what can be removed; its zeros say so."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return what is asked for as plain data."""
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", "custom")
        options = {name: repr(value) for name, value in self.options.items()}
        said = {"pattern": self.pattern, "ratio": self.ratio, "criterion": score, "soft": self.is_soft}
        return said | {"stage": self.stage, **options}
