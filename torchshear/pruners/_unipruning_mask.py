"""UniPruning's mask file: for each layer the channels that are to be removed, as JSON."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from torchshear._files import atomic_path
from torchshear.dependency import ChannelGroup, ChannelGroups, Member, PruningPlan
from torchshear.errors import ArgumentError, PlanError
from torchshear.graph import close_to
from torchshear.pruners._planning import plan_from_kept

Indices = npt.NDArray[np.int64]

_ABOUT: Final = "torchshear"  # the entry that says what the rest belongs to; no module of a layer may have this name


def write_unipruning_mask(plan: PruningPlan, path: str | PathLike[str]) -> None:
    """Write what a plan removes as UniPruning's mask: layer name -> channels to remove.

    Layers are named by their modules. Beside them stands one entry "torchshear", with the version, the hash of the
    network, and the sizes of the layers' weights.

    Args:
        plan: a plan that was made in this process.
        path: the file.

    Raises:
        ArgumentError: the plan was loaded from a file.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    groups = plan.analysis
    if groups is None:
        raise ArgumentError("the plan was loaded from a file; write the mask in the process that made it.")
    removed: dict[str, list[int]] = {}
    shapes: dict[str, list[int]] = {}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.width), plan.kept[group.name])
        for member in _layers(group) if len(gone) else ():
            channels = member.positions[np.isin(member.units, gone)]
            removed[_layer(member)] = sorted({*removed.get(_layer(member), []), *channels.tolist()})
            shapes[_layer(member)] = list(groups.graph.state[member.name].shape)
    about = {"version": version("torchshear"), "fingerprint": plan.fingerprint, "shapes": shapes}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({_ABOUT: about, **removed}, indent=3) + "\n", encoding="utf-8")


def plan_from_unipruning_mask(groups: ChannelGroups, path: str | PathLike[str]) -> PruningPlan:
    """Read a mask of UniPruning as a plan.

    Args:
        groups: the analysed network.
        path: the file: layer name -> channels to remove, in any order. All layers of a group that it names must lose
            the same channels; layers that it does not name follow theirs.

    Raises:
        PlanError: the file is missing, damaged or of another network; a layer is unknown; a channel is out of range,
            named twice, or goes without the others that must go with it.
    """
    document = _read(Path(path))
    about = document.pop(_ABOUT, {})
    of = about.get("fingerprint") if isinstance(about, Mapping) else None
    if of is not None and of != groups.graph.fingerprint:
        raise PlanError(f"{str(path)!r} is a mask of another network; its hash is {str(of)[:12]}.")
    layers = {_layer(member): (group, member) for group in groups for member in _layers(group)}
    gone: dict[str, tuple[str, Indices]] = {}
    for name, channels in document.items():
        if name not in layers:
            raise PlanError(
                f"{str(path)!r}: {name!r} is no layer whose channels can go; expected names of modules."
                f"{close_to(name, layers)}"
            )
        group, member = layers[name]
        units = _units(str(path), name, group, member, channels)
        known = gone.setdefault(group.name, (name, units))
        if not np.array_equal(known[1], units):
            raise PlanError(
                f"{str(path)!r}: {known[0]!r} and {name!r} are coupled and must lose the same channels; they lose "
                f"{len(known[1])} and {len(units)}, not the same ones."
            )
    kept = {n: np.setdiff1d(np.arange(groups[n].width), units) for n, (_, units) in gone.items()}
    return plan_from_kept(groups, kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the mask {str(path)!r}: {error}.") from error
    if not isinstance(document, dict):
        raise PlanError(f"{str(path)!r} holds {type(document).__name__}; expected an object of layer names.")
    return document


def _units(path: str, name: str, group: ChannelGroup, member: Member, channels: Any) -> Indices:
    """Units of a group that a layer's channels make up."""
    is_list = isinstance(channels, list) and all(isinstance(c, int) and not isinstance(c, bool) for c in channels)
    if not is_list or len(set(channels)) < len(channels) or not set(channels) <= set(range(member.size)):
        raise PlanError(
            f"{path!r}: {name!r} must have different whole numbers below {member.size}; it has {channels!r}."
        )
    is_gone = np.isin(member.positions, channels)
    units = np.unique(member.units[is_gone])
    if np.isin(member.units, units).sum() != len(channels):
        raise PlanError(
            f"{path!r}: {len(channels)} channels of {name!r} are no whole units of group {group.name!r}; expected all "
            f"channels of a unit together."
        )
    return units


def _layers(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if "out" in member.roles and member.name.endswith("weight")]


def _layer(member: Member) -> str:
    return member.name.removesuffix("weight").removesuffix(".")
