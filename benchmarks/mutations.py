"""Make every operator rule wrong, one way at a time, and see whether `torchshear.prune` notices.

    python benchmarks/mutations.py                  # all rules; writes benchmarks/results/mutations.md and .json
    python benchmarks/mutations.py --only cumsum    # operators whose name contains it; prints, writes nothing

For each operator of the registry there are small networks that can be cut through it. The rule is changed at one call,
from outside the library (`tests/mutating.py`), and the network is pruned by half. What comes of it:

- caught: an error of the library, `VerificationError` or another.
- crashed: an error that is not the library's.
- no effect: the same plan and the same function as with the right rule.
- harmless: another plan, and the pruned model is right for it by an oracle that shares no code with the shrinker.
- survived: a pruned model that is wrong, or that cannot be shown to be right.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mutation_networks import CASES, EXPLAINED, WITHOUT_CASE, Case

import torchshear
import torchshear.api
from tests.mutating import Mutation, Watched, calls_of, mutated, mutations_of, reads_positions, watched
from tests.networks import Net, randomise
from tests.oracle import masked_copy
from torchshear.dependency import ChannelGroups, operator_rule
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._choosing import grouped_product
from torchshear.dependency.rules._registry import _POSITION_RULES, _RULES, registered_operators
from torchshear.errors import TorchshearError
from torchshear.pruners import plan_from_kept, random_criterion

RESULTS = Path(__file__).resolve().parent / "results"
OUTCOMES = ("caught", "crashed", "no effect", "harmless", "survived")
TOLERANCE = 1e-9
MIXED = "before a softmax"
STAND_IN = "experts.runs"  # for aten._grouped_mm

operator_rule(STAND_IN)(grouped_product)


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation."""

    operator: str
    network: str
    mutation: Mutation
    outcome: str
    message: str = ""


@dataclass
class Trial:
    """A network, pruned with the right rules, and its right answers.

    Attributes:
        seed: of the scores; the first with which no axis of the calls in question keeps a row that is its own mirror
            image, if there is one.
        is_zeroing: whether the pruned model is the original with the cut parameters set to zero, so that this can be
            asked of others.
    """

    case: Case
    model: nn.Module
    inputs: tuple[Tensor, ...]
    seed: int
    right: torchshear.PruneResult
    seen: Watched
    tests: list[tuple[Tensor, ...]] = field(default_factory=list)
    is_zeroing: bool = False

    @property
    def groups(self) -> ChannelGroups:
        """The network, analysed with the right rules."""
        assert self.right.plan.analysis is not None
        return self.right.plan.analysis

    def prune(self) -> torchshear.PruneResult:
        """Prune it by half, by scores that the seed gives; it is captured only once, since rules come afterwards."""
        graph = self.groups.graph
        with mock.patch.object(torchshear.api, "trace", return_value=graph):
            return torchshear.prune(self.model, self.inputs, criterion=random_criterion(self.seed), ratio=0.5)


def prepare(case: Case, operator: str, seed: int) -> Trial:
    """Build a network and prune it with the right rules, with the first of some seeds that gives no symmetric cut."""
    torch.manual_seed(seed)
    model = randomise(Net(case.run, **case.parts()).double().eval(), seed)
    generator = torch.Generator().manual_seed(seed + 3)
    inputs = _like(case, generator)
    for at in range(seed, seed + 20):
        with watched() as seen:
            right = torchshear.prune(model, inputs, criterion=random_criterion(at), ratio=0.5)
        trial = Trial(case, model, inputs, at, right, seen)
        if not _is_symmetric(trial, operator):
            break
    trial.tests = [_like(case, generator) for _ in range(3)]
    trial.is_zeroing = _agree(trial, masked_copy(model, right.plan.masks()), right.model)
    return trial


def _like(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random inputs for a network; a tensor that is given itself has its values in another order."""
    return tuple(
        given.flatten()[torch.randperm(given.numel(), generator=generator)].view_as(given)
        if isinstance(given, Tensor)
        else torch.randn(given, generator=generator, dtype=torch.float64)
        for given in case.inputs
    )


def _is_symmetric(trial: Trial, operator: str) -> bool:
    cut = Cut(trial.groups, trial.right.plan.kept)
    for node in calls_of(trial.groups, operator):
        result = trial.groups.facts.axes.get(node.name)
        for axes in result if isinstance(result, list) else [result or ()]:
            for keep in (cut.keep(axis) for axis in axes if cut.changes(axis)):
                if np.array_equal(keep, keep[::-1]) or np.array_equal(keep, np.roll(keep, 1)):
                    return True
    return False


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return model(*(given.clone() for given in inputs))


def _agree(trial: Trial, expected: nn.Module, actual: nn.Module) -> bool:
    """Whether two models compute the same on inputs that no proof has seen."""
    for inputs in trial.tests:
        one = _outputs(expected, inputs)
        try:
            other = _outputs(actual, inputs)
        except RuntimeError:  # sizes that fit some batches only
            return False
        if one.shape != other.shape or not torch.isfinite(one).all():
            return False
        if not bool((one - other).abs().max() <= TOLERANCE * (1 + one.abs().max())):
            return False
    return True


def _same_masks(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def judge(trial: Trial, operator: str, mutation: Mutation) -> Outcome:
    """Prune with the wrong rule, and say what came of it."""
    named = (operator, trial.case.name, mutation)
    try:
        with mutated(mutation):
            result = trial.prune()
    except TorchshearError as error:
        return Outcome(*named, "caught", f"{type(error).__name__}: {_first_line(error)}")
    except Exception as error:
        return Outcome(*named, "crashed", f"{type(error).__name__} in {_place(error)}: {_first_line(error)}")
    is_same_plan = _same_masks(result.plan.masks(), trial.right.plan.masks())
    if is_same_plan and _agree(trial, trial.right.model, result.model):
        return Outcome(*named, "no effect")
    why = _why_wrong(trial, result)
    if why is None:
        return Outcome(*named, "harmless", "the same plan" if is_same_plan else "another plan")
    return Outcome(*named, "survived", f"{why}; {result.verification.reference}, {result.form}")


def _place(error: BaseException) -> str:
    """Where in the library an error came up, but for the functions that call operators."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torchshear/" in frame.filename]
    found = [f for f in frames if not f.filename.endswith(("_precision.py", "_run.py"))] or frames
    return f"{Path(found[-1].filename).name} {found[-1].name}" if found else "no file of the library"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def _why_wrong(trial: Trial, result: torchshear.PruneResult) -> str | None:
    """Why a pruned model is not right for its own plan, by an oracle that shares nothing with the shrinker; or None."""
    masks = result.plan.masks()
    if trial.is_zeroing:
        return None if _agree(trial, masked_copy(trial.model, masks), result.model) else "not the masked model"
    try:
        plan = plan_from_kept(trial.groups, _kept_by(trial.groups, masks))
    except TorchshearError:
        return "the right rules allow no such plan"
    if not _same_masks(plan.masks(), masks):
        return "no plan of the right rules cuts these parameters"
    expected = torchshear.shrink(trial.model, plan)
    return None if _agree(trial, expected, result.model) else "not what the right rules make of the same plan"


def _kept_by(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Units of which any position of a parameter is left, by the right rules."""
    store, alive = groups.algebra.store, set()
    for name, axes in groups.facts.state_axes.items():
        if groups.graph.state[name].kind == "constant":  # of which a plan has no mask
            continue
        for dim, axis in enumerate(axes):
            keep = np.ones(axis.size, bool)
            if name in masks:
                keep = masks[name].movedim(dim, 0).reshape(axis.size, -1).any(1).numpy()
            alive |= set(store.resolve(axis.units)[keep].flatten().tolist())
    atoms = {group.name: store.resolve(group.atoms[:, None])[:, 0].tolist() for group in groups.prunable}
    return {name: [unit for unit, atom in enumerate(own) if atom in alive] for name, own in atoms.items()}


def run_operator(operator: str, seed: int) -> tuple[list[Outcome], list[str]]:
    """Make the rule of one operator wrong in all ways, in all networks for it; also says which networks are no good."""
    outcomes: list[Outcome] = []
    useless: list[str] = []
    name = operator.removeprefix("positions:")
    for case in CASES:
        if operator not in case.operators:
            continue
        try:
            trial = prepare(case, name, seed)
        except TorchshearError as error:
            useless.append(f"{operator}: a network ({case.name or 'its own'}) that is refused: {_first_line(error)}")
            continue
        cut = Cut(trial.groups, trial.right.plan.kept)
        calls = calls_of(trial.groups, name)
        if operator != name:
            calls = [node for node in calls if reads_positions(trial.groups, node)]
        mutations = [m for node in calls for m in mutations_of(trial.groups, cut, node, trial.seen)]
        if case.name == MIXED:  # the plain network shows the others
            mutations = [m for m in mutations if m.kind in ("mirror", "swap") or m.demand == "tie"]
        if not calls:
            useless.append(f"{operator}: a network ({case.name or 'its own'}) that does not call it")
        outcomes += [judge(trial, operator, mutation) for mutation in mutations]
    return outcomes, useless


def all_operators() -> dict[str, str]:
    """Each operator that has a rule, with the name of the rule; those that read positions by a name of their own.

    Elementwise operators without a name of their own, and overloads for which the networks have a case, are added.
    """
    names = {name: _RULES[name].__name__ for name in registered_operators() if name != "torchshear.pointwise"}
    names |= {f"positions:{name}": rule.__name__ for name, rule in sorted(_POSITION_RULES.items())}
    for case in CASES:
        for name in case.operators:
            if name not in names:
                base = ".".join(name.split(".")[:2])
                rule = _RULES.get(base) if base in _RULES else _RULES["torchshear.pointwise"]
                names[name] = rule.__name__
    return names


def _is_explained(outcome: Outcome) -> str:
    for (operator, mutation), why in EXPLAINED.items():
        if operator in (outcome.operator, "*") and str(outcome.mutation).startswith(mutation):
            return why
    return ""


def write_results(outcomes: list[Outcome], rules: Mapping[str, str], missing: Mapping[str, str], seed: int) -> str:
    """Write the table as Markdown and JSON; gives the Markdown."""
    by_operator: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_operator[outcome.operator].append(outcome)
    lines = [
        "# Wrong rules, and what becomes of them",
        "",
        f"`python benchmarks/mutations.py --seed {seed}`: each rule is made wrong at one call of a small network, and",
        "`torchshear.prune` is asked to prune it by half. `benchmarks/mutations.py` says what the outcomes mean.",
        "",
        _summary(outcomes),
        "",
        *_listed("Survivors", [o for o in outcomes if o.outcome == "survived"]),
        *_crashes([o for o in outcomes if o.outcome == "crashed"]),
        "## Operators without a case",
        "",
        *(f"- `{name}`: {why}" for name, why in missing.items()),
        "",
        "## All operators",
        "",
        "| operator | rule | " + " | ".join(OUTCOMES) + " |",
        "|---|---|" + "---:|" * len(OUTCOMES),
    ]
    for name in rules:
        counts = Counter(outcome.outcome for outcome in by_operator[name])
        cells = " | ".join(str(counts[outcome] or "") for outcome in OUTCOMES)
        lines.append(f"| {name} | {rules[name].lstrip('_')} | {cells} |")
    text = "\n".join(lines) + "\n"
    RESULTS.joinpath("mutations.md").write_text(text)
    RESULTS.joinpath("mutations.json").write_text(json.dumps(_as_json(by_operator, rules, missing), indent=1) + "\n")
    return text


def _summary(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.outcome for outcome in outcomes)
    return f"{len(outcomes)} mutations: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES) + "."


def _listed(title: str, outcomes: list[Outcome]) -> list[str]:
    """A section with one line an operator, mutation and message, and how often."""
    counts = Counter((o.operator, str(o.mutation), _is_explained(o) or o.message) for o in outcomes)
    rows = [f"| {operator} | {what} | {n} | {why} |" for (operator, what, why), n in sorted(counts.items())]
    table = ["| operator | mutation | times | why |", "|---|---|---:|---|", *rows] if rows else ["None."]
    return [f"## {title}", "", *table, ""]


def _crashes(outcomes: list[Outcome]) -> list[str]:
    """A section with one line a place where errors came up, and an example."""
    places: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        places[outcome.message.partition(":")[0]].append(outcome)
    rows = [
        f"| {place} | {len(found)} | {found[0].operator}, {found[0].mutation}: {found[0].message.partition(': ')[2]} |"
        for place, found in sorted(places.items())
    ]
    table = ["| error | times | example |", "|---|---:|---|", *rows] if rows else ["None."]
    return ["## Crashes: errors that are not the library's", "", *table, ""]


def _as_json(
    by_operator: Mapping[str, list[Outcome]], rules: Mapping[str, str], missing: Mapping[str, str]
) -> dict[str, Any]:
    """All outcomes, counted by operator and mutation."""
    operators = {}
    for name, rule in rules.items():
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for outcome in by_operator[name]:
            table[str(outcome.mutation)][outcome.outcome] += 1
        operators[name] = {"rule": rule, "mutations": table}
    return {"torch": torch.__version__, "operators": operators, "without_case": dict(missing)}


def main() -> int:
    """Parse the command line and run; gives 1 where something survives unexplained or an operator has no case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="operators whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and scores")
    parser.add_argument("--verbose", action="store_true", help="print every mutation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rules = {name: rule for name, rule in all_operators().items() if options.only in name}
    started, outcomes, useless = time.perf_counter(), [], []
    for operator in rules:
        found, no_good = run_operator(operator, options.seed)
        outcomes += found
        useless += no_good
        bad = [o for o in found if options.verbose or o.outcome in ("survived", "crashed")]
        for outcome in bad:
            print(
                f"{operator} {outcome.mutation.node} {outcome.mutation}: {outcome.outcome} {outcome.message}",
                flush=True,
            )
    print(_summary(outcomes), f"{time.perf_counter() - started:.0f} s")
    print("\n".join(useless))
    judged = {outcome.operator for outcome in outcomes}
    missing = {name: WITHOUT_CASE.get(name, "") for name in rules if name not in judged}
    unknown = [name for name, why in missing.items() if not why]
    print("Without a case:", missing)
    if not options.only:
        write_results(outcomes, rules, missing, options.seed)
        assert not unknown, f"no network cuts through {unknown}; add one or say why there is none"
    return int(any(o.outcome == "survived" and not _is_explained(o) for o in outcomes) or bool(unknown or useless))


if __name__ == "__main__":
    sys.exit(main())
