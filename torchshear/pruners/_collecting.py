"""Data run through a model, for the criteria that look at it."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from torchshear._arguments import check_kind, parse_names, quote
from torchshear.calibration import Loss, Progress, Statistics
from torchshear.calibration._batches import check_batches, number_of_batches, read_graph_inputs
from torchshear.calibration._dense_loss import DENSE
from torchshear.calibration._processes import agree, all_reduced
from torchshear.calibration._progress import check_progress, with_progress
from torchshear.calibration._run import Run
from torchshear.calibration._statistics import ALL_SUMS, NAMED_SUMS, SUM_OF_MEANS, SUMS_OF_GRADIENTS, Sum
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError, WeightError
from torchshear.graph import Graph
from torchshear.graph.model._process import outside_inference_mode
from torchshear.pruners.criteria._criterion import Criterion, declared_needs, needs_of
from torchshear.pruners.selection._targets import choose_targets

_ANY = 0.5  # a ratio, where only what stays whole is asked


@outside_inference_mode()
def collect(
    network: Graph | ChannelGroups,
    loader: Iterable[Any],
    loss_fn: Loss | None = None,
    batches: int | None = None,
    progress: Progress = True,
    criteria: str | Criterion | Collection[str | Criterion] | None = None,
    exclude: str | Collection[str] = (),
) -> Statistics:
    """Run data through a model in eval mode, and sum up what criteria that look at data need.

    Nothing of the model changes: its weights stay as they are, and batch norms use their running statistics. Without a
    loss only forward passes are made, which is enough for criteria of activations. With one, gradients are taken as
    well; one batch is one backward pass, and the loss should be a mean over its samples. What is summed is summed in
    float32 at least, also for a model in half precision. Under `torch.distributed` every process gives its own data;
    sums are over all of them, so that all make the same plan; what stops one stops all.

    Args:
        network: the captured model or its channel groups.
        loader: gives batches: a tensor; a tuple of the positional arguments with or without a target behind them; a
            pair (inputs, target) whose inputs are a tensor, a tuple of positional arguments or a dictionary; or a
            dictionary by names of the parameters of forward, whose other keys are for the loss. An endless one is
            stopped.
        loss_fn: called as `loss_fn(output, target)`, where the target of a batch without one is the batch itself;
            gives a scalar tensor. "dense": the network's own outputs are the targets, of data without labels. None: no
            gradients, but those of "dense" that `reconstruction` weighs errors by.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        progress: True draws a bar on a terminal or in a notebook for work over a second, False nothing; a function is
            called as `progress(done, total, what)` after each batch, as `progress(1, 32, "collecting")`.
        criteria: the criterion or criteria that the statistics are for: only what they need is summed, and gradients
            are taken only if one needs them. None: whatever the loss allows.
        exclude: patterns of module or parameter names, or names of groups, that are not going to be pruned; gradients
            need not reach them.

    Returns:
        The sums, for `torchshear.plan(..., statistics=...)`.

    Raises:
        ArgumentError: `batches` is not a positive integer; the loss is not callable; a criterion is unknown or needs a
            loss that is not given, or none of them looks at data; a pattern fits nothing.
        DataError: the loader is empty, too short, or gives batches of another structure or size, without samples, or
            NaN, or on which the model does not run; the loss is not a scalar, or NaN or infinite, or so are activations
            or gradients; no gradient reaches a group, or all are zero; another process failed, has another network or
            criteria, or another number of batches.
        WeightError: the model is on the meta device.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = torchshear.trace(model, torch.randn(1, 4))
        >>> torchshear.collect(graph, [torch.randn(16, 4)], batches=1, criteria="apoz", progress=False)
        <Statistics of 16 samples in 1 batches: zeros>
    """

    def make_run() -> Run:
        if loss_fn is not None and not callable(loss_fn) and not (isinstance(loss_fn, str) and loss_fn == DENSE):
            raise ArgumentError(
                f"loss_fn={quote(loss_fn)}; expected a function of output and target, 'dense' for the network's own "
                f"outputs as targets, or None."
            )
        groups = _groups_with_weights(network)
        patterns = parse_names("exclude", exclude)
        targets = choose_targets(groups, _ANY, None, patterns) if patterns else {}
        whole = frozenset(name for name, target in targets.items() if target.ratio is None)
        return Run(groups, DENSE if loss_fn is None else loss_fn, _sums_for(criteria, loss_fn), whole)

    return _run_data(make_run, loader, batches, progress)


def channel_means(
    network: Graph | ChannelGroups, loader: Iterable[Any], batches: int | None = None, progress: Progress = True
) -> dict[tuple[str, int], Tensor]:
    """Run data through a model in eval mode, and average each channel of what layers read.

    Args:
        network: the captured model or its channel groups.
        loader: gives batches, as for `collect`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        progress: as for `collect`.

    Returns:
        (name of the node that a layer reads, dimension of its channels) -> means over all samples and positions, shape
        (channels,), float64, on the CPU; for `torchshear.speedup.fold_constants`.

    Raises:
        ArgumentError: `batches` is not a positive integer.
        DataError: the loader is empty, too short, or gives batches of another structure or size, or NaN; a layer reads
            NaN or infinite numbers; another process failed, has another network, or another number of batches.
        WeightError: the model is on the meta device.
    """
    seen = _run_data(lambda: Run(_groups_with_weights(network), None, SUM_OF_MEANS), loader, batches, progress)
    return {key: sums.total / sums.count for key, sums in seen.values.items()}


def _run_data(
    make_run: Callable[[], Run], loader: Iterable[Any], batches: int | None, progress: Progress
) -> Statistics:
    """Return sums over batches and processes.

    Args:
        make_run: makes the run; called where an error of one process stops all of them.
        loader: gives batches.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        progress: how to report.
    """
    run: Run | None = None
    error: Exception | None = None
    try:
        check_progress(progress)
        check_batches(batches)
        run = make_run()
        read: Iterable[tuple[list[Any], Any]] = read_graph_inputs(loader, batches, run.graph)
        if "grams" in run.sums:  # some samples are held out, which all are looked at for
            known: list[tuple[list[Any], Any]] = []
            for leaves, target in read:
                run.count_samples(leaves, len(known))
                known.append((leaves, target))
            run.hold_out([leaves for leaves, _ in known])
            read = known
        for leaves, target in with_progress(read, number_of_batches(loader, batches), "collecting", progress):
            run.batch(leaves, target)
        run.check()
    except Exception as failure:  # the other processes wait for this one to say so
        error = failure
    setting = None if run is None else (run.fingerprint, tuple(sorted(run.sums)))
    agree("collect", setting, 0 if run is None else run.n_batches, error)
    assert run is not None
    return all_reduced(run.result())


def _groups_with_weights(network: Graph | ChannelGroups) -> ChannelGroups:
    check_kind("network", network, (Graph, ChannelGroups), "what torchshear.trace or torchshear.analyze gives")
    groups = network if isinstance(network, ChannelGroups) else analyze(network)
    if any(entry.tensor.is_meta for entry in groups.graph.state.values()):
        raise WeightError("the model is on the meta device and cannot be run; load its weights to collect statistics.")
    return groups


def _sums_for(criteria: str | Criterion | Collection[str | Criterion] | None, loss_fn: Loss | None) -> frozenset[Sum]:
    """Return the sums that criteria need; for criteria that declare no needs, all sums that the loss allows."""
    known = ALL_SUMS | NAMED_SUMS
    allowed = known if loss_fn is not None else known - SUMS_OF_GRADIENTS
    if criteria is None:
        return allowed - NAMED_SUMS
    named = [criteria] if isinstance(criteria, str) or callable(criteria) else criteria
    if not isinstance(named, Collection) or isinstance(named, Tensor):
        raise ArgumentError(f"criteria={quote(criteria)}; expected names of criteria or functions, or None for all.")
    wanted: frozenset[Sum] = frozenset()
    for name in named:
        if not declared_needs(name) <= allowed:
            raise ArgumentError(f"criterion {name!r} looks at gradients; give a loss_fn to take them of.")
        wanted |= needs_of(name) & allowed
    if not wanted:
        raise ArgumentError(f"criteria={criteria!r} look at no data, so that there is nothing to collect for them.")
    return wanted
