"""The proof of one cut: every comparison of a shrunk model with its reference."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from torchshear.errors import VerificationError, first_line
from torchshear.graph import ExampleInputs
from torchshear.graph.model._state import Mode
from torchshear.graph.numerics._ties import TieBreaker
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.verification._model_pair import ModelPair, Probe
from torchshear.speedup.verification._references import (
    ModuleReference,
    NetworkReference,
    Reference,
    describe_difference,
)
from torchshear.speedup.verification._runs import ModelRun, compare_gradients

Switch = tuple[str, str]  # name of a module, and of its attribute
_ON = 0.37


@dataclass(frozen=True, slots=True)
class ProofResult:
    """Errors that a proof found, all of them small enough.

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


@dataclass(eq=False)
class Proof:
    """Compares outputs on all probes, and outputs and gradients of both modes on the last.

    Attributes:
        pair: the models.
        reference: what the shrunk model is compared with.
    """

    pair: ModelPair
    reference: Reference = field(init=False)
    _small_runs: dict[Probe, ModelRun] = field(default_factory=dict, init=False)

    def run(self, extra: Sequence[ExampleInputs] = ()) -> ProofResult:
        """Make all comparisons.

        Args:
            extra: further inputs on which outputs are compared.

        Raises:
            VerificationError: the models differ.
            WeightError: they cannot be compared, since weights are NaN or infinite.
        """
        pair, expected = self.pair, self._run_reference()
        last, errors, actual = pair.last, [], ModelRun([])
        for number, probe in enumerate((pair.first, pair.second, last)):
            actual = self._run_small_once(probe)
            error = self._compare_outputs(probe, expected[number], actual, expected[number - 1])
            errors += [error] if probe.dtype is last.dtype else []  # large images are compared in the model's own dtype
        modes: tuple[Mode, ...] = ("eval",)
        is_float64 = last.dtype is torch.float64
        wanted, gradients = expected[-1].gradients, actual.gradients
        gradient_errors = [compare_gradients(pair.state_cut, wanted, gradients, "eval", is_float64=is_float64)]
        del wanted, gradients  # they take as much memory as the shrunk model
        self._small_runs[last] = actual = ModelRun(actual.outputs)
        trained = self.reference.run_in_training(expected)
        if trained is not None:
            modes = ("eval", "train")
            actual = self._run_small(last, "train", gradients=self.reference.has_gradients)
            errors.append(relative_error(trained.outputs, actual.outputs))
            if errors[-1] > tolerance(trained.outputs):
                raise VerificationError(
                    f"in train mode the shrunk model differs from the masked model by {errors[-1]:.2g} relative, "
                    f"though it does not in eval mode; expected at most {tolerance(trained.outputs):.0e}. Its code "
                    f"uses a size in that mode alone."
                )
            wanted, gradients = trained.gradients, actual.gradients
            gradient_errors.append(compare_gradients(pair.state_cut, wanted, gradients, "train", is_float64=is_float64))
        errors += self._compare_switched()
        for inputs in extra:
            probe = Probe(inputs, None, last.dtype)
            outputs = self.reference.run(probe)
            errors.append(self._compare_outputs(probe, outputs, self._run_small(probe), outputs))
        known = [error for error in gradient_errors if error is not None]
        return ProofResult(max(errors), max(known, default=None), tuple(self.reference.excused.values()), modes)

    def _run_reference(self) -> list[ModelRun]:
        """Choose the reference and run it on the three probes.

        It is the masked module if zeros at cut positions change nothing, or if the shrunk model equals it; else the
        network on fewer channels.
        """
        pair, n_noted = self.pair, len(self.pair.left_out)
        if pair.cross_channel != "inexact":
            self.reference = ModuleReference(pair)
            try:
                expected = self.reference.run_probes()
                if pair.cross_channel == "none":
                    return expected
                actual = [self._run_small_once(probe) for probe in (pair.first, pair.second, pair.last)]
                pairs = [(one.outputs, other.outputs) for one, other in zip(expected, actual, strict=True)]
                if all(relative_error(one, other) <= tolerance(one) for one, other in pairs):
                    return expected
            except Exception:  # zeros for weights may be more than the model's own code takes
                if pair.cross_channel == "none":
                    raise
            del pair.left_out[n_noted:]
            self._small_runs.clear()
        self.reference = NetworkReference(pair)
        return self.reference.run_probes()

    def _run_small_once(self, probe: Probe) -> ModelRun:
        """Run the shrunk model on one of the three probes, on the last with gradients; a second call gives that run."""
        if probe not in self._small_runs:
            gradients = probe is self.pair.last and self.reference.has_gradients
            known = self.pair.first_run if probe is self.pair.first else None
            self._small_runs[probe] = known or self._run_small(probe, gradients=gradients)
        return self._small_runs[probe]

    def _run_small(self, probe: Probe, mode: Mode = "eval", *, gradients: bool = False) -> ModelRun:
        """Run the shrunk model.

        Raises:
            VerificationError: it does not run.
        """
        try:
            return self.pair.run_small(probe, mode, gradients=gradients)
        except Exception as error:  # a forward may raise anything
            what = f"the shrunk model does not run in {mode} mode: {type(error).__name__}: {first_line(error)[:160]}."
            raise VerificationError(f"{what} {describe_difference(self.pair, probe, float('inf'))}") from error

    def _compare_outputs(self, probe: Probe, expected: ModelRun, actual: ModelRun, other: ModelRun) -> float:
        """Return the largest difference of an output.

        Args:
            probe: inputs and weights of the runs.
            expected: run of the reference.
            actual: run of the shrunk model.
            other: a run of the reference on other inputs, which tells what is ordinary for its outputs.

        Raises:
            VerificationError: it is too large, also where both models choose alike among values that are equal.
            WeightError: no model would be equal, since weights are NaN or infinite.
        """
        limit = tolerance(expected.outputs)
        error = relative_error(expected.outputs, actual.outputs, other.outputs)
        if error > limit:
            self.pair.check_comparable(probe)
            choices = TieBreaker()
            with choices.record():
                expected = self.reference.run(probe)
            with choices.replay(limit):
                actual = self._run_small(probe)
            error = min(error, relative_error(expected.outputs, actual.outputs, other.outputs))
        if error > limit:
            raise VerificationError(describe_difference(self.pair, probe, error))
        return error

    def _compare_switched(self) -> list[float]:
        """Compare outputs with attributes that are zero set to another number, which they may get after the cut.

        Returns:
            The largest difference of an output; nothing where no attribute is zero, or none has an effect.
        """
        pair, probe = self.pair, self.pair.last
        if pair.is_traced or pair.graph.parts is not None:  # in a graph an attribute became a number, and stays so
            return []
        # Attributes of the user's modules that are the number 0.0 in both models, as in a warm-up.
        others = dict(pair.candidate.named_modules())
        switches = tuple(
            (name, attribute)
            for name, module in pair.original.named_modules()
            if not type(module).__module__.startswith("torch.")
            for attribute, value in vars(module).items()
            if type(value) is float and value == 0 and vars(others.get(name, module)).get(attribute) == 0
        )
        if not switches:
            return []
        before = self._run_small_once(probe).outputs
        with suppress(Exception), _switched_on(pair.candidate, switches):  # if the original does not run is seen next
            if relative_error(before, pair.run_small(probe).outputs) <= tolerance(before):
                return []  # the code of the shrunk model is that of the original
        try:
            with _switched_on(pair.original, switches):
                expected = self.reference.run_recaptured(probe)
        except Exception as error:  # code of the model may take no other numbers
            pair.left_out.append(f"attributes that are 0.0: the original takes no others: {first_line(error)[:160]}")
            return []
        with _switched_on(pair.candidate, switches):
            return [self._compare_outputs(probe, expected, self._run_small(probe), expected)]


@contextmanager
def _switched_on(model: nn.Module, switches: tuple[Switch, ...]) -> Iterator[None]:
    """Set attributes to another number than zero for a while."""
    modules = dict(model.named_modules())
    try:
        for name, attribute in switches:
            setattr(modules[name], attribute, _ON)
        yield
    finally:
        for name, attribute in switches:
            setattr(modules[name], attribute, 0.0)
