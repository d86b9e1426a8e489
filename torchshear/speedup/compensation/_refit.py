"""Refit of a shrunk model on data: its checks, its errors, and the proof that weights went where they belong."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear._arguments import check_count, check_kind
from torchshear.calibration._batches import read_graph_inputs
from torchshear.calibration._processes import agree, is_distributed, sum_over_processes
from torchshear.calibration._progress import Progress, check_progress
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, VerificationError, WeightError
from torchshear.graph._run import graph_output
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._process import outside_inference_mode
from torchshear.graph.model._state import in_mode
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.compensation._refit_pass import HELD_OUT, RefitPass
from torchshear.speedup.compensation._refit_record import Refit
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.rewriting._slicing import slice_state
from torchshear.speedup.shrinking._planned import analyze_planned
from torchshear.speedup.verification._state_cut import StateCut


@outside_inference_mode()
def refit(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    loader: Iterable[Any],
    *,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    batches: int = 32,
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
        batches: how many batches to run. All of them are held in memory, with what the frontier of the graph holds.
        progress: see `torchshear.collect`.

    Returns:
        A copy of `small` with other weights, and the errors of all layers before and after.

    Raises:
        ArgumentError: the plan is for parts of the model, or `batches` is not a positive integer.
        DataError: the loader is empty or too short, gives too few samples, or batches that do not fit the model or hold
            NaN.
        PlanError: the plan is for another model.
        VerificationError: the smaller model with the new weights does not compute what they were fitted for.
        WeightError: a model is on the meta device.

    Reference: layer by layer reconstruction as in He et al., ICCV 2017, arXiv:1707.06168; ridge regression around the
    present weights on inputs of the pruned network as in Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580.
    """
    check_count("batches", batches)
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
    names = StateCut(groups, cut)
    dense_state = names.state_of(model)
    small_state = _small_state(small, groups.graph.aliases, dense_state, cut)
    error: Exception | None = None
    found: list[list[Any]] = []
    try:
        found += [leaves for leaves, _ in read_graph_inputs(loader, batches, graph)]
    except Exception as failure:  # the other processes wait for this one to say so
        error = failure
    agree("refit", graph.fingerprint, len(found), error)
    smaller = rewrite_graph(graph.fx_graph, groups.facts, cut)
    fitted = dict(small_state)
    run = RefitPass(groups, cut, dense_state, fitted, found, progress)
    with torch.no_grad():
        run.run()
        networks = ((graph.fx_graph, dense_state), (smaller, small_state), (smaller, fitted))
        wanted, before, after = (
            [graph_output(one, state, _copied(leaves)) for leaves in found] for one, state in networks
        )
    errors = [_held_out_error(wanted, got, run.offsets) for got in (before, after)]
    result = copy_model(small)
    is_kept = errors[1] <= errors[0]
    n_held_out = run.n_samples // HELD_OUT
    record = Refit(
        tuple(run.layers), tuple(run.skipped), run.n_samples - n_held_out, n_held_out, errors[0], errors[1], is_kept
    )
    if not is_kept:
        return result, record
    with torch.no_grad():
        for name, tensor in (*result.named_parameters(), *result.named_buffers()):
            canonical = graph.aliases.get(name, name)
            if canonical in fitted and fitted[canonical] is not small_state.get(canonical):
                tensor.copy_(fitted[canonical])
    _check_weights_arrived(result, found[0], after[0], graph.in_spec)
    return result, record


def _small_state(
    small: nn.Module, aliases: Mapping[str, str], dense: Mapping[str, Tensor], cut: Cut
) -> dict[str, Tensor]:
    """Return the tensors of a shrunk model by canonical name; what it does not hold is sliced from the original."""
    held = {
        aliases.get(name, name): tensor.detach() for name, tensor in (*small.named_parameters(), *small.named_buffers())
    }
    sliced = slice_state(cut, {name: tensor for name, tensor in dense.items() if name not in held})
    return {name: held[name] if name in held else sliced[name].detach() for name in dense}


def _copied(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _held_out_error(wanted: list[Any], got: list[Any], offsets: list[int]) -> float:
    """Return the squared error of floating outputs on samples held out, relative to their variance."""
    rows: list[list[Tensor]] = []
    for one, other, offset in zip(wanted, got, offsets, strict=True):
        for number, (y, x) in enumerate(zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)):
            if isinstance(y, Tensor) and y.is_floating_point() and y.ndim:
                chosen = ((torch.arange(len(y)) + offset) % HELD_OUT == HELD_OUT - 1).to(y.device)
                both = torch.stack([y[chosen], x[chosen]]).double().flatten(2 if y.ndim > 1 else 1)
                rows += [[] for _ in range(number + 1 - len(rows))]
                rows[number].append(both)
    error = variance = 0.0
    for batches in rows:
        y, x = torch.cat(batches, 1) if batches else torch.zeros(2, 1)
        error += float((x - y).square().sum())
        variance += float((y - y.mean(0)).square().sum())
    if is_distributed():
        error, variance = sum_over_processes(torch.tensor([error, variance], dtype=torch.float64)).tolist()
    return error / variance if variance else error


def _check_weights_arrived(small: nn.Module, leaves: list[Any], expected: Any, in_spec: pytree.TreeSpec) -> None:
    """Compare the model with new weights with the graph that they were fitted in.

    Raises:
        VerificationError: they differ.
    """
    args, kwargs = pytree.tree_unflatten(_copied(leaves), in_spec)
    with torch.no_grad(), in_mode(small, "eval"):
        output = small(*args, **kwargs)
    got = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    if len(got) != len(wanted) or relative_error(wanted, got) > 10 * tolerance(wanted):
        raise VerificationError(
            "the smaller model with the fitted weights does not compute what they were fitted for: its form has state "
            "that the graph does not hold. Nothing is returned."
        )
