"""Base of all pruner classes: reads a config list, masks a copy of the model, shrinks it, and writes files."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag
from torchshear._making import PruneResult, shrink_planned
from torchshear._other_tools import missing_method, unknown_keyword
from torchshear.calibration import Statistics
from torchshear.calibration._batches import check_batches
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS
from torchshear.compat.nni._dependency_aware import LayerMask
from torchshear.compat.nni._dependency_aware_config import plan_coupled
from torchshear.compat.nni._exporting import write_files
from torchshear.configs import ConfigList, ResolvedConfig, load_config, parse_config, resolve
from torchshear.configs._entry import Entry
from torchshear.configs._planning import Widths, mask_weights, plan_config
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.groups._weights import computed_weights
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, MaskError
from torchshear.graph._nodes import compute_from_state
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.pruners._collecting import collect
from torchshear.pruners.criteria._criterion import declared_needs, needs_of
from torchshear.pruners.masks import Masks, apply, make_permanent, plan_from_masks
from torchshear.speedup.latency._alignment_profiles import resolve_alignment

Loss = Callable[[Any, Any], Tensor]

_ARGUMENTS = "model, config_list, args, kwargs, dependency_aware, data, loss_fn, batches, align, min_width"


class Pruner:
    """Prunes a model as a config list says; the classes of this package are made from it and only name a criterion.

    Nothing is changed of the model that is given. `compress` gives a copy of it on which masks lie, to be looked at or
    trained on; `shrink` makes that copy smaller for real. Channels are masked in every layer that they run through, so
    the masked copy computes what the shrunk model computes (where a norm runs over cut channels, what the network on
    fewer channels computes, which is another function than the masked one).

    Args:
        model: the model.
        config_list: entries in the words of NNI or Neural Compressor, or the path of a YAML or JSON file of them.
        args: example positional arguments, for the model to be traced. Without any only single weights can be masked.
        kwargs: example keyword arguments.
        dependency_aware: coupled layers always lose the same channels for good, chosen by the sum of their scores, as
            many as all of them are asked to lose. With True, what a layer is asked beyond that is masked in it alone,
            as NNI does; it brings no speed. With False it stays, and `resolved` says how much it is.
        data: batches for criteria that look at activations or gradients, see `torchshear.collect`.
        loss_fn: called as `loss_fn(output, target)`, for criteria that look at gradients; "dense" takes the dense
            model's own outputs as targets.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        align: what kept widths are a multiple of, or a profile, see `torchshear.plan`; None: any width.
        min_width: the fewest channels to keep in a group.
        **unknown: none; words of other tools are answered with what to use instead.

    Attributes:
        criterion: the criterion of all entries; None where the config names it.
        pattern: what a unit is, where the config does not say.
        is_global: whether layers of entries without a pool are ranked together.
        group_reduction: how scores of a channel in several layers become one, see `torchshear.plan`.

    Raises:
        ArgumentError: the config is wrong or does not fit the model, see `torchshear.configs.resolve`; data or a loss
            is missing; the config names a criterion and the class another; a keyword does not exist.
        CaptureError: the model cannot be traced.
    """

    criterion: ClassVar[str | None] = None
    pattern: ClassVar[str] = "out_channel"
    is_global: ClassVar[bool] = False
    group_reduction: ClassVar[str] = "filters"

    def __init__(  # noqa: PLR0913 - keywords, each a choice of its own
        self,
        model: nn.Module,
        config_list: ConfigList,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dependency_aware: bool = False,
        *,
        data: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        batches: int | None = None,
        align: int | str | Alignment | None = None,
        min_width: int = 1,
        **unknown: object,
    ) -> None:
        for name in unknown:
            raise unknown_keyword(type(self).__name__, name, _ARGUMENTS)
        check_module(model)
        check_flag("dependency_aware", dependency_aware)
        check_batches(batches)
        check_count("min_width", min_width)
        if not isinstance(args, tuple | list | Tensor) or not isinstance(kwargs, Mapping | None):
            raise ArgumentError(
                f"args is {type(args).__name__} and kwargs {type(kwargs).__name__}; expected a tuple of example "
                f"inputs, and a mapping or None."
            )
        self._model = model
        self._args = (args,) if isinstance(args, Tensor) else tuple(args)
        self._kwargs = dict(kwargs or {})
        self._data, self._loss_fn, self._batches = data, loss_fn, batches
        self._dependency_aware = dependency_aware
        alignment = resolve_alignment(align)
        if dependency_aware and (alignment.block != 1 or min_width != 1):
            raise ArgumentError(
                "dependency_aware=True takes the widths that ratios give; leave align and min_width away."
            )
        self._widths = Widths(alignment, min_width)
        entries = self._entries(config_list)
        self._criteria_on_data = self._check_data(entries)
        self._groups: ChannelGroups | None = None
        if self._args or self._kwargs:
            self._groups = analyze(trace(model, self._args, self._kwargs))
        self._resolved = resolve(model, entries, self._groups, self.criterion, self.pattern)
        self._plan: PruningPlan | None = None
        self._masks: Masks | None = None
        self._layer_masks: tuple[LayerMask, ...] = ()
        self._masked: nn.Module | None = None
        self._prepare: Callable[[], None] | None = None  # trains the model, on which masks are then laid itself

    def _entries(self, config_list: ConfigList) -> tuple[Entry, ...]:
        config = load_config(config_list) if isinstance(config_list, str | os.PathLike) else config_list
        entries = parse_config(config)
        for entry in entries:
            if entry.criterion is not None and self.criterion is not None:
                raise ArgumentError(
                    f"{entry.label} says a criterion of its own ({entry.criterion}), as entries of Neural Compressor "
                    f"always do, and {type(self).__name__} goes by {self.criterion}. Use ConfigPruner."
                )
            if entry.criterion is None and self.criterion is None and not entry.excludes:
                raise ArgumentError(
                    f"{entry.label} says no criterion, and {type(self).__name__} has none of its own. Use a class that "
                    f"has, as L1FilterPruner."
                )
        return tuple(rank_with_all(entry) for entry in entries) if self.is_global else entries

    def _check_data(self, entries: Iterable[Entry]) -> list[str]:
        """The criteria that look at data, which is there."""
        criteria = {entry.criterion or self.criterion or "" for entry in entries if not entry.excludes} - {""}
        needs = {name: declared_needs(name) for name in sorted(criteria)}
        on_gradients = [name for name, sums in needs.items() if sums & SUMS_OF_GRADIENTS]
        on_data = on_gradients or [name for name, sums in needs.items() if sums]
        if on_data and self._data is None:
            raise ArgumentError(f"the criterion {on_data[0]!r} looks at data; give batches of it as data=.")
        if on_gradients and self._loss_fn is None:
            raise ArgumentError(f"the criterion {on_gradients[0]!r} looks at gradients; give a loss as loss_fn=.")
        looking = [name for name in needs if needs_of(name)]
        if self._data is not None and not looking:
            raise ArgumentError(f"data is given, and no criterion looks at it ({', '.join(needs)}). Leave data= away.")
        if on_data and not (self._args or self._kwargs):
            raise ArgumentError(f"the criterion {on_data[0]!r} needs the traced model; give example inputs as args=.")
        return looking

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Say of methods of other tools what to use instead."""
            raise missing_method(type(self).__name__, name)

    @property
    def resolved(self) -> ResolvedConfig:
        """The config as it applies to each layer and channel group; `str()` of it is a table."""
        return self._resolved

    @property
    def table(self) -> str:
        """The resolved config as a table."""
        return str(self._resolved)

    @property
    def plan(self) -> PruningPlan:
        """The plan of all channel groups; made by the first call of `compress`.

        Raises:
            ArgumentError: there are no example inputs, so that channel groups are not known.
        """
        self._choose()
        if self._plan is None:
            raise ArgumentError(
                f"{type(self).__name__} was made without example inputs, and what goes with a channel is not known "
                f"without them; give args=."
            )
        return self._plan

    @property
    def masks(self) -> Masks:
        """The masks of all parameters, of channels and of single weights."""
        self._choose()
        assert self._masks is not None, "a config that asks for nothing is refused"
        return self._masks

    @property
    def layer_masks(self) -> tuple[LayerMask, ...]:
        """With `dependency_aware`: what goes of each layer in common, what is only masked, and what that costs."""
        self._choose()
        return self._layer_masks

    @outside_inference_mode()
    def compress(self) -> nn.Module:
        """Mask a copy of the model.

        Units are chosen in the first call, by the weights that the model has then; later calls give the same object.

        Returns:
            The copy. Its masks are parametrizations, so it can be trained, and `shrink` takes the weights that it has.

        Raises:
            ArgumentError: nothing can go at these ratios, or a criterion has nothing to say of any layer.
            DataError: data or loss does not fit.
            WeightError: weights are NaN, infinite, or on the meta device.
            MaskError: a mask cannot be laid on the model.
        """
        if self._masked is None:
            masks = self.masks
            masked = copy_model(self._model) if self._prepare is None else self._model
            apply(masked, masks)
            self._masked = masked
        return self._masked

    @outside_inference_mode()
    def shrink(self) -> PruneResult:
        """Make the masked copy smaller for real, and prove the result.

        Channels that the config asks for go, with all weights that read them. Of masks of single weights goes what they
        leave without effect; other zeros stay zeros.

        Returns:
            As `torchshear.prune`: the model, the plan, a report, and how closely it agrees with the masked copy.

        Raises:
            ArgumentError: there are no example inputs.
            VerificationError: the shrunk model is not equal to the masked one; nothing is returned then.
        """
        plan = self.plan
        return shrink_planned(self._dense_copy(), plan, self._args, self._kwargs)

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write weights, masks and the shrunk model.

        Args:
            model_path: for the `state_dict` of the whole model with zeros where it is masked: of safetensors if the
                name ends so, else as `torch.save` writes plain tensors, for `torch.load(..., weights_only=True)`.
            mask_path: for the masks, in safetensors; `torchshear.pruners.masks.Masks.load` reads them.
            onnx_path: for the shrunk model as ONNX, run in onnxruntime and compared.

        Raises:
            ArgumentError: there are no example inputs for ONNX.
            ExportError: the model cannot be written as ONNX, or the file computes something else.
            OutputError: a file cannot be written; what was there before is unchanged.
        """
        write_files(
            (model_path, mask_path, onnx_path),
            lambda: self._dense_copy().state_dict(),
            lambda: self.masks,
            lambda: self.shrink().model,
            lambda: (self._args, self._kwargs),
        )

    def _dense_copy(self) -> nn.Module:
        """A copy of the model with the weights that the masked copy has now, zeros where they are masked."""
        masked, dense = self.compress(), copy_model(self._model)
        if masked is self._model:
            make_permanent(dense)
            return dense
        with torch.no_grad():
            for name, tensor in (*dense.named_parameters(), *dense.named_buffers()):
                path, _, attribute = name.rpartition(".")
                tensor.copy_(getattr(masked.get_submodule(path), attribute))
        return dense

    def _choose(self) -> None:
        """Choose units and weights, once."""
        if self._masks is not None:
            return
        if self._prepare is not None:
            self._prepare()
        statistics = self._statistics()
        parts = mask_weights(self._model, self._resolved, statistics)
        plan = None
        if self._resolved.ratios:
            assert self._groups is not None, "channels were asked for, and the groups are there"
            if self._dependency_aware:
                coupled = plan_coupled(self._groups, self._resolved, statistics)
                plan, channels, self._layer_masks = coupled.plan, coupled.masks, coupled.layers
            else:
                plan = plan_config(
                    self._groups, self._resolved, self._widths, statistics, group_reduction=self.group_reduction
                )
                channels = plan.masks()
            parts.append(self._of_parameters(channels))
        elif self._groups is not None:
            plan = plan_from_masks(self._groups, _combine_masks(parts))
        self._plan, self._masks = plan, _combine_masks(parts)

    def _of_parameters(self, masks: Mapping[str, Tensor]) -> Masks:
        """Masks of parameters, without those of buffers, under all names of tied ones."""
        names = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        kept = {name: mask for name, mask in masks.items() if name in names}
        assert self._groups is not None, "masks of channels are made of groups"
        return Masks.of(kept | _without_lost_norms(self._groups, kept))

    def _statistics(self) -> Statistics | None:
        if self._data is None or self._groups is None:
            return None
        resolved = self._resolved
        by_layer = self._dependency_aware or bool(resolved.weight_ratios)  # layers of any group may be scored
        whole = [] if by_layer else [group.name for group in self._groups if group.name not in resolved.ratios]
        return collect(self._groups, self._data, self._loss_fn, self._batches, False, self._criteria_on_data, whole)


def _without_lost_norms(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks under which weight norms stay numbers: a row without length has no direction, and its scale is masked too.

    Args:
        groups: the analysed network.
        masks: masks by canonical name.

    Returns:
        Other masks of those parameters of which the network would compute NaN, which leave whole rows as they are.

    Raises:
        MaskError: it would be NaN all the same, or those rows would not be zero.
    """
    state, changed = groups.graph.state, dict[str, Tensor]()

    def masked(name: str) -> Tensor:
        tensor, mask = state[name].tensor.detach(), changed.get(name, masks.get(name))
        return tensor if mask is None else torch.where(mask.to(tensor.device), tensor, 0)

    for name, nodes in computed_weights(groups).items():
        if name not in masks or bool(compute_from_state(nodes[0], masked).isfinite().all()):
            continue
        gone = ~masks[name].flatten(1).any(1)
        changed[name] = masks[name].clone()
        changed[name][gone] = True
        value = compute_from_state(nodes[0], masked)
        if not value.isfinite().all() or value[gone].any():
            raise MaskError(
                f"the network computes a weight of {name!r}, which is NaN where that is masked; make the weight "
                f"permanent first (torch.nn.utils.parametrize.remove_parametrizations), or use torchshear.prune."
            )
    return changed


def rank_with_all(entry: Entry) -> Entry:
    """An entry whose layers are ranked together with those of all entries that ask the same ratio."""
    if entry.excludes or entry.pool is not None:
        return entry
    return replace(entry, pool=f"{entry.ratio:g} of all", max_ratio=_MOST_OF_A_LAYER)


_MOST_OF_A_LAYER = 0.99  # as NNI does, so that no layer vanishes


def _combine_masks(parts: Sequence[Masks]) -> Masks:
    """Several masks as one; a weight that two of them mask keeps what both keep."""
    tensors: dict[str, Tensor] = {}
    for masks in parts:
        for name, mask in masks.tensors.items():
            tensors[name] = tensors[name] & mask if name in tensors else mask
    layers = tuple(layer for masks in parts for layer in masks.layers)
    return Masks.of(tensors, layers, ", ".join(dict.fromkeys(masks.pattern for masks in parts if masks.pattern)))
