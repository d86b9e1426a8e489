"""Verdicts on the speed of a pruned model: measured, or predicted from the widths of convolutions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torchshear.dependency import Alignment, ChannelGroup, ChannelGroups
from torchshear.speedup.latency._alignment_profiles import detect_profile, profiles
from torchshear.speedup.latency._comparison import LatencyComparison

FILLED_UP: Final = 4  # channels that a convolution must read a multiple of to stay in the layout NCHWc
_SHOWN: Final = 3  # groups that are named
_READING: Final = frozenset({"in", "depthwise"})


@dataclass(frozen=True, slots=True)
class SpeedVerdict:
    """Verdict on the speed of a pruned model, against that of the model it was made of.

    Attributes:
        is_faster: True or False if it was measured, or nothing shrank; True if every convolution keeps its fast path,
            and None if some do not, so that nobody knows.
        is_measured: whether it was measured, on this machine.
        off_fast_path: groups whose channels are now too few, or of the wrong number, for the layout in which the
            runtime computes convolutions fast, and were not before.
        text: all that in a sentence.
    """

    is_faster: bool | None
    is_measured: bool
    off_fast_path: tuple[str, ...]
    text: str


def speed_verdict(
    groups: ChannelGroups, widths: Mapping[str, int], profile: str, latency: LatencyComparison | None
) -> SpeedVerdict:
    """Say whether a pruned model is faster: from times where there are any, else from its widths.

    Args:
        groups: the analysed network.
        widths: name of a group -> units that stay.
        profile: name of the alignment that widths were chosen by; where it is none of a device, this machine's CPU
            counts.
        latency: times of the model given and of the result, as "dense" and "pruned"; None if they were not measured.
    """
    alignment = profiles().get(profile.partition(":")[0], profiles()[detect_profile()])
    shapes = {name: entry.shape for name, entry in groups.graph.state.items()}
    read = [
        group
        for group in groups
        if group.convolution_groups > 1
        or any(len(shapes[member.name]) == 4 and member.purposes & _READING for member in group.members)
    ]
    off = tuple(
        group.name
        for group in read
        if _is_fast(group, group.width, alignment) and not _is_fast(group, widths[group.name], alignment)
    )
    if latency is not None:
        low, high = latency.speedup_interval("pruned")
        is_faster = latency.is_faster("pruned")
        word = "faster" if is_faster else "slower" if high < 1 else "not measurably faster"
        times = f"{latency.speedup('pruned'):.2f} times the speed of before ({low:.2f} to {high:.2f})"
        return SpeedVerdict(is_faster, True, off, f"{word}, as measured: {times}{_told(off, widths, alignment)}")
    if all(widths[group.name] == group.width for group in groups):
        return SpeedVerdict(False, False, off, "as before: nothing shrank")
    if off:
        text = f"may be slower than before: not measured{_told(off, widths, alignment)}"
        return SpeedVerdict(None, False, off, f"{text}. align='auto' avoids that, device= measures")
    text = f"faster, as predicted: no convolution leaves its fast path on {alignment.name}; not measured"
    return SpeedVerdict(True, False, off, text)


def _told(off: tuple[str, ...], widths: Mapping[str, int], alignment: Alignment) -> str:
    """Name groups off the fast path."""
    if not off:
        return ""
    named = [f"{name} with {widths[name]}" for name in off[:_SHOWN]] + ["..."] * (len(off) > _SHOWN)
    number = "1 group of channels makes" if len(off) == 1 else f"{len(off)} groups of channels make"
    return f"; {number} convolutions leave their fast path on {alignment.name} ({', '.join(named)})"


def _is_fast(group: ChannelGroup, width: int, alignment: Alignment) -> bool:
    """Return False if convolutions of maps that read a group compute a width of it outside of the layout that is fast.

    On a CPU they must read a whole block of the layout at least, and a multiple of 4 channels; in each group of grouped
    convolutions whole blocks, or so few that the plain layout is faster than a block was, which half of one is.
    Elsewhere it is the granule that must be filled.
    """
    positions = width * group.multiplicity
    if group.convolution_groups > 1:
        in_each = group.convolution_groups * alignment.granule
        return positions % in_each == 0 or (alignment.linear is not None and 2 * positions <= in_each)
    if alignment.linear is None:
        return positions % alignment.granule == 0
    return positions >= alignment.granule and positions % FILLED_UP == 0
