"""A config list as what a session asks for: channels and single weights together, entry by entry."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import SUMS_OF_WEIGHTS, Sum
from torchshear.configs import ResolvedConfig, resolve
from torchshear.configs._entry import Entry
from torchshear.configs._planning import (
    Widths,
    describe_config,
    entry_score,
    find_sum,
    mask_entry,
    masked_layers,
    pool_requests,
)
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._purposes import OWN_PURPOSES
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError
from torchshear.pruners._planning import check_request, plan_units
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.masks import Masks, pattern_lock
from torchshear.pruners.masks._choose import NothingFitsError
from torchshear.pruners.masks._layers import find_maskable_layers
from torchshear.pruners.schedules import Schedule
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._widths import NothingToRemoveError
from torchshear.training._goals import Choice, Goal, Indices, least_at, ratio_at
from torchshear.training._masked_model import MaskedModel
from torchshear.training._progressive import Pace
from torchshear.training._training_config import LOCK, TrainingConfig


@dataclass(frozen=True, slots=True, eq=False)
class ConfigGoal(Goal):
    """Channels, and single weights, blocks or N of M, as a config list asks for them of each layer.

    What an entry asks of single weights is counted within its layers as they were, whatever of them goes with channels
    of other entries; a weight is gone if either takes it.

    Attributes:
        groups: the channel groups of the model.
        model: the model.
        config: the entries.
        criterion: criterion of entries that name none.
        widths: widths that groups may have.
        schedule: schedule of entries without one of their own.
        is_soft: whether what is gone may come back.
        resolved: what the entries ask of each layer and group.
        layers: label of an entry -> the layers of which it masks single weights.
        all_kept: weight of such a layer -> mask that keeps all.
        sizes: group or weight -> what it counts in shares: its units, or its weights where both are asked for.
        end: share that goes in the end.
    """

    groups: ChannelGroups
    model: nn.Module
    config: TrainingConfig
    criterion: str
    widths: Widths
    schedule: Schedule
    is_soft: bool
    resolved: ResolvedConfig = field(init=False)
    layers: Mapping[str, tuple[str, ...]] = field(init=False)
    all_kept: Mapping[str, Tensor] = field(init=False)
    sizes: Mapping[str, float] = field(init=False)
    end: float = field(init=False)

    def __post_init__(self) -> None:
        """Apply the entries to the model, and refuse what cannot be reached."""
        resolved = resolve(self.model, self.config.entries, self.groups, self.criterion)
        object.__setattr__(self, "resolved", resolved)
        all_kept, fitting = dict[str, Tensor](), dict[str, tuple[str, ...]]()
        nothing: NothingFitsError | None = None
        for label, names in masked_layers(self.model, resolved).items():
            try:
                masks = self._locked(label, names) if self._is_locked(label) else self._at_end(label, names)
            except NothingFitsError as error:
                nothing = error
                continue
            fitting[label] = tuple(names)
            all_kept |= {name: torch.ones_like(mask) for name, mask in masks.tensors.items()}
        if nothing is not None and not fitting and not resolved.ratios:
            raise nothing
        object.__setattr__(self, "layers", fitting)
        object.__setattr__(self, "all_kept", all_kept)
        object.__setattr__(self, "sizes", self._sizes())
        object.__setattr__(self, "end", self._asked(None, 0))
        for request, _ in self._requests(None, 0):
            check_request(self.groups, request)
        for entry in self._asking:
            schedule = self._schedule(entry)
            schedule.ratio(schedule.start, entry.ratio)  # refuses an initial ratio above it
            if self.is_soft and entry.pattern == LOCK:
                raise ArgumentError(f"{entry.label} keeps the zeros that there are; leave soft= away.")

    def _entry(self, label: str) -> Entry:
        return next(entry for entry in self.resolved.entries if entry.label == label)

    def _is_locked(self, label: str) -> bool:
        return self._entry(label).pattern == LOCK

    def _locked(self, label: str, layers: list[str] | tuple[str, ...]) -> Masks:
        """Masks of the zeros that layers have now."""
        masks = pattern_lock(self.model, layers)
        if not masks.sparsity:
            raise ArgumentError(f"{label} keeps the zeros of its layers, and they have none.")
        return masks

    def _at_end(self, label: str, layers: list[str]) -> Masks:
        """Masks at the final ratio by magnitude, to see that the pattern fits."""
        entry = self._entry(label)
        find_sum(entry)  # refuses a criterion of channels
        return mask_entry(self.model, entry, layers, entry.ratio, "magnitude")

    @property
    def _asking(self) -> Iterator[Entry]:
        """Entries that ask for something of this model."""
        asking = {target.entry.label for target in self.resolved.targets.values() if target.ratio} | self.layers.keys()
        return (entry for entry in self.resolved.entries if entry.label in asking)

    def _schedule(self, entry: Entry) -> Schedule:
        return self.config.schedules.get(entry.label, self.schedule)

    def _ratio(self, entry: Entry, share: Schedule | None, position: int) -> float:
        """Ratio of an entry at a position; the final one where `share` is None."""
        return ratio_at(None if share is None else self._schedule(entry), position, entry.ratio)

    def _at(self, entry: Entry, share: Schedule | None, position: int) -> Entry:
        """Return an entry with the shares that it asks for at a position."""
        schedule = None if share is None else self._schedule(entry)
        least = least_at(schedule, position, entry.min_ratio)
        return replace(entry, ratio=self._ratio(entry, share, position), min_ratio=least)

    def _sizes(self) -> dict[str, float]:
        """Size of each group and each weight by which shares are counted."""
        state, sizes = self.groups.graph.state, {name: float(mask.numel()) for name, mask in self.all_kept.items()}
        for group in self.shrinking:
            own = {m.name for m in group.members if m.purposes & OWN_PURPOSES and len(state[m.name].shape) > 1}
            weights = sum(float(np.prod(state[name].shape)) for name in own)
            sizes[group.name] = weights if self.all_kept and weights else float(group.width)
        return sizes

    @property
    def unit(self) -> str:
        """Channels or weights, by what is asked for; each in proportion to the weights of its layers if both are."""
        if not self.all_kept:
            return "channels"
        return "channels and weights" if self.shrinking else "weights"

    @property
    def target(self) -> float:
        """Share that goes in the end."""
        return self.end

    @property
    def needs(self) -> frozenset[Sum]:
        """Sums that the criteria of all entries read."""
        return self._needs(None, 0)

    def needs_at(self, share: Schedule, position: int) -> frozenset[Sum]:
        """Return the sums that entries read which ask for something at a position."""
        return self._needs(share, position)

    def _needs(self, share: Schedule | None, position: int) -> frozenset[Sum]:
        found: set[Sum] = set()
        for entry in self._asking:
            if entry.pattern == LOCK or not self._ratio(entry, share, position):
                continue
            if entry.label in self.layers:
                found |= set(filter(None, [find_sum(entry)]))
            else:
                found |= needs_of(entry.criterion or self.criterion)
        return frozenset(found)

    @property
    def shrinking(self) -> tuple[ChannelGroup, ...]:
        """The channel groups that may shrink."""
        ratios = self.resolved.ratios
        return tuple(group for group in self.groups.prunable if group.name in ratios)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in which units of the groups lie, and of the weights of layers."""
        state = self.groups.graph.state
        found = [member.name for group in self.shrinking for member in group.members]
        return tuple(dict.fromkeys([*(name for name in found if state[name].kind == "parameter"), *self.all_kept]))

    @property
    def singles(self) -> tuple[str, ...]:
        """Names of the weights of layers."""
        return tuple(self.all_kept)

    @property
    def paces(self) -> Mapping[str, Pace]:
        """Paces of the parameters of entries whose blocks or channels go little by little."""
        return {name: Pace(label, self.config.stages[label]) for name, label in self._paced().items()}

    @property
    def owners(self) -> dict[str, str]:
        """Name of a group, or canonical name of a weight -> label of the entry that takes it."""
        names, known = self.groups.graph.aliases, find_maskable_layers(self.model)
        found = {group.name: self.resolved.targets[group.name].entry.label for group in self.shrinking}
        for label, layers in self.layers.items():
            weights = (known[layer].weight for layer in layers)
            found |= {names.get(weight, weight): label for weight in weights}
        return found

    def _paced(self) -> dict[str, str]:
        """Canonical name of a parameter whose weights go little by little -> label of the entry that says so."""
        state, found = self.groups.graph.state, dict[str, str]()
        for name, label in self.owners.items():
            if label in self.config.stages:
                members = [name] if name in state else [member.name for member in self.groups[name].members]
                found |= {one: label for one in members if state[one].kind == "parameter"}
        return found

    def _requests(self, share: Schedule | None, position: int) -> list[tuple[Request, dict[str, float]]]:
        """Requests of the pools of channels at a position, each with the ratios of its groups."""
        targets = {
            name: replace(target, ratio=self._ratio(target.entry, share, position) if target.ratio else 0.0,
                          entry=self._at(target.entry, share, position))
            for name, target in self.resolved.targets.items()
        }  # fmt: skip
        resolved = replace(self.resolved, targets=targets)
        return pool_requests(self.groups, resolved, self.widths, self.config.group_reduction)

    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose by the criterion of each entry; units and weights that went before go first."""
        kept = dict(before.kept)
        weights = model.weights(is_masked=not self.is_soft)
        for request, ratios in self._requests(share, position):
            whole = {name: np.arange(self.groups[name].width) for name in ratios}
            gone = {name: np.setdiff1d(units, kept[name]) for name, units in whole.items()}
            gone = {name: units for name, units in gone.items() if units.size}
            try:
                found = plan_units(self.groups, request, weights, statistics, gone=gone).kept
            except NothingToRemoveError:
                continue
            kept |= {name: found.get(name, units) for name, units in whole.items()}
        singles = dict(before.singles)
        previous = None if self.is_soft else Masks.of(singles)
        for label, layers in self.layers.items():
            entry = self._entry(label)
            now = self._ratio(entry, share, position)
            if entry.pattern == LOCK and now:
                locked = pattern_lock(self.model, layers).tensors
                is_new = all(bool(singles[name].all()) for name in locked)
                singles |= locked if is_new else {}
            elif now:
                score = entry_score(entry, self.model, layers, statistics, self.groups.graph.aliases)
                singles |= mask_entry(self.model, entry, layers, now, score, previous).tensors
        return self._choice(kept, singles, self._asked(share, position, singles))

    def _asked(self, share: Schedule | None, position: int, singles: Mapping[str, Tensor] | None = None) -> float:
        """Share that is asked for at a position, by `sizes`; of locked zeros as many as there are."""
        total = 0.0
        for name, target in self.resolved.targets.items():
            if name in self.sizes and target.ratio:
                total += self.sizes[name] * self._ratio(target.entry, share, position)
        known = find_maskable_layers(self.model)
        for label, layers in self.layers.items():
            entry = self._entry(label)
            now = self._ratio(entry, share, position)
            for weight in {known[layer].weight for layer in layers} & self.sizes.keys():
                own = now
                if entry.pattern == LOCK and now:
                    zeros = pattern_lock(self.model, layers).tensors if singles is None else singles
                    own = 1 - float(zeros[weight].double().mean())
                total += self.sizes[weight] * own
        return total / max(1.0, sum(self.sizes.values()))

    def scores_of_weights(self, statistics: Statistics | None) -> dict[str, Tensor]:
        """Score of every single weight of entries that go little by little, by canonical name of the parameter."""
        state, found = self.groups.graph.state, dict[str, Tensor]()
        for name, label in self._paced().items():
            if len(state[name].shape) < 2:  # what has a bias or a scale less is as good as gone: these go last
                continue
            entry = self._entry(label)
            of_weights = needs_of(entry.criterion or self.criterion) & SUMS_OF_WEIGHTS
            summed = next(iter(sorted(of_weights)), None)
            if summed is None or statistics is None or name not in statistics.weights:
                found[name] = state[name].tensor.detach().abs()
            else:
                found[name] = getattr(statistics.weights[name], summed)
        return found

    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the heaviest units of each group and of each pattern, at the final ratios."""

        def given(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
            return squares[group.name]

        found = {name: torch.ones(one.shape, dtype=torch.bool) for name, one in squares.items()}
        for request, ratios in self._requests(None, 0):
            kept = plan_units(self.groups, replace(request, criterion=given)).kept
            for name in ratios.keys() & kept.keys() & found.keys():
                found[name] = torch.zeros(len(squares[name]), dtype=torch.bool)
                found[name][torch.from_numpy(np.array(kept[name]))] = True
        names, known = self.groups.graph.aliases, find_maskable_layers(self.model)
        for label, layers in self.layers.items():
            entry = replace(self._entry(label), reduce="sum")
            if entry.pattern == LOCK:
                masks = pattern_lock(self.model, layers)
            else:
                scores = {layer: squares[names.get(known[layer].weight, known[layer].weight)] for layer in layers}
                masks = mask_entry(self.model, entry, layers, entry.ratio, scores)
            found |= {names.get(name, name): mask for name, mask in masks.tensors.items()}
        return found

    def restore(self, kept: Mapping[str, Indices], masks: Mapping[str, Tensor], asked: float) -> Choice:
        """Make a choice of the units that stay, and of masks of single weights."""
        return self._choice(kept, {**self.all_kept, **masks}, asked)

    def _choice(self, kept: Mapping[str, Indices], singles: Mapping[str, Tensor], asked: float) -> Choice:
        whole = {group.name: np.arange(group.width) for group in self.shrinking}
        kept = {name: np.sort(np.asarray(kept.get(name, units), np.int64)) for name, units in whole.items()}
        masks = dict(make_plan(Cut(self.groups, kept), kept, {}, {}).masks()) if kept else {}
        names = self.groups.graph.aliases
        for alias, mask in singles.items():
            name = names.get(alias, alias)
            masks[name] = masks[name] & mask if name in masks else mask
        gone = {name: 1 - len(units) / len(whole[name]) for name, units in kept.items()}
        gone |= {name: 1 - float(mask.double().mean()) for name, mask in singles.items()}
        widths = {name: len(units) for name, units in kept.items()}
        widths |= {name: int(mask.sum()) for name, mask in singles.items()}
        reached = sum(size * gone[name] for name, size in self.sizes.items()) / max(1.0, sum(self.sizes.values()))
        return Choice(masks, kept, asked, reached, widths, dict(singles))

    def partly(self, toward: Choice, masks: Mapping[str, Tensor], before: Choice) -> Choice:
        """Make the choice on the way: what goes at once has gone, of the others the weights that lie masked."""
        targets, names = self.resolved.targets, self.groups.graph.aliases
        stages, owners = self.config.stages, self.owners
        kept = {
            name: before.kept[name] if targets[name].entry.label in stages else units
            for name, units in toward.kept.items()
        }
        singles = {
            name: mask | masks[names.get(name, name)] if owners[names.get(name, name)] in stages else mask
            for name, mask in toward.singles.items()
        }
        found = self._choice(kept, singles, toward.asked)
        return replace(found, masks=masks)

    def plan(self, choice: Choice, said: Mapping[str, Any]) -> PruningPlan | None:
        """Plan the removal of the channels that are gone; None where only single weights are asked for."""
        if not choice.kept:
            return None
        kept, notes = dict(choice.kept), {name: one.reason for name, one in self.resolved.targets.items() if one.reason}
        request = describe_config(self.resolved, self.widths) | dict(said)
        return make_plan(Cut(self.groups, kept), kept, request, notes, self.resolved.ratios)

    def describe(self) -> dict[str, Any]:
        """Return what is asked for as plain data."""
        config = self.config
        return {
            "config": [repr(entry) for entry in self.resolved.entries],
            "schedules": {label: repr(schedule) for label, schedule in config.schedules.items()},
            "stages": dict(config.stages),
            "alignment": self.widths.alignment.name,
            "min_width": self.widths.min_width,
            "soft": self.is_soft,
        }
