"""Targets of size in real files: what these take beside tensors is measured, and so is the file of the result."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from torch import Tensor, nn

from torchshear._making import MadeModel
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._aligned_widths import first_units
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError, PlanError
from torchshear.graph.model._meta import is_on_meta
from torchshear.options import PruneOptions
from torchshear.pruners._planning import RankedGroups, check_request
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._size import FileOverhead, most_bytes
from torchshear.report import FileSize
from torchshear.speedup import shrink_to_form
from torchshear.speedup.onnx._export import export_onnx

_ROUNDS: Final = 4
_OF_A_TENSOR: Final = 160  # bytes of its entry in the header of a safetensors file at most, beside names


@dataclass(frozen=True, slots=True, eq=False)
class FileTarget:
    """Bound on the files of a result.

    Attributes:
        model: the dense model.
        groups: its analysis.
        args: example positional arguments.
        kwargs: example keyword arguments.
        dense_bytes: the ONNX file of the dense model.
        most: bytes that the ONNX file of the result may have, and its safetensors file.
    """

    model: nn.Module
    groups: ChannelGroups
    args: tuple[Any, ...] | Tensor
    kwargs: Mapping[str, Any] | None
    dense_bytes: int
    most: float

    @classmethod
    def of(
        cls,
        options: PruneOptions,
        model: nn.Module,
        groups: ChannelGroups,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
    ) -> tuple["FileTarget | None", PruneOptions]:
        """Export the dense model, and it at its narrowest, to know what a file takes beside tensors.

        Returns:
            The bound, None where no file can be written or no size is asked for; and the options with what was
            measured.

        Raises:
            ArgumentError: only parts of the model are captured, so that it has no file.
            PlanError: even the narrowest file is above the bound; says how large it is.
            ExportError: the model cannot be exported.
        """
        request = options.request
        if request.target_size is None or is_on_meta(model):
            return None, options
        if groups.graph.parts is not None:
            raise ArgumentError(
                "target_size= is of the file of the whole model, of which only parts are captured (submodules=). Ask "
                "for parameters by target_params, or prune each part by itself."
            )
        dense_bytes = _file_bytes(model, args, kwargs)[0]
        target = cls(model, groups, args, kwargs, dense_bytes, most_bytes(request.target_size, dense_bytes))
        narrowest = _Narrowest(groups, request)
        form, tradeoff = options.form_of(narrowest)
        small = shrink_to_form(model, narrowest.plan(), args, kwargs, form, verify=False, tradeoff=tradeoff)
        beside = max(_file_bytes(small.model, args, kwargs)) - Cut(groups, small.plan.kept).cost().size_bytes
        tensor_bytes = dense_cost(groups.graph).size_bytes
        if tensor_bytes + beside <= target.most < dense_bytes:  # the rewritten graph alone is as much smaller
            beside = int(target.most * (1 - tensor_bytes / dense_bytes)) + 1  # so tensors lose what the file is to lose
        options = _with_overhead(options, dense_bytes, beside)
        check_request(groups, options.request)
        return target, options

    def meet(self, options: PruneOptions, make: Callable[[PruneOptions], MadeModel]) -> MadeModel:
        """Make a model whose files are within the bound: again with more room left where a real file is above it.

        Args:
            options: the options, with what was measured.
            make: makes a model by options.

        Raises:
            PlanError: that does not end within some rounds, or the bound cannot be met.
        """
        for _ in range(_ROUNDS):
            made = make(options)
            onnx_bytes, weights_bytes = _file_bytes(made.after.model, self.args, self.kwargs)
            size = max(onnx_bytes, weights_bytes)
            if size <= self.most:
                return replace(made, file=FileSize(self.dense_bytes, onnx_bytes, int(self.most)))
            known = options.request.file
            assert known is not None, "measured with the target"
            beside = size - Cut(self.groups, made.plan.kept).cost().size_bytes
            more = known.beside_tensors + int(size - self.most) + 1
            options = _with_overhead(options, self.dense_bytes, max(beside, more))
        raise PlanError(
            f"target_size={options.request.target_size!r}: after {_ROUNDS} rounds the file still had {size:,} bytes, "
            f"with {self.most:,.0f} asked for. Ask for a little more."
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Narrowest:
    """Makes plans of the narrowest widths under the limits of a request, whichever units stay."""

    groups: ChannelGroups
    request: Request

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """Choose the first units of each group."""
        steps = RankedGroups.of(self.groups, self.request, None, with_scores=False).steps
        kept = {
            one.group.name: first_units(one.group, int(one.widths[-1])) for one in steps if one.group.name not in whole
        }
        return make_plan(Cut(self.groups, kept), kept, {"kept": "the first"}, {})


def _with_overhead(options: PruneOptions, dense_bytes: int, beside: int) -> PruneOptions:
    return replace(options, request=replace(options.request, file=FileOverhead(dense_bytes, beside)))


def _file_bytes(model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return the bytes of the ONNX file of a model, which is written, and most that its safetensors file can have.

    Outputs are not compared: that is for whoever keeps the file.
    """
    with TemporaryDirectory(prefix="torchshear-") as folder:
        onnx_bytes = export_onnx(model, Path(folder) / "model.onnx", args, kwargs, rtol=1.0, atol=1e9).size_bytes
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    header = sum(_OF_A_TENSOR + 2 * len(json.dumps(name)) for name in tensors) + _OF_A_TENSOR
    shared = {(one.data_ptr(), one.dtype, one.shape): one.numel() * one.element_size() for one in tensors.values()}
    return onnx_bytes, sum(shared.values()) + header
