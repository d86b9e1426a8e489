"""Refit of a shrunk model on data: its checks, its errors, and the proof that weights went where they belong."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear._arguments import check_count, check_kind
from torchshear.calibration._batches import check_batches, read_graph_inputs
from torchshear.calibration._processes import agree
from torchshear.calibration._progress import Progress, check_progress
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, PlanError, VerificationError, WeightError
from torchshear.graph._run import graph_output
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._process import outside_inference_mode
from torchshear.graph.model._state import in_mode
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.compensation._frontier import DEFAULT_MEMORY, MOST_MEMORY
from torchshear.speedup.compensation._output_error import output_error
from torchshear.speedup.compensation._refit_pass import RefitPass
from torchshear.speedup.compensation._refit_record import Refit
from torchshear.speedup.rewriting._slicing import slice_state
from torchshear.speedup.shrinking._prepared_cut import analyze_planned
from torchshear.speedup.verification._state_cut import StateCut


@outside_inference_mode()
def refit(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    loader: Iterable[Any],
    *,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    batches: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = True,
) -> tuple[nn.Module, Refit]:
    """Fit every layer of a shrunk model to give what it gave before the cut, in closed form and without labels.

    A cut takes inputs away from the layers behind it; what those inputs told is partly told by the ones that stay. So
    each linear layer gets the weights of

        min over W, b of  sum over samples and positions || W u + b - y ||^2  +  lambda || W - W_cut ||^2

    where u is what it reads in the smaller network, the layers before it being fitted already, and y what it gave in
    the original. Norms get the scale and shift, or the running statistics, that bring them nearest to theirs. A quarter
    of the samples is held out: lambda is the one that does best on them, and a layer whose error on them does not fall
    stays as it was. If the outputs of the model are worse in the end, all of it stays as it was.

    Args:
        model: the original; it is left as it is.
        small: what the plan made of it, native or traced; it is left as it is.
        plan: the plan between them.
        loader: gives batches of inputs, as for `torchshear.collect`; targets are ignored. Some hundred samples do.
        args: example arguments to trace with, if the plan does not describe them.
        kwargs: example keyword arguments, likewise.
        batches: how many batches to run; None: the first 32, or all where there are fewer. They are held in memory.
        memory: bytes that activations may take in memory; those beyond go to files in the temporary folder. What one
            call gives, and the system of one layer, come on top.
        progress: see `torchshear.collect`.

    Returns:
        A copy of `small` with other weights, and the errors of all layers before and after.

    Raises:
        ArgumentError: the plan is for parts of the model, or `batches` is not a positive integer.
        DataError: the loader is empty or too short, gives too few samples, or batches that do not fit the model or hold
            NaN.
        PlanError: the plan is for another model, or `small` is not what it makes of the original.
        VerificationError: the smaller model with the new weights does not compute what they were fitted for.
        WeightError: a model is on the meta device.

    Reference: layer by layer reconstruction as in He et al., ICCV 2017, arXiv:1707.06168; ridge regression around the
    present weights on inputs of the pruned network as in Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580.
    """
    check_batches(batches)
    check_count("memory", memory, most=MOST_MEMORY)
    check_progress(progress)
    check_kind("small", small, nn.Module, "the shrunk model")
    groups = analyze_planned(model, plan, args, kwargs)
    graph = groups.graph
    if is_on_meta(model) or is_on_meta(small):
        raise WeightError("a model on the meta device has no values to fit; load its weights first.")
    if graph.parts is not None:
        raise ArgumentError(
            "the plan is for parts of a model, and data is for the whole. Refit each part by itself, with batches of "
            "its own inputs."
        )
    cut = Cut(groups, plan.kept)
    dense_state = StateCut(groups, cut).state_of(model)
    small_state = _small_state(small, graph.aliases, dense_state, cut)
    fitted = dict(small_state)
    run = _make_pass(groups, cut, dense_state, fitted, loader, batches, memory, progress)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        if not _computes(small, run.smaller, small_state, run.batches[0], graph.in_spec):
            raise PlanError(
                f"{type(small).__name__} does not compute what the plan makes of the original; give the model "
                f"that this plan made, with any weights."
            )
        before = run.outputs_of(small_state)
        wanted, after = run.run()
        errors = [output_error(graph, wanted, got, run.split) for got in (before, after)]
        record = _name_frozen(run.record(*errors), model)
        result = copy_model(small)
        if not record.is_kept:
            return result, record
        for name, tensor in (*result.named_parameters(), *result.named_buffers()):
            canonical = graph.aliases.get(name, name)
            if canonical in fitted and fitted[canonical] is not small_state.get(canonical):
                tensor.copy_(fitted[canonical])
        if not _computes(result, run.smaller, fitted, run.batches[0], graph.in_spec):
            raise VerificationError(
                "the smaller model with the fitted weights does not compute what they were fitted for: its form has "
                "state that the graph does not hold. Nothing is returned."
            )
    return result, record


def _name_frozen(record: Refit, model: nn.Module) -> Refit:
    """Say of batch norms with momentum 0, as converters from other frameworks leave them, that they were frozen."""
    frozen = {name for name, module in model.named_modules() if getattr(module, "momentum", None) == 0}
    layers = (
        replace(layer, method=f"{layer.method}, though frozen")
        if layer.kind == "norm" and layer.method == "statistics" and layer.name in frozen
        else layer
        for layer in record.layers
    )
    return replace(record, layers=tuple(layers))


def _make_pass(
    groups: ChannelGroups,
    cut: Cut,
    dense_state: Mapping[str, Tensor],
    fitted: dict[str, Tensor],
    loader: Iterable[Any],
    batches: int | None,
    memory: int,
    progress: Progress,
) -> RefitPass:
    """Read all batches and make a pass over them; an error of one process stops all.

    Raises:
        DataError: the data does not fit the model, or is too little.
    """
    error: Exception | None = None
    found: list[list[Any]] = []
    run: RefitPass | None = None
    try:
        found += [_copied(leaves) for leaves, _ in read_graph_inputs(loader, batches, groups.graph)]  # buffers reused
        run = RefitPass(groups, cut, dense_state, fitted, found, memory, progress)
    except Exception as failure:  # the other processes wait for this one to say so
        error = failure
    agree("refit", groups.graph.fingerprint, len(found), error)
    assert run is not None, "agree raises the error"
    return run


def _small_state(
    small: nn.Module, aliases: Mapping[str, str], dense: Mapping[str, Tensor], cut: Cut
) -> dict[str, Tensor]:
    """Return the tensors of a shrunk model by canonical name; what it does not hold is sliced from the original.

    Raises:
        PlanError: one of them is not what the plan makes of the original's.
    """
    held = {
        aliases.get(name, name): tensor.detach() for name, tensor in (*small.named_parameters(), *small.named_buffers())
    }
    sliced = slice_state(cut, dict(dense))
    for name in (name for name in dense if name in held):
        given, expected = held[name], sliced[name]
        if given.shape != expected.shape or given.dtype != expected.dtype or given.device != expected.device:
            raise PlanError(
                f"{name!r} of the shrunk model is {_describe(given)}; the plan makes {_describe(expected)} of the "
                f"original. Give what this plan made of this model, in the same types and on the same device."
            )
    return {name: held.get(name, sliced[name].detach()) for name in dense}


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


def _copied(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _computes(
    small: nn.Module, graph: fx.Graph, state: Mapping[str, Tensor], leaves: list[Any], in_spec: pytree.TreeSpec
) -> bool:
    """Check that a model computes on a batch what a graph does with the tensors of `state`."""
    torch.manual_seed(0)
    expected = graph_output(graph, state, _copied(leaves))
    args, kwargs = pytree.tree_unflatten(_copied(leaves), in_spec)
    with in_mode(small, "eval"):
        torch.manual_seed(0)
        try:
            output = small(*args, **kwargs)
        except Exception:  # any model, with any exception
            return False
    got = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    if len(got) != len(wanted):
        return False
    pairs = [(y, x) for y, x in zip(wanted, got, strict=True) if not bool(y.isnan().all())]
    return relative_error([y for y, _ in pairs], [x for _, x in pairs]) <= 10 * tolerance(wanted)
