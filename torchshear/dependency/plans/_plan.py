"""The pruning plan: what is kept of every group, and hence of every parameter. Frozen; carries no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchshear._arguments import check_kind
from torchshear._tables import html_table
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.plans._composition import compose_units
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form, read_form, write_form
from torchshear.dependency.plans._plan_file import (
    IndexReader,
    IndexWriter,
    damage_error,
    read_document,
    read_name,
    read_size,
    write_document,
)
from torchshear.dependency.plans._tensor_plans import (
    OutputPlan,
    StatePlan,
    are_ascending,
    make_state_plan,
    output_plans,
    read_outputs,
    read_state,
    write_outputs,
    write_state,
)
from torchshear.errors import PlanError
from torchshear.graph import ExampleInputs
from torchshear.graph._graph import Parts

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """The kept units of one channel group.

    Attributes:
        name: name of the group.
        width: number of units before.
        kept: indices of the units that stay, ascending.
        note: why the group keeps more or other than asked; "" if it does not.
        role: what the group's units are for, "" in plans that do not say.
        ratio: fraction of the units that was to go; None if the group was to stay whole or its units were given.
    """

    name: str
    width: int
    kept: Indices
    note: str = ""
    role: str = ""
    ratio: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PruningPlan:
    """The channels of a model that are kept.

    Attributes:
        groups: what is kept of each channel group, prunable or not.
        state: canonical name -> what is kept, for parameters and buffers that change.
        whole: canonical name -> shape, for those that a `state_dict` holds and that stay as they are.
        aliases: further names of tied parameters -> canonical name.
        fingerprint: hash of the graph that the plan is for.
        values: canonical name -> hash of its values, for buffers and constants whose values decide which channels go
            together, as an order of channels does; the plan is for models that have the same.
        model_type: qualified class name of the model.
        inputs: description of the example inputs, from which a model can be traced again; None if they are not
            plain data. Of a plan for parts of a model: `(args, kwargs)` of each captured call.
        request: the request: criterion, ratio, alignment.
        refused: group name or "parameter[dimension]" -> why it does not shrink.
        versions: versions of torchshear and torch that made the plan.
        prunable_outputs: names or patterns of outputs that may shrink.
        outputs: what is kept of each of these.
        parts: which modules of the model the plan is for, and what of them must stay whole; None for a whole model.
        form: what made the form of the result of `torchshear.prune`, for the same form again on a fresh model; None
            where no form was made yet, so that `torchshear.shrink` looks for one.
        analysis: the analysed network, while the plan lives in the process that made it; not saved.
    """

    groups: tuple[GroupPlan, ...]
    state: Mapping[str, StatePlan]
    whole: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    fingerprint: str
    model_type: str
    inputs: dict[str, Any] | None
    request: Mapping[str, Any]
    refused: Mapping[str, str]
    versions: Mapping[str, str]
    values: Mapping[str, str] = field(default_factory=dict)
    prunable_outputs: tuple[str, ...] = ()
    outputs: tuple[OutputPlan, ...] = ()
    parts: Parts | None = None
    form: Form | None = None
    analysis: ChannelGroups | None = None

    def __repr__(self) -> str:
        n_units = sum(group.width for group in self.groups)
        return (
            f"<PruningPlan for {self.model_type.rpartition('.')[2]}: {self.n_cut} of {n_units} units go, "
            f"{len(self.groups)} groups, {len(self.state)} tensors shrink{self._purpose()}>"
        )

    def _purpose(self) -> str:
        """Say for which latency on which device the plan was made, or ""."""
        target, device = self.request.get("target_latency"), self.request.get("device")
        if target is None or not isinstance(device, Mapping):
            return ""
        where = [f"{name} {device[name]}" for name in ("threads", "batch", "runtime", "cpu") if name in device]
        return f", for latency {target} on {', '.join(where)}"

    def _repr_html_(self) -> str:
        rows = ((group.name, group.width, len(group.kept), group.note) for group in self.groups)
        return html_table("Pruning plan", ("group", "width", "kept", "note"), rows, [repr(self)])

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of all parameters and buffers that shrink.

        Returns:
            Name of a parameter or buffer -> bool tensor of its original shape, True = kept. Tied parameters are listed
            under each of their names.
        """
        masks = {name: entry.mask() for name, entry in self.state.items() if entry.kept}
        for alias, name in self.aliases.items():
            if name in masks:
                masks[alias] = masks[name]
        return masks

    @property
    def kept(self) -> dict[str, Indices]:
        """Group name -> kept units; copies, that can be used as any array."""
        return {group.name: group.kept.copy() for group in self.groups}

    @property
    def n_cut(self) -> int:
        """Number of units that go, over all groups."""
        return sum(group.width - len(group.kept) for group in self.groups)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as readable JSON; long index lists go to a safetensors file beside it.

        Raises:
            OutputError: the folder is not writable or the disk is full; what was there before is unchanged.
        """
        writer = IndexWriter()
        write_document(path, _to_document(self, writer), writer)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "PruningPlan":
        """Read a plan. No code in the file is run.

        Raises:
            PlanError: the file is missing, truncated, damaged, or of a newer format.
        """
        document, reader = read_document(path)
        return _from_document(Path(path), document, reader)

    def then(self, second: "PruningPlan") -> "PruningPlan":
        """Compose with a plan for the model that this plan gives: both in one, for the original model.

        The result holds no form: that of either does not say what both need.

        Raises:
            ArgumentError: `second` is no plan.
            PlanError: it is not a plan for the pruned model.
        """
        check_kind("second", second, PruningPlan, "a plan for what this one leaves, as torchshear.plan makes")
        return compose(self, second)

    def __eq__(self, other: object) -> bool:
        """Plans are equal if they keep the same of the same network."""
        if not isinstance(other, PruningPlan):
            return NotImplemented
        same_network = self.fingerprint == other.fingerprint and self.values == other.values
        return same_network and _same_kept(self.kept, other.kept)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.n_cut))


def _same_kept(left: Mapping[str, Indices], right: Mapping[str, Indices]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def make_plan(
    cut: Cut,
    kept: Mapping[str, Indices],
    request: Mapping[str, Any],
    notes: Mapping[str, str],
    ratios: Mapping[str, float] | None = None,
) -> PruningPlan:
    """Write down a cut as a plan.

    Args:
        cut: the checked choice of units.
        kept: group name -> kept units; groups not named keep everything.
        request: the request, as plain data.
        notes: group name -> why it keeps more or other than asked.
        ratios: group name -> fraction of units that was to go, for groups of which something was to.
    """
    ratios = ratios or {}
    groups = cut.groups
    graph = groups.graph
    made = {name: make_state_plan(cut, name) for name, entry in graph.state.items() if entry.kind != "constant"}
    state = {name: entry for name, entry in made.items() if entry is not None}
    refused = {group.name: group.reason for group in groups if group.reason}
    refused |= {f"{fixed.name}[{fixed.dim}]": fixed.reason for fixed in groups.fixed}
    units = {g.name: np.sort(np.asarray(kept.get(g.name, np.arange(g.width)), np.int64)) for g in groups}
    for array in units.values():
        array.flags.writeable = False
    return PruningPlan(
        groups=tuple(
            GroupPlan(g.name, g.width, units[g.name], notes.get(g.name, ""), g.role, ratios.get(g.name)) for g in groups
        ),
        state=state,
        whole={name: entry.shape for name, entry in graph.state.items() if entry.is_saved and name not in state},
        aliases={alias: name for alias, name in graph.aliases.items() if alias != name},
        fingerprint=graph.fingerprint,
        model_type=graph.model_type,
        inputs=graph.inputs.to_json(),
        request=dict(request),
        refused=refused,
        versions={"torchshear": version("torchshear"), "torch": str(torch.__version__)},
        values=dict(groups.facts.values),
        prunable_outputs=groups.prunable_outputs,
        outputs=output_plans(cut),
        parts=graph.parts,
        analysis=groups,
    )


def compose(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """Both plans in one; see `PruningPlan.then`."""
    if first.analysis is None:
        raise PlanError("the first plan was loaded from a file; compose plans in the process that made the first.")
    state = {first.aliases.get(name, name): entry for name, entry in second.state.items()}
    shapes = {name: entry.shape for name, entry in state.items() if entry.is_saved}
    shapes |= {first.aliases.get(name, name): shape for name, shape in second.whole.items()}
    left = {name: entry.new_shape for name, entry in first.state.items()} | dict(first.whole)
    for name, shape in shapes.items():
        if left.get(name) != shape:
            what = f"of which the first leaves {left[name]}" if name in left else "which is not in the first"
            raise PlanError(f"the second plan has {name!r} of shape {shape}, {what}: it is for another model.")
    kept = compose_units(first.analysis, first.kept, state)
    request = {"first": dict(first.request), "second": dict(second.request)}
    return make_plan(Cut(first.analysis, kept), kept, request, {})


def _to_document(plan: PruningPlan, writer: IndexWriter) -> dict[str, Any]:
    return {
        "model": {
            "type": plan.model_type,
            "fingerprint": plan.fingerprint,
            **({"values": dict(plan.values)} if plan.values else {}),
            "inputs": plan.inputs,
            **({"parts": {"calls": list(plan.parts.calls), "pinned": dict(plan.parts.pinned)}} if plan.parts else {}),
        },
        "request": dict(plan.request),
        "versions": dict(plan.versions),
        "groups": [
            {
                "name": g.name,
                **({"role": g.role} if g.role else {}),
                "width": g.width,
                **({"ratio": g.ratio} if g.ratio is not None else {}),
                "kept": writer.write(g.kept),
                **({"note": g.note} if g.note else {}),
            }
            for g in plan.groups
        ],
        "state": {name: write_state(entry, writer) for name, entry in plan.state.items()},
        "whole": {name: list(shape) for name, shape in plan.whole.items()},
        **write_outputs(plan.prunable_outputs, plan.outputs, writer),
        "aliases": dict(plan.aliases),
        "refused": dict(plan.refused),
        **({} if plan.form is None else {"form": write_form(plan.form, writer)}),
    }


def _from_document(path: Path, document: dict[str, Any], reader: IndexReader) -> PruningPlan:
    try:
        plan = PruningPlan(
            groups=tuple(
                GroupPlan(
                    read_name(g["name"]),
                    read_size(g["width"]),
                    reader.read(g["kept"]),
                    read_name(g.get("note", "")),
                    read_name(g.get("role", "")),
                    _read_ratio(g.get("ratio")),
                )
                for g in document["groups"]
            ),
            state={name: read_state(entry, reader) for name, entry in document["state"].items()},
            whole={name: tuple(read_size(size) for size in shape) for name, shape in document["whole"].items()},
            aliases={name: read_name(other) for name, other in document["aliases"].items()},
            fingerprint=read_name(document["model"]["fingerprint"]),
            model_type=read_name(document["model"]["type"]),
            inputs=_read_inputs(document["model"]["inputs"]),
            request=dict(document["request"]),
            refused={name: read_name(reason) for name, reason in document["refused"].items()},
            versions={name: read_name(version) for name, version in document["versions"].items()},
            values={name: read_name(digest) for name, digest in document["model"].get("values", {}).items()},
            prunable_outputs=tuple(read_name(name) for name in document.get("prunable_outputs", ())),
            outputs=read_outputs(document.get("outputs", []), reader),
            parts=_read_parts(document["model"].get("parts")),
            form=read_form(document["form"], reader) if "form" in document else None,
        )
    except PlanError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise damage_error(path, f"entry {error} is missing or of the wrong kind") from error
    _check_ranges(path, plan)
    _check_whole(path, plan)
    return plan


def _read_ratio(value: Any) -> float | None:
    if not isinstance(value, float | int | None):
        raise TypeError(f"{str(value)[:40]!r} in place of a ratio")
    return None if value is None else float(value)


def _read_inputs(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description of inputs, of which inputs without values are made, to see that it is whole."""
    if entry is not None:
        ExampleInputs.from_json(entry, "meta")
    return entry


def _read_parts(entry: Any) -> Parts | None:
    if entry is None:
        return None
    calls, pinned = list(entry["calls"]), dict(entry["pinned"])
    if not calls or not all(isinstance(text, str) for text in (*calls, *pinned, *pinned.values())):
        raise ValueError("parts")
    return Parts(tuple(calls), pinned)


def _check_ranges(path: Path, plan: PruningPlan) -> None:
    """Indices that lie outside what they index are damage, found on reading and not when a tensor is cut."""
    for group in plan.groups:
        if not are_ascending(group.kept, group.width):
            raise damage_error(
                path, f"group {group.name!r} keeps indices that are not ascending numbers in 0..{group.width - 1}"
            )
    for name, entry in plan.state.items():
        damage = entry.damage()
        if damage is not None:
            raise damage_error(path, f"{name!r} {damage}")
    if plan.form is not None and set(plan.form.parts) != set(plan.parts.names if plan.parts else ()):
        raise damage_error(path, "its form is of other parts of the model than the plan")
    for output in plan.outputs:
        for dim, kept in output.kept.items():
            size = output.shape[dim] if 0 <= dim < len(output.shape) else None
            if size is None:
                raise damage_error(path, f"output {output.name!r} has no dimension {dim} that can shrink")
            _check_indices(path, f"output {output.name!r} dimension {dim}", kept, size)


def _check_whole(path: Path, plan: PruningPlan) -> None:
    """Check that entries which say the same agree. Units and positions are compared where the network is known."""
    names = [group.name for group in plan.groups]
    if len(set(names)) < len(names):
        raise damage_error(path, f"group {max(names, key=names.count)!r} stands there twice")
    if plan.outputs and not plan.prunable_outputs:
        raise damage_error(path, f"it has kept positions of output {plan.outputs[0].name!r}, but no output may shrink")
    both = sorted(plan.state.keys() & plan.whole.keys())
    if both:
        raise damage_error(path, f"{both[0]!r} is said to shrink and to stay whole")
    named = sorted(plan.aliases.keys() & (plan.state.keys() | plan.whole.keys()))
    if named:
        raise damage_error(path, f"{named[0]!r} is said to be a name of another parameter, and has an entry of its own")
    if bool(plan.n_cut) != bool(plan.state):
        parts = ("some", "none") if plan.n_cut else ("none", "some")
        raise damage_error(path, f"{parts[0]} of its groups shrink, and {parts[1]} of its parameters and buffers")


def _check_indices(path: Path, what: str, kept: Indices, size: int) -> None:
    if not kept.size or kept.min() < 0 or kept.max() >= size or (np.diff(kept) <= 0).any():
        raise damage_error(path, f"{what} keeps indices that are not ascending numbers in 0..{size - 1}")
