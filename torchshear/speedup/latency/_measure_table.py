"""Measuring a table: a handful of width vectors, each run and profiled."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, check_kind
from torchshear.calibration import Progress
from torchshear.calibration._progress import check_progress, with_progress
from torchshear.dependency import Alignment, ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.groups._width_form import axis_forms
from torchshear.graph import ExampleInputs
from torchshear.graph.capture._trace import trace
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.speedup.latency._cache import ProbeFile, only_measurement
from torchshear.speedup.latency._candidates import Candidates
from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._probes import WidthProbe, choose_probes
from torchshear.speedup.latency._table import LatencyTable, make_table

PROBES: Final = 10
_PATIENCE: Final = 0.3  # of the rounds of one vector, since all of them are fitted together


def measure_table(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: Device | None = None,
    align: int | str | Alignment | None = "auto",
    probes: int = PROBES,
    use_cache: bool = True,
    progress: Progress = True,
) -> LatencyTable:
    """Measure how the time of a model on this machine depends on the widths of its groups.

    The model is shrunk to a few random vectors of widths that the device runs well, and run whole and by kernels. In
    onnxruntime its profiler gives the time of every kernel of the optimized graph with the shapes that it saw; in
    torch every operator is timed. Shapes follow widths in a way that the analysis knows; a formula
    is fitted to them. What was measured is kept in the
    user's cache folder, or that of the environment variable TORCHSHEAR_CACHE, after every vector; a second call only
    reads it. One process of a machine measures at a time.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        device: how it runs; None: one thread, one sample.
        align: widths that the device runs well; see `torchshear.plan`.
        probes: vectors of widths to measure, the dense one among them; at least 4.
        use_cache: whether earlier measurements are read, and new ones kept.
        progress: see `torchshear.collect`; what is done are vectors.

    Returns:
        The table. It says how far it is off at vectors that it was not fitted to, and how noisy the machine was.

    Raises:
        ArgumentError: an argument is outside what is accepted.
        CaptureError: the model cannot be captured.
        ExportError: the model cannot be exported, for a device of onnxruntime.
        LatencyError: the runtime does not run it, or its profile cannot be read.
        OutputError: the cache folder cannot be written to.
    """
    if device is not None:
        check_kind("device", device, Device, "a torchshear.speedup.latency.Device")
    check_count("probes", probes, least=4)
    check_flag("use_cache", use_cache)
    check_progress(progress)
    alignment = resolve_alignment(align)
    groups = analyze(trace(model, args, kwargs))
    return table_of(model, groups, args, kwargs, device or Device(), alignment, probes, use_cache, progress)


def table_of(  # noqa: PLR0913 - what is measured, where, and how much of it
    model: nn.Module,
    groups: ChannelGroups,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    device: Device,
    alignment: Alignment,
    n_probes: int = PROBES,
    use_cache: bool = True,
    progress: Progress = False,
) -> LatencyTable:
    """Measure the table of an analysed network, or read what was measured before; see `measure_table`."""
    wanted = choose_probes(groups, alignment, axis_forms(groups), n_probes)
    identity = dict(device.identity()) | input_identity(args, kwargs)
    key = identity | {"fingerprint": groups.graph.fingerprint, "widths": wanted}
    file = ProbeFile.of(key) if use_cache else None
    known, damage = file.read() if file is not None else ([], "")
    if len(known) < len(wanted):
        with only_measurement(), TemporaryDirectory(prefix="torchshear-") as folder:
            known, damage = file.read() if file is not None else ([], "")  # another process may have measured
            if left := wanted[len(known) :]:
                candidates = Candidates(model, groups, args, kwargs, device, Path(folder))
                for widths in with_progress(left, len(left), "measuring widths", progress):
                    known.append(_measure(candidates, widths, is_dense=not known))
                    if file is not None:
                        file.write(known)
    remarks = (damage,) if damage else ()
    return make_table(groups, known, device, identity, (alignment.name, resolve_alignment("auto").granule), remarks)


def _measure(candidates: Candidates, widths: Mapping[str, int], is_dense: bool) -> WidthProbe:
    """Make, run and profile the model at one vector of widths."""
    model = candidates.dense if is_dense else candidates.prepare_widths(widths, "probe")
    comparison = candidates.compare(model, patience=_PATIENCE)
    reference = candidates.dense.profile()
    profile = reference if is_dense else model.profile()
    share = 1.0 if is_dense else 1 / comparison.speedup("pruned")
    return WidthProbe(widths, share, comparison["dense"].median_ms, profile, reference.total_ms)


def input_identity(args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return types and sizes of a sample of the example inputs, on which times depend, and their GPUs."""
    tensors = ExampleInputs.of(args, kwargs).tensors()
    places = [f" on {torch.cuda.get_device_name(one.device)}" if one.is_cuda else "" for one in tensors]
    return {
        "inputs": [
            f"{str(one.dtype).removeprefix('torch.')}{list(one.shape[1:])}{place}"
            for one, place in zip(tensors, places, strict=True)
        ]
    }
