"""Candidates of a search: pruned to widths, compensated or fine-tuned, and scored by the user's function."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchshear._making import shrink_and_record
from torchshear.compensation import Compensated, compensate_by
from torchshear.dependency.plans._form import FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import DataError, SearchError, TorchshearError, first_line
from torchshear.graph.model._copy import copy_model
from torchshear.options import CalibrationOptions, Compensation
from torchshear.searching._carried_state import carry_state
from torchshear.searching._early_stopping import HopelessError, IsHopeless, ScoreError, Watch, number_of
from torchshear.searching._method import Proposal
from torchshear.searching._reused_activations import ActivationStore
from torchshear.searching._space import SearchSpace, WidthVector
from torchshear.speedup._shrink import Shrunk, shrink_to_form
from torchshear.speedup.latency._cache import only_work_on, while_none_measures
from torchshear.speedup.shrinking._whole_model import make_unproved_traced

Evaluate = Callable[[nn.Module], float | Iterator[float]]
FineTune = Callable[[nn.Module], nn.Module | Iterator[float] | None]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Model at some widths, as it is scored.

    Attributes:
        proposal: the widths.
        plan: what it keeps.
        shrunk: the model after the cut, not proved.
        after: the same after the compensation or the fine-tuning.
    """

    proposal: Proposal
    plan: PruningPlan
    shrunk: Shrunk
    after: Compensated


@dataclass(frozen=True, slots=True)
class Score:
    """Score of a candidate.

    Attributes:
        value: the number that `evaluate` gave, or the last one before the candidate was given up; None without any.
        seconds: how long it took to make and to score it.
        error: why there is none, in one line, else "".
        cause: the exception behind it, if there was one in this process.
        trace: its traceback as text, if it was in another one.
        is_stopped: whether the candidate was given up.
    """

    value: float | None
    seconds: float
    error: str = ""
    cause: BaseException | None = field(default=None, compare=False)
    trace: str = ""
    is_stopped: bool = False


@dataclass(slots=True)
class CandidateMaker:
    """Makes candidates of one model and scores them.

    Every candidate is made and scored from the same random state, and cut from the dense model, so that its score
    depends on its widths alone. With fine-tuning, one that has a path takes the weights that were fine-tuned at the
    path's last widths; these are made again where they are not at hand. No candidate is proved: that takes several
    times as long as the cut, and the result is.
    """

    model: nn.Module
    args: tuple[Any, ...] | Tensor
    kwargs: Mapping[str, Any] | None
    space: SearchSpace
    evaluate: Evaluate
    finetune: FineTune | None
    compensate: Compensation
    calibration: CalibrationOptions
    form: FormKind | None
    seed: int
    said: Mapping[str, Any]
    activations: ActivationStore | None = None
    best: Candidate | None = None
    _tuned: dict[tuple[WidthVector, ...], Candidate] = field(default_factory=dict)

    def plan(self, widths: WidthVector) -> PruningPlan:
        """Return the plan that keeps the best units of each group."""
        return self.space.ranked.plan(dict(zip(self.space.names, widths, strict=True)), self.said)

    def score(self, proposal: Proposal, is_hopeless: IsHopeless | None = None) -> tuple[Score, Candidate | None]:
        """Make and score a candidate; one that cannot be made or scored has a score without a value.

        Args:
            proposal: its widths.
            is_hopeless: asked after each score on the way whether to give it up.

        Raises:
            DataError: the data for the compensation does not fit the model, so that no candidate can be made.
        """
        start = time.perf_counter()
        watch = Watch(is_hopeless)
        try:
            with self._devices():
                start = time.perf_counter()  # waiting for devices is no time of the candidate
                candidate = self.make(proposal, watch)
                value = self._evaluate(self._scored(candidate), watch)
        except HopelessError as stop:
            return Score(stop.value, time.perf_counter() - start, is_stopped=True), None
        except DataError:
            raise
        except SearchError as error:  # of the user's functions: theirs is the traceback that helps
            return Score(None, time.perf_counter() - start, first_line(error), error.__cause__), None
        except TorchshearError as error:
            return Score(None, time.perf_counter() - start, first_line(error), error), None
        return Score(value, time.perf_counter() - start), candidate

    @contextmanager
    def _devices(self) -> Iterator[None]:
        """Wait until no other process works on the model's GPUs or, with a target of latency, measures; others wait."""
        devices = {tensor.device for tensor in self.model.state_dict().values() if isinstance(tensor, Tensor)}
        gpus = {str(torch.cuda.get_device_properties(one).uuid) for one in devices if one.type == "cuda"}
        is_measured = self.space.budget.table is not None
        with while_none_measures() if is_measured else nullcontext(), only_work_on(gpus):
            yield

    def make(self, proposal: Proposal, watch: Watch | None = None) -> Candidate:
        """Prune to the widths of a proposal, without a proof, and compensate and fine-tune as it asks.

        Raises:
            SearchError: `finetune` fails.
            HopelessError: the candidate is given up for a score while it is fine-tuned.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            plan = self.plan(proposal.widths)
            shrunk = shrink_to_form(self.model, plan, self.args, self.kwargs, self.form, verify=False)
            return Candidate(proposal, plan, shrunk, self._after(proposal, plan, shrunk, watch or Watch()))

    def prove(self, candidate: Candidate) -> tuple[Candidate, Shrunk]:
        """Prove the cut of a candidate; make it again where only another form is proved.

        Raises:
            VerificationError: the shrunk model is not equal to the masked one.
        """
        shrunk, plan = shrink_and_record(self.model, candidate.plan, self.args, self.kwargs, self.form)
        if shrunk.form != candidate.shrunk.form:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                after = self._after(candidate.proposal, plan, shrunk, Watch())
                candidate = Candidate(candidate.proposal, plan, shrunk, after)
        return Candidate(candidate.proposal, plan, candidate.shrunk, candidate.after), shrunk

    def _after(self, proposal: Proposal, plan: PruningPlan, shrunk: Shrunk, watch: Watch) -> Compensated:
        if self.finetune is not None and proposal.path:
            small = copy_model(shrunk.model)
            base = self._base(proposal.path)
            carry_state(base.plan, base.after.model, plan, small)
            after = Compensated(small)
        else:
            method = self.compensate if plan.n_cut else "none"  # nothing is missing from the dense model
            after = compensate_by(method, self.model, shrunk.model, plan, self.calibration, self.args, self.kwargs)
        if self.finetune is None or not proposal.is_tuned:
            return after
        return _trained(after, self.finetune, "finetune", watch)

    def finish(self, candidate: Candidate, finetune: FineTune) -> tuple[Candidate, float]:
        """Train the best candidate on after the search, and score it.

        Raises:
            SearchError: the training or `evaluate` fails.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            after = _trained(candidate.after, finetune, "finetune_best", Watch())
        return replace(candidate, after=after), self._evaluate(copy_model(after.model), Watch())

    def _base(self, path: tuple[WidthVector, ...]) -> Candidate:
        """Return the fine-tuned model at the last widths of a path."""
        known = self._tuned.get(path)
        if known is None:
            known = self.make(Proposal(path[-1], path[:-1]))
            self._tuned = {path: known}  # that of the round before is not needed any more
        return known

    def _scored(self, candidate: Candidate) -> nn.Module:
        """Return the copy of a candidate that is scored; its graph alone where it shares activations with others."""
        if self.activations is None:
            return copy_model(candidate.after.model)
        groups = self.space.budget.groups
        twin = make_unproved_traced(self.model, groups, candidate.plan, self.activations.next_run)
        state = candidate.after.model.state_dict()
        twin.load_state_dict({name: state[name] for name in twin.state_dict()})  # without what is no tensor
        return twin.requires_grad_(False)

    def _evaluate(self, model: nn.Module, watch: Watch) -> float:
        """Score a model, which is put into eval mode.

        Raises:
            SearchError: `evaluate` fails, or gives no finite number.
            HopelessError: the candidate is given up for a score on the way.
        """
        with torch.random.fork_rng(devices=[]), _failures_of("evaluate"):
            torch.manual_seed(self.seed)
            found: Any = self.evaluate(model.eval())
            if not isinstance(found, Iterator):
                return number_of(found)
            value, returned = watch.follow(found)
            return number_of(value if returned is None else returned)


@contextmanager
def _failures_of(word: str) -> Iterator[None]:
    """Turn what a function of the user raises into SearchError, but for the end of a candidate that is given up."""
    try:
        yield
    except HopelessError:
        raise
    except ScoreError as error:
        raise SearchError(f"{word} {error}") from None
    except Exception as error:  # code of the user
        raise SearchError(f"{word} fails: {type(error).__name__}: {first_line(error)}") from error


def _trained(after: Compensated, finetune: FineTune, word: str, watch: Watch) -> Compensated:
    """Train a copy of a model by a function of the user.

    Args:
        after: the model.
        finetune: the function.
        word: what it is called, for messages.
        watch: reads the scores that it yields.

    Raises:
        SearchError: it fails, or yields what is no number.
        HopelessError: the candidate is given up for a score on the way.
    """
    small = copy_model(after.model)
    with _failures_of(word):
        given = finetune(small)
        if isinstance(given, Iterator):
            _, given = watch.follow(given)
    tuned = given if isinstance(given, nn.Module) else small
    return Compensated(tuned.eval(), after.fold, after.refit)
