"""The proof of one cut: which reference holds, and all comparisons with it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchshear.dependency import Cut
from torchshear.dependency._analysis import with_graph
from torchshear.errors import CaptureError, PlanError, VerificationError, WeightError, first_line
from torchshear.graph import ExampleInputs, Mode, capture_in_mode, output_leaves
from torchshear.graph.numerics._ties import Choices
from torchshear.speedup.comparing._compare import relative_error, tolerance
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._whole_model import training_cut
from torchshear.speedup.verification._difference import first_difference
from torchshear.speedup.verification._gradients import compare_gradients
from torchshear.speedup.verification._reference import MaskedNetwork
from torchshear.speedup.verification._runs import (
    Run,
    conditions,
    detached,
    given,
    gradients_of,
    in_dtype,
    kept_outputs,
    leaves_of,
    run_module,
)
from torchshear.speedup.verification._setting import Setting, Trial
from torchshear.speedup.verification._switches import Switch, find_switches, switched_on
from torchshear.speedup.verification._weights import Values


@dataclass(frozen=True, slots=True)
class Found:
    """What a proof found.

    Attributes:
        max_error: largest difference of an output.
        max_gradient_error: largest difference of a gradient; None where none was compared.
        excused: calls that were compared on kept positions only, with module and source line.
        modes: modes that were compared.
    """

    max_error: float
    max_gradient_error: float | None
    excused: tuple[str, ...]
    modes: tuple[Mode, ...]


def prove(setting: Setting, extra: Sequence[ExampleInputs] = ()) -> Found:
    """Compare outputs on all trials, and outputs and gradients of both modes on the last.

    Args:
        setting: what is compared.
        extra: further inputs on which outputs are compared.

    Raises:
        VerificationError: they differ.
        WeightError: they cannot be compared, since weights are NaN or infinite.
    """
    return _Proof(setting).run(extra)


class _Proof:
    """A proof under way.

    Attributes:
        setting: what is compared.
        excused: name of a call -> where it is, for calls whose operator sees kept positions only.
        has_gradients: whether the reference can be run with gradients; an operator need not have a derivative.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.excused: dict[str, str] = {}
        self.has_gradients = True
        self._candidates: dict[Trial, Run] = {}

    def run(self, extra: Sequence[ExampleInputs]) -> Found:
        setting = self.setting
        is_module, expected = self._expected()
        last, errors, actual = setting.last, [], Run([])
        for number, trial in enumerate((setting.first, setting.second, last)):
            actual = self._candidate_on(trial)
            error = self._compare(trial, expected[number], actual, expected[number - 1], is_module=is_module)
            errors += [error] if trial.dtype is last.dtype else []  # large images are compared in the model's own dtype
        values, is_wide = setting.values, last.dtype is torch.float64
        gradient_errors = [compare_gradients(values, expected[-1], actual, "in eval mode", is_wide=is_wide)]
        self._candidates[last] = actual = Run(actual.outputs)  # gradients take as much memory as the shrunk model
        in_eval = Run(expected.pop().outputs) if is_module else expected.pop()
        trained = self._of_module_in_training() if is_module else self._of_network_in_training(in_eval)
        if trained is not None:
            actual = self._candidate(last, "train", gradients=self.has_gradients)
            errors.append(_compare_in_training(trained, actual))
            gradient_errors.append(compare_gradients(values, trained, actual, "in train mode", is_wide=is_wide))
        switched = self._compare_switched(is_module=is_module)
        errors += [] if switched is None else [switched]
        errors += [self._compare_extra(Trial(inputs, None, last.dtype), is_module=is_module) for inputs in extra]
        known = [error for error in gradient_errors if error is not None]
        modes: tuple[Mode, ...] = ("eval",) if trained is None else ("eval", "train")
        return Found(max(errors), max(known, default=None), tuple(self.excused.values()), modes)

    def _expected(self) -> tuple[bool, list[Run]]:
        """Whether the masked module is the reference, and what the reference gives on the three trials."""
        mixes, n_noted = self.setting.mixes, len(self.setting.left_out)
        if mixes != "yes":
            self.has_gradients = self._is_differentiable(is_module=True)
            try:
                expected = self._of_module()
                if mixes == "no" or self._gives(expected):
                    return True, expected
            except Exception:  # zeros for weights may be more than the model's own code takes
                if mixes == "no":
                    raise
            del self.setting.left_out[n_noted:]
            self._candidates.clear()
        self.has_gradients = self._is_differentiable(is_module=False)
        return False, self._of_network()

    def _gives(self, expected: Sequence[Run]) -> bool:
        """Whether the shrunk model gives on the trials what is expected."""
        trials = (self.setting.first, self.setting.second, self.setting.last)
        pairs = zip(trials, expected, strict=True)
        return all(relative_error(e.outputs, self._candidate_on(t).outputs) <= tolerance(e.outputs) for t, e in pairs)

    # -- the user's own module with masked parameters -----------------------------------------------------------------

    def _of_module(self) -> list[Run]:
        first = [self._masked_module(trial) for trial in (self.setting.first, self.setting.second)]
        last = self.setting.last
        return [*first, self._with_gradients(lambda gradients: self._masked_module(last, gradients=gradients))]

    def _is_differentiable(self, *, is_module: bool) -> bool:
        """Whether gradients can be compared: a graph does not hold the backward of some functions of the user's."""
        lost = self.setting.graph.lost_backwards
        is_graph = not is_module or self.setting.is_traced
        if lost and is_graph:
            self.setting.left_out.append(f"gradients: a graph does not hold the backward of {lost[0]}")
        return not (lost and is_graph)

    def _with_gradients(self, run: Callable[[bool], Run]) -> Run:
        """A run with gradients, or without if there are none."""
        if not self.has_gradients:
            return run(False)
        try:
            found = run(True)
        except (RuntimeError, NotImplementedError, CaptureError) as error:
            found = run(False)
            self.setting.left_out.append(f"gradients: the original has none: {first_line(error)[:160]}")
        self.has_gradients = found.gradients is not None
        return found

    def _masked_module(self, trial: Trial, mode: Mode = "eval", *, gradients: bool = False) -> Run:
        setting = self.setting
        take = setting.values.of_gradient if gradients else None
        with given(setting.original, setting.own(setting.original, setting.masked(trial)), setting.caches[0]):
            return run_module(setting.original, trial.inputs, trial.dtype, mode, partial(self._keep, mode=mode), take)

    def _keep(self, leaves: list[Any], mode: Mode) -> list[Any]:
        """What is compared of the outputs in a mode, which are those of eval mode unless both were captured."""
        return kept_outputs(self.setting.plan, leaves, "eval" if self.setting.graph.training is None else mode)

    def _of_module_in_training(self) -> Run | None:
        """What it gives in train mode on the last trial; None where nothing can be compared."""
        if not self._can_train():
            return None
        trial = self.setting.last
        try:
            return self._masked_module(trial, "train", gradients=self.has_gradients)
        except Exception as error:  # a forward may raise anything
            self._note_no_training(error)
            return None

    def _can_train(self) -> bool:
        traced = [module for module in self.setting.small.modules() if isinstance(module, TracedModule)]
        if any("train" not in call.forwards for module in traced for call in module._calls):
            self.setting.left_out.append("train mode: the traced form has no graph for it")
            return False
        return True

    def _note_no_training(self, error: Exception) -> None:
        self.setting.left_out.append(f"train mode: the original does not run in it: {first_line(error)[:160]}")

    # -- the network on fewer channels --------------------------------------------------------------------------------

    def _of_network(self) -> list[Run]:
        """The first two trials side by side, so that what is cut can be checked; the graph is checked on the last."""
        values = self.setting.values
        runs = self._masked_network([self.setting.first, self.setting.second], values)
        last = self.setting.last
        self._check_graph(last)
        return [*runs, self._with_gradients(lambda grad: self._masked_network([last], values, gradients=grad)[0])]

    def _masked_network(self, trials: Sequence[Trial], values: Values, *, gradients: bool = False) -> list[Run]:
        """What the original graph gives on tensors of full size, if operators see kept positions; gradients of one."""
        setting, graph, trial = self.setting, values.groups.graph, trials[0]
        own = trial.state or setting.state
        masked = values.masked({name: own.get(name, entry.tensor) for name, entry in graph.state.items()})
        leaves = {
            name: tensor.detach().requires_grad_()
            for name, tensor in masked.items()
            if gradients and tensor.is_floating_point() and graph.state[name].kind == "parameter"
        }
        network = MaskedNetwork(graph.fx_graph, values.groups.facts, values.cut, {**masked, **leaves}, self.excused)
        inputs = [leaves_of(in_dtype(one.inputs, trial.dtype)) for one in trials]
        with conditions(trial.dtype, gradients=gradients):
            ((_, outputs),) = deque(network.values(inputs), maxlen=1)  # of the last node; others are not kept
            kept = [self._keep(output_leaves(one), graph.mode) for one in outputs]
            found = gradients_of(kept[0], leaves, values.of_gradient) if gradients else None
        return [Run(detached(one), found) for one in kept]

    def _of_network_in_training(self, in_eval: Run) -> Run | None:
        """What it gives in train mode on the last trial; None where nothing can be compared."""
        setting, trial = self.setting, self.setting.last
        if not self._can_train():
            return None
        try:
            dense = setting.dense(trial, "train")
        except Exception as error:  # a forward may raise anything
            self._note_no_training(error)
            return None
        if relative_error(trial.dense or [], dense) <= tolerance(dense):
            return in_eval  # the original computes the same in both modes, and so does the network
        try:
            training = setting.training or training_cut(setting.model, setting.graph, setting.cut)
        except (CaptureError, PlanError) as error:
            setting.left_out.append(f"train mode: {first_line(error)[:160]}")
            return None
        graph = replace(training.graph, state={**training.graph.state, **setting.graph.state})
        values = Values(replace(training.cut.groups, graph=graph, facts=training.facts), training.cut)
        return self._masked_network([trial, setting.beside(trial)], values, gradients=self.has_gradients)[0]

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _candidate_on(self, trial: Trial) -> Run:
        """What the shrunk model gives on one of the trials, of the last with gradients; run once."""
        if trial not in self._candidates:
            is_known = trial is self.setting.first and trial.inputs is self.setting.base and self.setting.on_base
            is_last = trial is self.setting.last
            self._candidates[trial] = is_known or self._candidate(trial, gradients=is_last and self.has_gradients)
        return self._candidates[trial]

    def _candidate(self, trial: Trial, mode: Mode = "eval", *, gradients: bool = False) -> Run:
        """What the shrunk model gives.

        Raises:
            VerificationError: it does not run.
        """
        try:
            return self.setting.shrunk(trial, mode, gradients=gradients)
        except Exception as error:  # a forward may raise anything
            what = f"the shrunk model does not run in {mode} mode: {type(error).__name__}: {first_line(error)[:160]}."
            raise VerificationError(f"{what} {self._difference(trial, float('inf'))}") from error

    def _compare(self, trial: Trial, expected: Run, actual: Run, beside: Run, *, is_module: bool) -> float:
        """Largest difference of an output.

        Raises:
            VerificationError: it is too large, also where both choose alike among values that are equal.
            WeightError: no model would be equal, since weights are NaN or infinite.
        """
        limit = tolerance(expected.outputs)
        error = relative_error(expected.outputs, actual.outputs, beside.outputs)
        if error > limit:
            _check_weights(self.setting)
            _check_state(self.setting, trial)
            error = min(error, self._error_without_ties(trial, beside, limit, is_module=is_module))
        if error > limit:
            raise VerificationError(self._difference(trial, error))
        return error

    def _compare_extra(self, trial: Trial, *, is_module: bool) -> float:
        """Largest difference of an output on inputs of the user's."""
        if is_module:
            expected = self._masked_module(trial)
        else:
            (expected,) = self._masked_network([trial], self.setting.values)
        return self._compare(trial, expected, self._candidate(trial), expected, is_module=is_module)

    def _compare_switched(self, *, is_module: bool) -> float | None:
        """Largest difference with numbers in attributes that switch something off set to others; None without any."""
        setting, trial = self.setting, self.setting.last
        switches = find_switches(setting.original, setting.candidate)
        if not switches or setting.graph.parts is not None:
            return None
        if self._is_without_effect(switches):
            return None
        try:
            with switched_on(setting.original, switches):
                expected = self._masked_module(trial) if is_module else self._network_with_other_graph(trial)
        except Exception as error:  # code of the model may take no other numbers
            setting.left_out.append(f"attributes that are 0.0: the original takes no others: {first_line(error)[:160]}")
            return None
        with switched_on(setting.candidate, switches):
            return self._compare(trial, expected, self._candidate(trial), expected, is_module=is_module)

    def _is_without_effect(self, switches: tuple[Switch, ...]) -> bool:
        """Whether the shrunk model, whose code is that of the original, gives the same with other attributes."""
        trial = self.setting.last
        before = self._candidate_on(trial).outputs
        try:
            with switched_on(self.setting.candidate, switches):
                return relative_error(before, self.setting.shrunk(trial).outputs) <= tolerance(before)
        except Exception:  # whether the original runs is seen next
            return False

    def _network_with_other_graph(self, trial: Trial) -> Run:
        """What the network on fewer channels gives by the graph of the original as it is now."""
        setting = self.setting
        graph = capture_in_mode(setting.original, setting.graph.inputs, "eval")
        groups = with_graph(setting.groups, graph)
        values = Values(groups, Cut(groups, setting.plan.kept))
        return self._masked_network([trial, setting.beside(trial)], values)[0]

    def _error_without_ties(self, trial: Trial, beside: Run, limit: float, *, is_module: bool) -> float:
        """Largest difference of an output if the candidate chooses as the reference does where values are equal."""
        choices = Choices()
        with choices.kept():
            if is_module:
                expected = self._masked_module(trial)
            else:
                (expected,) = self._masked_network([trial], self.setting.values)
        with choices.followed(limit):
            actual = self._candidate(trial)
        return relative_error(expected.outputs, actual.outputs, beside.outputs)

    def _difference(self, trial: Trial, error: float) -> str:
        setting = self.setting
        inputs = in_dtype(trial.inputs, trial.dtype)
        return first_difference(setting.values, trial.state or setting.state, inputs, trial.dtype, error)

    def _check_graph(self, trial: Trial) -> None:
        """The captured graph may stand for the model only if it computes, uncut, what the model does.

        Raises:
            VerificationError: it does not.
            WeightError: nor could it, since its weights are NaN or infinite.
        """
        if trial.is_captured or self.setting.is_captured(trial):
            return
        _check_weights(self.setting)
        _check_state(self.setting, trial)
        raise VerificationError(
            f"the captured graph is not the model: on inputs of the shapes of the example they differ. The forward of "
            f"{self.setting.plan.model_type} depends on what a graph cannot hold, such as values of its inputs in "
            f"Python."
        )


def _compare_in_training(expected: Run, actual: Run) -> float:
    """Largest difference of an output in train mode.

    Raises:
        VerificationError: it is too large.
    """
    error = relative_error(expected.outputs, actual.outputs)
    if error > tolerance(expected.outputs):
        raise VerificationError(
            f"in train mode the shrunk model differs from the masked model by {error:.2g} relative, though it does "
            f"not in eval mode; expected at most {tolerance(expected.outputs):.0e}. Its code uses a size in that mode "
            f"alone."
        )
    return error


def _check_state(setting: Setting, trial: Trial) -> None:
    """Raise VerificationError if a second run of the original on the same inputs gives something else.

    Attributes and buffers are put back after every run, so that models which count their runs can be compared. What
    lies elsewhere cannot be.
    """
    with given(setting.original, setting.own(setting.original, trial.state), setting.caches[0]):
        runs = [run_module(setting.original, trial.inputs, trial.dtype).outputs for _ in range(2)]
    error = relative_error(*runs)
    if error > tolerance(runs[0]):
        raise VerificationError(
            f"{setting.plan.model_type} is stateful: two runs of the model on the same inputs differ by {error:.2g} "
            f"relative, since its forward changes something outside its attributes and buffers. Nothing can be "
            f"compared with it; keep that in an attribute, or prune the model without it."
        )


def _check_weights(setting: Setting) -> None:
    """Raise WeightError if numbers of the model are NaN or infinite, which are equal to nothing."""
    for name, tensor in setting.state.items():
        is_weight = setting.graph.state[name].kind == "parameter" and tensor.is_floating_point()
        n_bad = int((~tensor.isfinite()).sum()) if is_weight and isinstance(tensor, Tensor) else 0
        if n_bad:
            raise WeightError(f"{name!r} is NaN or infinite in {n_bad} places; load the trained weights.")
