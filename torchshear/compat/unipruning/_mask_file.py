"""UniPruning's mask file: for each layer the channels that are to be removed, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from torchshear._arguments import check_kind, close_names
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners._planning import plan_from_kept
from torchshear.pruners.selection._request import layer_of
from torchshear.storage._reading import UnreadableError, as_path, read_json, shorten
from torchshear.storage._writing import atomic_path

Indices = npt.NDArray[np.int64]

_MAX_BYTES: Final = 1 << 25
_ABOUT: Final = "torchshear"  # the entry that says what the rest belongs to; no module of a layer may have this name


@dataclass(frozen=True, slots=True)
class _Said:
    """Units of one group in a mask file: the layer, the units that it has, and those of them that go."""

    layer: str
    own: Indices
    gone: Indices


def write_unipruning_mask(plan: PruningPlan, path: str | PathLike[str]) -> None:
    """Write what a plan removes as UniPruning's mask: layer name -> channels to remove.

    Layers are named by their modules, or by their weights where a module has several. Beside them stands one entry
    "torchshear", with the version, the hash of the network, and the sizes of the layers' weights.

    Args:
        plan: a plan that was made in this process.
        path: the file.

    Raises:
        ArgumentError: the plan was loaded from a file, or removes what no layer makes, as columns of embeddings.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    check_kind("plan", plan, PruningPlan, "a plan that was made in this process")
    groups = plan.analysis
    if groups is None:
        raise ArgumentError("the plan was loaded from a file; write the mask in the process that made it.")
    removed: dict[str, list[int]] = {}
    shapes: dict[str, list[int]] = {}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.width), plan.kept[group.name])
        if len(gone) and not _layers(group):
            raise ArgumentError(
                f"group {group.name!r} loses {len(gone)} units, and no layer makes them; a mask of UniPruning can only "
                f"say what layers lose of their outputs. Save the plan instead."
            )
        for member in _layers(group) if len(gone) else ():
            name = layer_of(member.name)
            channels = member.positions[np.isin(member.units, gone)]
            removed[name] = sorted({*removed.get(name, []), *channels.tolist()})
            shapes[name] = list(groups.graph.state[member.name].shape)
    about = {"version": version("torchshear"), "fingerprint": plan.fingerprint, "shapes": shapes}
    with atomic_path(as_path(path, "the path of a mask")) as temporary:
        temporary.write_text(json.dumps({_ABOUT: about, **removed}, indent=3) + "\n", encoding="utf-8")


def plan_from_unipruning_mask(groups: ChannelGroups, path: str | PathLike[str]) -> PruningPlan:
    """Read a mask of UniPruning as a plan.

    Args:
        groups: the analysed network.
        path: the file: layer name -> channels to remove, in any order. All layers of a group that it names must lose
            the same channels; layers that it does not name follow theirs.

    Returns:
        A plan that keeps all channels but those.

    Raises:
        ArgumentError: `path` is no path.
        PlanError: the file is missing, damaged or of another network; a layer is unknown; a channel is out of range,
            named twice, or goes without the others that must go with it.
    """
    check_groups(groups)
    document = _read(as_path(path, "the path of a mask"))
    about = document.pop(_ABOUT, {})
    of = about.get("fingerprint") if isinstance(about, Mapping) else None
    if of is not None and of != groups.graph.fingerprint:
        raise PlanError(f"{str(path)!r} is a mask of another network; its hash is {str(of)[:12]}.")
    layers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups:
        for member in _layers(group):
            layers.setdefault(layer_of(member.name), []).append((group, member))
    said: dict[str, list[_Said]] = {}
    for name, channels in document.items():
        if name not in layers:
            raise PlanError(
                f"{str(path)!r}: {name!r} is no layer whose channels can go; expected names of modules."
                f"{close_names(name, layers)}"
            )
        for group, one in _units(str(path), name, layers[name], channels):
            for other in said.setdefault(group.name, []):
                common = np.intersect1d(one.own, other.own)
                if not np.array_equal(np.intersect1d(one.gone, common), np.intersect1d(other.gone, common)):
                    raise PlanError(
                        f"{str(path)!r}: {other.layer!r} and {name!r} are coupled and must lose the same channels; "
                        f"they lose {len(other.gone)} and {len(one.gone)}, not the same ones."
                    )
            said[group.name].append(one)
    gone = {name: np.concatenate([one.gone for one in found]) for name, found in said.items()}
    kept = {name: np.setdiff1d(np.arange(groups[name].width), units) for name, units in gone.items()}
    return plan_from_kept(groups, kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path, _MAX_BYTES)
    except UnreadableError as error:
        raise PlanError(f"cannot read the mask {str(path)!r}: it {error}.") from error
    if not isinstance(document, dict):
        raise PlanError(f"{str(path)!r} holds {type(document).__name__}; expected an object of layer names.")
    return document


def _units(
    path: str, name: str, dimensions: list[tuple[ChannelGroup, Member]], channels: Any
) -> list[tuple[ChannelGroup, _Said]]:
    """Units of each group that a layer's channels make up; rows may be products of groups, as of heads and widths."""
    size = dimensions[0][1].size
    is_list = isinstance(channels, list) and all(isinstance(c, int) and not isinstance(c, bool) for c in channels)
    if not is_list or len(set(channels)) < len(channels) or not set(channels) <= set(range(size)):
        raise PlanError(
            f"{path!r}: {name!r} must have different whole numbers below {size}; it has {shorten(channels)}."
        )
    is_gone = np.zeros(size, bool)
    is_gone[channels] = True
    found, explained = [], np.zeros(size, bool)
    for group, member in dimensions:
        n_left = np.bincount(member.units[~is_gone[member.positions]], minlength=group.width)
        units = np.intersect1d(np.flatnonzero(n_left == 0), member.units)
        explained[member.positions[np.isin(member.units, units)]] = True
        found.append((group, _Said(name, np.unique(member.units), units)))
    if not np.array_equal(explained, is_gone):
        names = " and ".join(repr(group.name) for group, _ in dimensions)
        raise PlanError(
            f"{path!r}: {len(channels)} channels of {name!r} are no whole units of group {names}; expected all "
            f"channels of a unit together."
        )
    return found


def _layers(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if "out" in member.purposes]
