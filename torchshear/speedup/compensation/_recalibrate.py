"""Running statistics of batch norms, estimated anew on data."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from torchshear._arguments import check_flag
from torchshear.calibration import Progress
from torchshear.calibration._batches import CallForm, check_batches, number_of_batches, read_batches
from torchshear.calibration._processes import agree, is_distributed, sum_over_processes
from torchshear.calibration._progress import check_progress, with_progress
from torchshear.errors import ArgumentError, DataError, WeightError, first_line
from torchshear.graph import ExampleInputs
from torchshear.graph.model._checks import check_module, signature_of
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.graph.model._state import in_mode

_logger = logging.getLogger(__name__)

# Functions that normalise by running statistics -> names of their positional arguments.
_OPERATOR = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_BATCH_NORMS: Mapping[Any, tuple[str, ...]] = {
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _OPERATOR,
    torch.ops.aten.batch_norm.default: _OPERATOR,
}


def recalibrate(
    model: nn.Module, loader: Iterable[Any], batches: int | None = None, progress: Progress = True, frozen: bool = False
) -> nn.Module:
    """Estimate the running statistics of all batch norms anew, as a model with other weights or widths needs it.

    After a cut every layer sees other inputs than its batch norm remembers. Without any training, each batch norm gets

        mean = 1/B sum_b mean_b,    var = 1/B sum_b var_b

    over B batches, where `mean_b` and the unbiased `var_b` are those of its input in batch b, and its output in that
    batch is normalised by the batch's own statistics: what torch's batch norms do in train mode with `momentum=None`
    from fresh statistics. The variance is this mean rather than that of all batches pooled, because training goes on
    from it in the same way; batches should be as large as in training.

    Everything but batch norms runs in eval mode: no dropout, no gradients, and no random number is drawn. Frozen norms,
    whose momentum is 0 and which count no batches, stay as they are without `frozen=True`, and so do in any case batch
    norms that no call of `batch_norm` reaches: unused ones, and those that compute by themselves, as torchvision's
    `FrozenBatchNorm2d`. A logged warning names both. It works on any model: pruned or not, in
    native or traced form. Under `torch.distributed` every process gives its own data and normalises by its own batches,
    also where a `SyncBatchNorm` would ask the others; averages are over all.

    Args:
        model: any model with batch norms; it is left as it is.
        loader: gives batches, of the forms that `torchshear.collect` takes; a tuple holds the positional arguments that
            forward requires. An endless one is stopped.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        progress: as for `torchshear.collect`.
        frozen: whether frozen norms get new statistics as well.

    Returns:
        A copy with other values in the buffers of its batch norms: `running_mean`, `running_var`, and
        `num_batches_tracked`, the number of batches that they hold. All else is as in the original: weights, modes,
        momentum, hooks (which run along with the data).

    Raises:
        ArgumentError: `batches` is not a positive integer; or the model has no batch norm with running statistics,
            runs none, runs frozen ones alone, or holds compiled TorchScript.
        DataError: the loader is empty or too short, a batch does not fit the model, statistics are NaN or infinite, or
            processes have different numbers of batches.
        WeightError: the model is on the meta device, or has lazy layers that were never run.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> small = torchshear.prune(model, torch.randn(2, 4), ratio=0.5, prunable_outputs="0").model
        >>> small = torchshear.recalibrate(small, [torch.randn(64, 4)], batches=1, progress=False)
        >>> int(small[1].num_batches_tracked)
        1

    Reference: Ioffe and Szegedy, ICML 2015, arXiv:1502.03167 (statistics of the population by averaging over batches);
    for pruned networks Li et al., ECCV 2020, arXiv:2007.02491.
    """
    return recalibrate_for(None, model, loader, batches, progress, frozen)


@outside_inference_mode()
def recalibrate_for(
    example: ExampleInputs | None,
    model: nn.Module,
    loader: Iterable[Any],
    batches: int | None,
    progress: Progress = False,
    frozen: bool = False,
) -> nn.Module:
    """Recalibrate a model on batches that hold the arguments of an example call; see `recalibrate` for the rest."""
    check_recalibration(model, batches)
    check_flag("frozen", frozen)
    check_progress(progress)
    copy = copy_model(model)
    statistics = _Statistics.of(copy, frozen)
    n_run = 0
    error: Exception | None = None
    try:
        device = next((t.device for t in (*copy.parameters(), *copy.buffers())), torch.device("cpu"))
        found = read_batches(loader, batches, CallForm(signature_of(copy), example), device)
        for batch in with_progress(found, number_of_batches(loader, batches), "recalibrating", progress):
            _run_batch(copy, batch.args, batch.kwargs, n_run, statistics)
            n_run += 1
    except Exception as failure:  # the other processes wait for this one to say so
        error = failure
    agree("recalibrate", None, n_run, error)
    statistics.write()
    return copy


def check_recalibration(model: nn.Module, batches: int | None) -> None:
    """Check the arguments of `recalibrate`, and raise what it raises of them."""
    check_module(model)
    check_batches(batches)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ArgumentError(
            f"{type(model).__name__} holds compiled TorchScript, in which batch norms cannot be seen; recalibrate the "
            f"module that was scripted, and script the result."
        )
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise WeightError("the model has lazy layers, which have no shapes before it is run; run it once.")
    if not any(name.rpartition(".")[2] == "running_mean" for name, _ in model.named_buffers()):
        raise ArgumentError(
            f"{type(model).__name__} has no batch norm with running statistics: there is nothing to recalibrate."
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise WeightError("the model is on the meta device and cannot be run; load its weights to recalibrate it.")


def _run_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, into: "_Statistics"
) -> None:
    """Run one batch.

    Raises:
        DataError: the model does not run on it.
    """
    try:
        with torch.no_grad(), in_mode(model, "eval"), into:
            model(*args, **kwargs)
    except DataError as error:
        raise DataError(f"batch {number}: {error}") from error
    except Exception as error:  # the model's own code may fail in any way on data that does not fit
        raise DataError(
            f"{type(model).__name__} does not run on batch {number}: {type(error).__name__}: {first_line(error)}. "
            f"Expected a loader of what its forward takes."
        ) from error


@dataclass(slots=True)
class _NormSums:
    """Buffers of one batch norm, and sums of the statistics of its calls in float64."""

    name: str
    mean: Tensor
    var: Tensor
    counter: Tensor | None
    sum_mean: Tensor
    sum_var: Tensor
    n_calls: int = 0
    is_frozen: bool = False


class _Statistics(TorchFunctionMode):
    """Function mode in which batch norms normalise by the statistics of their batch, and these are summed up."""

    def __init__(self, norms: Mapping[int, _NormSums], with_frozen: bool) -> None:
        super().__init__()
        self.norms = norms
        self.with_frozen = with_frozen

    @classmethod
    def of(cls, model: nn.Module, with_frozen: bool) -> "_Statistics":
        """Find the batch norms of a model by the names that torch gives their buffers."""
        buffers = dict(model.named_buffers())
        norms: dict[int, _NormSums] = {}
        for name, mean in buffers.items():
            path, _, last = name.rpartition(".")
            prefix = f"{path}." if path else ""
            var = buffers.get(f"{prefix}running_var")
            if last == "running_mean" and var is not None:
                zeros = torch.zeros(mean.shape, dtype=torch.float64)
                counter = buffers.get(f"{prefix}num_batches_tracked")
                norms[id(mean)] = _NormSums(path or "(the model)", mean, var, counter, zeros, zeros.clone())
        return cls(norms, with_frozen)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the running statistics of batch norms by those of the batch; leave all other functions alone."""
        kwargs = kwargs or {}
        if func in _BATCH_NORMS:
            given = dict(zip(_BATCH_NORMS[func], args, strict=False)) | kwargs
            sums = self.norms.get(id(given.get("running_mean")))
            if sums is not None and not given.get("training"):
                sums.is_frozen = sums.counter is None and given.get("momentum") == 0
                if self.with_frozen or not sums.is_frozen:
                    return _normalize_by_batch(sums, given)
        return func(*args, **kwargs)

    def write(self) -> None:
        """Write the averages over the calls of all processes into the buffers.

        Raises:
            ArgumentError: no batch norm was called.
        """
        counts = torch.tensor([sums.n_calls for sums in self.norms.values()])
        together = is_distributed()
        counts = sum_over_processes(counts) if together else counts
        if not counts.any():
            raise ArgumentError(
                "all batch norms that the model runs are frozen (momentum 0); frozen=True gives them new statistics."
                if any(sums.is_frozen for sums in self.norms.values())
                else "the model runs none of its batch norms by torch.nn.functional.batch_norm: there is nothing to "
                "recalibrate."
            )
        self._warn_of_unchanged(counts.tolist())
        with torch.no_grad():
            for sums, count in zip(self.norms.values(), counts.tolist(), strict=True):
                mean, var = (sum_over_processes(t) if together else t for t in (sums.sum_mean, sums.sum_var))
                if count:
                    sums.mean.copy_(mean / count)
                    sums.var.copy_(var / count)
                if count and sums.counter is not None:
                    sums.counter.fill_(count)

    def _warn_of_unchanged(self, counts: list[int]) -> None:
        """Log the batch norms that keep their statistics, and why."""
        left = [sums for sums, count in zip(self.norms.values(), counts, strict=True) if not count]
        frozen = [sums.name for sums in left if sums.is_frozen]
        others = [sums.name for sums in left if not sums.is_frozen]
        for names, why in (
            (frozen, "they are frozen (momentum 0); recalibrate(..., frozen=True) gives them new ones"),
            (others, "no call of batch_norm reached them: they are unused, or compute by themselves"),
        ):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                _logger.warning("batch norms keep their statistics: %s%s: %s.", ", ".join(names[:4]), more, why)


def _normalize_by_batch(sums: _NormSums, given: Mapping[str, Any]) -> Tensor:
    """Normalise by the statistics of the batch, and add them up.

    Raises:
        DataError: they are of one value, or not finite.
    """
    x, eps = given["input"], given.get("eps", 1e-5)
    if x.numel() < 2 * x.shape[1]:
        raise DataError(
            f"batch norm {sums.name!r} gets {tuple(x.shape)}, less than two values a channel, which have no variance. "
            f"Give larger batches."
        )
    mean, var = torch.zeros_like(sums.mean), torch.zeros_like(sums.var)
    is_cudnn = torch.backends.cudnn.enabled
    value = torch.batch_norm(x, given.get("weight"), given.get("bias"), mean, var, True, 1.0, eps, is_cudnn)
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise DataError(f"the input of batch norm {sums.name!r} has NaN or infinite statistics. Look at the data.")
    sums.sum_mean += mean.to(sums.sum_mean)
    sums.sum_var += var.to(sums.sum_var)
    sums.n_calls += 1
    return value
