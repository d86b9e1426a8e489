"""The proof of one cut: which reference holds, and all comparisons with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchshear.errors import CaptureError, PlanError, VerificationError, WeightError, first_line
from torchshear.graph import Mode, locate, output_leaves
from torchshear.speedup._compare import relative_error, tolerance
from torchshear.speedup._shrink import training_cut
from torchshear.speedup._traced import TracedModule
from torchshear.speedup.verification._difference import first_difference
from torchshear.speedup.verification._gradients import compare_gradients
from torchshear.speedup.verification._reference import MaskedNetwork
from torchshear.speedup.verification._runs import (
    Run,
    conditions,
    detached,
    fresh_copy,
    given,
    gradients_of,
    in_dtype,
    kept_outputs,
    leaves_of,
    run_module,
)
from torchshear.speedup.verification._setting import Setting, Trial
from torchshear.speedup.verification._weights import State, Values


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


def prove(setting: Setting) -> Found:
    """Compare outputs on all trials, and outputs and gradients of both modes on the last.

    Raises:
        VerificationError: they differ.
        WeightError: they cannot be compared, since weights are NaN or infinite.
    """
    return _Proof(setting).run()


class _Proof:
    """A proof under way.

    Attributes:
        setting: what is compared.
        excused: name of a call -> where it is, for calls whose operator sees kept positions only.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.excused: dict[str, str] = {}

    def run(self) -> Found:
        trials, last = self.setting.trials, self.setting.trials[-1]
        expected, is_module = self._expected()
        actual = [self._candidate(trial) for trial in trials[:-1]]
        actual.append(self._candidate(last, gradients=self.setting.has_gradients))
        beside = [expected[1], *[expected[0]] * (len(expected) - 1)]
        errors = []
        for trial, one, other, near in zip(trials, expected, actual, beside, strict=True):
            error = relative_error(one.outputs, other.outputs, near.outputs)
            if error > tolerance(one.outputs):
                self._refuse(trial, error)
            errors.append(error)
        gradient_errors = [compare_gradients(self.setting.values, expected[-1], actual[-1], "in eval mode")]
        trained = self._expected_in_training(expected[-1], is_module)
        if trained is not None:
            other = self._candidate(last, "train", gradients=self.setting.has_gradients)
            errors.append(_compare_in_training(trained, other))
            gradient_errors.append(compare_gradients(self.setting.values, trained, other, "in train mode"))
        known = [error for error in gradient_errors if error is not None]
        modes: tuple[Mode, ...] = ("eval",) if trained is None else ("eval", "train")
        return Found(max(errors), max(known, default=None), tuple(self.excused.values()), modes)

    # -- the reference ------------------------------------------------------------------------------------------------

    def _expected(self) -> tuple[list[Run], bool]:
        """What the reference gives on each trial, and whether it is the user's own module with masked parameters.

        Where operators mix positions of which some are cut, it may be the network on fewer channels instead.
        """
        setting = self.setting
        network = MaskedNetwork(setting.graph.fx_graph, setting.groups.facts, setting.cut, {})
        mixes = any(network.is_mixed(node) for node in setting.graph)
        if mixes and not self._is_masked_module(setting.trials):
            return self._kept_positions(), False
        last = self._masked_module(setting.trials[-1], gradients=setting.has_gradients)
        return [*(self._masked_module(trial) for trial in setting.trials[:-1]), last], True

    def _kept_positions(self) -> list[Run]:
        """What the network on fewer channels gives on each trial."""
        setting = self.setting
        runs: list[Run] = []
        for number, trial in enumerate(setting.trials):
            if number:
                self._check_graph(trial)
            beside = setting.trials[1 if number != 1 else 0]
            grad = setting.has_gradients and trial is setting.trials[-1]
            runs.append(self._masked_network(trial, beside, setting.values, grad=grad))
        return runs

    def _masked_module(self, trial: Trial, mode: Mode = "eval", *, gradients: bool = False) -> Run:
        """The user's own module with the cut weights set to zero."""
        setting = self.setting
        masked = setting.values.masked(trial.state or setting.state)
        with given(setting.original, setting.own(setting.original, masked), setting.caches[0]):
            return run_module(setting.original, trial.inputs, setting.dtype, mode, self._keep, gradients=gradients)

    def _keep(self, leaves: list[Any]) -> list[Any]:
        return kept_outputs(self.setting.plan, leaves)

    def _is_masked_module(self, trials: Sequence[Trial]) -> bool:
        """Whether the shrunk model gives what the masked module does, though operators mix positions."""
        for trial in trials:
            try:
                expected = self._masked_module(trial).outputs
                if relative_error(expected, self._candidate(trial).outputs) > tolerance(expected):
                    return False
            except Exception:  # zeros for weights may be more than the model's own code takes
                return False
        return True

    def _masked_network(self, trial: Trial, beside: Trial, values: Values, *, grad: bool) -> Run:
        """The network on fewer channels, node by node on tensors of full size, on two inputs at once."""
        setting, graph = self.setting, values.groups.graph
        state: State = trial.state or setting.state
        kinds = {name: entry.kind for name, entry in graph.state.items()}
        state = {name: state.get(name, entry.tensor) for name, entry in graph.state.items()}
        leaves = {
            name: tensor.clone().requires_grad_()
            for name, tensor in values.masked(state).items()
            if grad and tensor.is_floating_point() and kinds[name] == "parameter"
        }
        masked = {**values.masked(state), **leaves}
        network = MaskedNetwork(graph.fx_graph, values.groups.facts, values.cut, masked)
        inputs = [leaves_of(in_dtype(one.inputs, setting.dtype)) for one in (trial, beside)]
        with conditions(setting.dtype, gradients=grad):
            *_, (_, outputs) = network.values(inputs)
            kept = self._keep(output_leaves(outputs[0]))
            gradients = gradients_of(kept, leaves) if grad else None
        self.excused |= {name: f"{name} ({locate(node)})" for name, node in network.excused.items()}
        return Run(detached(kept), gradients)

    # -- train mode ---------------------------------------------------------------------------------------------------

    def _expected_in_training(self, in_eval: Run, is_module: bool) -> Run | None:
        """What the reference gives in train mode on the last trial; None where nothing can be compared."""
        setting, trial = self.setting, self.setting.trials[-1]
        small = setting.small
        if isinstance(small, TracedModule) and any("train" not in call.forwards for call in small._calls):
            setting.left_out.append("train mode: the traced form has no graph for it")
            return None
        try:
            with given(setting.original, setting.own(setting.original, trial.state), setting.caches[0]):
                dense = run_module(setting.original, trial.inputs, setting.dtype, "train")
        except Exception as error:  # a forward may raise anything
            setting.left_out.append(f"train mode: the original does not run in it: {first_line(error)[:160]}")
            return None
        if is_module:
            return self._masked_module(trial, "train", gradients=setting.has_gradients)
        if relative_error(trial.dense.outputs, dense.outputs) <= tolerance(dense.outputs):
            return in_eval  # the original computes the same in both modes, and so does the reference
        return self._kept_positions_in_training(replace(trial, dense=dense))

    def _kept_positions_in_training(self, trial: Trial) -> Run | None:
        """What the network on fewer channels gives by the graph of train mode."""
        setting = self.setting
        try:
            train, cut, facts = training_cut(setting.model, setting.graph, setting.cut)
        except (CaptureError, PlanError) as error:
            setting.left_out.append(f"train mode: {first_line(error)[:160]}")
            return None
        graph = replace(train, state={**train.state, **setting.graph.state})
        values = Values(replace(cut.groups, graph=graph, facts=facts), cut)
        return self._masked_network(trial, trial, values, grad=setting.has_gradients)

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _candidate(self, trial: Trial, mode: Mode = "eval", *, gradients: bool = False) -> Run:
        """What the shrunk model gives.

        Raises:
            VerificationError: it does not run.
        """
        setting = self.setting
        state = None if trial.state is None else setting.values.sliced(trial.state)
        try:
            with given(setting.candidate, setting.own(setting.candidate, state), setting.caches[1]):
                return run_module(setting.candidate, trial.inputs, setting.dtype, mode, gradients=gradients)
        except Exception as error:  # a forward may raise anything
            what = f"the shrunk model does not run in {mode} mode: {type(error).__name__}: {first_line(error)[:160]}."
            raise VerificationError(f"{what} {self._difference(trial, float('inf'))}") from error

    def _difference(self, trial: Trial, error: float) -> str:
        setting = self.setting
        inputs = in_dtype(trial.inputs, setting.dtype)
        return first_difference(setting.values, trial.state or setting.state, inputs, setting.dtype, error)

    def _refuse(self, trial: Trial, error: float) -> None:
        """Say why a candidate is refused.

        Raises:
            VerificationError: always, unless
            WeightError: no model would be equal, since weights are NaN or infinite.
        """
        _check_weights(self.setting)
        raise VerificationError(self._difference(trial, error))

    def _check_graph(self, trial: Trial) -> None:
        """The captured graph may stand for the model only if it computes, uncut, what the model does.

        Raises:
            VerificationError: it does not.
            WeightError: nor could it, since its weights are NaN or infinite.
        """
        setting = self.setting
        if setting.is_captured(trial):
            return
        _check_weights(setting)
        again = _second_run(setting, trial)
        if again > tolerance(trial.dense.outputs):
            raise VerificationError(
                f"{setting.plan.model_type} is stateful: two runs of the model on the same inputs differ by "
                f"{again:.2g} relative, since its forward changes what it holds. Prune it without that."
            )
        raise VerificationError(
            f"the captured graph is not the model: on inputs of the shapes of the example they differ. The forward of "
            f"{setting.plan.model_type} depends on what a graph cannot hold, such as values of its inputs in Python."
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


def _second_run(setting: Setting, trial: Trial) -> float:
    """By how much a second run on the same inputs differs, if what the first one left behind is not put back."""
    twin = fresh_copy(setting.original, trial.inputs, setting.dtype)
    for module in twin.modules():
        module.training = False
    inputs, runs = in_dtype(trial.inputs, setting.dtype), []
    for _ in range(2):
        own = inputs.copy()
        with conditions(setting.dtype):
            runs.append(detached(output_leaves(twin(*own.args, **own.kwargs))))
    return relative_error(*runs)


def _check_weights(setting: Setting) -> None:
    """Raise WeightError if numbers of the model are NaN or infinite, which are equal to nothing."""
    for name, tensor in setting.state.items():
        is_weight = setting.graph.state[name].kind == "parameter" and tensor.is_floating_point()
        n_bad = int((~tensor.isfinite()).sum()) if is_weight and isinstance(tensor, Tensor) else 0
        if n_bad:
            raise WeightError(f"{name!r} is NaN or infinite in {n_bad} places; load the trained weights.")
