"""Alignment profiles of the devices that models are pruned for, with the source of every figure."""

import difflib
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from torchshear._arguments import MOST, is_whole, quote
from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._staircase import measure_staircase

_PROFILES: Final[Mapping[str, Alignment]] = MappingProxyType(
    {
        name: Alignment(block, granule, name, linear)
        for name, block, granule, linear in (
            ("cpu-sse", 8, 8, 4),
            ("cpu-avx2", 16, 8, 8),
            ("cpu-avx512", 16, 16, 4),
            ("cpu-arm64", 16, 16, 4),
            ("cpu-int8", 16, 4, None),
            ("cuda-fp16", 8, 8, None),
            ("cuda-bf16", 8, 8, None),
            ("cuda-tf32", 4, 4, None),
            ("cuda-int8", 32, 16, None),
            ("ascend-fp16", 16, 16, None),
            ("ascend-int8", 32, 32, None),
        )
    }
)
_CPU_INFO: Final = Path("/proc/cpuinfo")
_HERE: Final = ("auto", "measured")  # what stands for this machine


def profiles() -> Mapping[str, Alignment]:
    """Return the table of device profiles, name -> alignment, read-only; sizes are in positions (channels).

    | profile | block, granule, linear | source |
    |---|---|---|
    | cpu-sse | 8, 8, 4 | onnxruntime `mlas/lib/platform.cpp`: `NchwcBlockSize = 8` without AVX-512F |
    | cpu-avx2 | 16, 8, 8 | the same, and measured: 72 outputs of a 1x1 convolution take the time of 80 |
    | cpu-avx512 | 16, 16, 4 | the same file: `NchwcBlockSize = 16` with AVX-512F |
    | cpu-arm64 | 16, 16, 4 | the same file: NCHWc kernels for NEON work on 16; else SGEMM panels of 16 columns |
    | cpu-int8 | 16, 4 | onnxruntime `mlas/lib/qgemm_kernel_avx2.cpp`: panels of 16 columns, `PackedK = 4` |
    | cuda-fp16, cuda-bf16 | 8 | NVIDIA Deep Learning Performance Guide: tensor cores need multiples of 16 bytes |
    | cuda-tf32 | 4 | the same guide: 16 bytes are 4 values |
    | cuda-int8 | 32, 16 | the same guide: 16 bytes are 16 values; cuDNN's `NCHW_VECT_C` layout holds 32 channels |
    | ascend-fp16 | 16 | MindSpore UniPruning: pruning step 16, times the cores used |
    | ascend-int8 | 32 | the same: pruning step 32 where quantisation to int8 follows, times the cores used |

    The granule of the CPU profiles is the block of onnxruntime's layout NCHWc. A convolution that reads fewer channels
    reads them in the plain layout (`core/optimizer/nchwc_transformer.cc`), behind a kernel that reorders: from 4
    channels to 24 takes 1.5 times as long as from 8, on AVX2. One that reads more stays in the layout if they are a
    multiple of 4 (pull request 7442), but computes the block that is not full as well. Otherwise it leaves the layout,
    and can be slower than before pruning. Matrix products, convolutions along one dimension and recurrent layers have
    no such layout, and steps of a vector at most: 8 values on AVX2. `benchmarks/alignment.py` measures all that.

    Example:
        >>> profiles()["cpu-avx512"]
        Alignment(block=16, granule=16, name='cpu-avx512', linear=4)
    """
    return _PROFILES


def resolve_alignment(align: int | str | Alignment | None, device: Device | None = None) -> Alignment:
    """Return the alignment that an argument names.

    Args:
        align: an alignment; a number of positions that widths shall be a multiple of; the name of a profile; an Ascend
            profile with the number of cores that share a layer, as "ascend-fp16:8"; "auto" for the profile of this
            machine's CPU; "measured" for what its kernels run well, see `measure_staircase`; None for any width.
        device: threads and batch with which these are measured; None: one thread, one sample.

    Returns:
        The alignment; with n cores its block is n times that of the profile, its granule the same.

    Raises:
        ArgumentError: the name is unknown, the number is below 1, or the type is none of these.
        OutputError: the folder of measurements cannot be written to.

    Example:
        >>> resolve_alignment("ascend-fp16:8")
        Alignment(block=128, granule=16, name='ascend-fp16:8', linear=None)
        >>> resolve_alignment(8)
        Alignment(block=8, granule=8, name='multiple of 8', linear=None)
    """
    if align is None:
        return Alignment.none()
    if isinstance(align, Alignment):
        return align
    if isinstance(align, str) and align == "measured":
        return measure_staircase(device).alignment
    if isinstance(align, str):
        return _find_profile(align)
    if not is_whole(align) or not 1 <= align <= MOST:
        raise ArgumentError(
            f"align must be a whole number of at least 1, a profile name, an Alignment or None, "
            f"but got align={quote(align)}. Profiles: {_all_names()}."
        )
    return Alignment(align, align, f"multiple of {align}")


def detect_profile() -> str:
    """Name the profile of this machine's CPU, by its instruction set.

    The set decides which kernels onnxruntime takes (`mlas/lib/platform.cpp`). On Linux it is read from /proc/cpuinfo,
    elsewhere from `torch.backends.cpu.get_cpu_capability`, which can be lowered by the user and so comes second.

    Returns:
        One of "cpu-sse", "cpu-avx2", "cpu-avx512", "cpu-arm64".
    """
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "cpu-arm64"
    features = _cpu_features()
    if "avx512f" in features:
        return "cpu-avx512"
    return "cpu-avx2" if "avx2" in features else "cpu-sse"


def _cpu_features() -> frozenset[str]:
    """Return the names of the instruction sets, in lower case as Linux writes them."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    capability = torch.backends.cpu.get_cpu_capability()
    implied = {"AVX512": {"avx512f", "avx2"}, "AVX2": {"avx2"}}
    return frozenset(implied.get(capability, set()))


def _find_profile(name: str) -> Alignment:
    """Look up a profile, with a number of cores if one is given."""
    if name == "auto":
        return _PROFILES[detect_profile()]
    base, colon, cores = name.partition(":")
    if base not in _PROFILES:
        near = difflib.get_close_matches(base.lower(), [*_PROFILES, *_HERE], n=1, cutoff=0.0)[0]
        raise ArgumentError(f"unknown alignment profile {name!r}; the nearest is {near!r}. Profiles: {_all_names()}.")
    profile = _PROFILES[base]
    if not colon:
        return profile
    if not base.startswith("ascend-"):
        raise ArgumentError(f"a number of cores is for Ascend profiles only, but got {name!r}. Write {base!r}.")
    if not (cores.isascii() and cores.isdigit() and int(cores) >= 1):
        raise ArgumentError(f"the number of cores in {name!r} must be at least 1, as in '{base}:8'.")
    return Alignment(profile.block * int(cores), profile.granule, name)


def _all_names() -> str:
    """List every accepted name for an error message."""
    return ", ".join([*_HERE, *_PROFILES, "ascend-fp16:CORES", "ascend-int8:CORES"])
