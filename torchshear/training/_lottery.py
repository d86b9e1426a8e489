"""Lottery tickets: rounds of training and pruning, each of which begins again with the weights of the start."""

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_kind, check_one_of
from torchshear._making import PruneResult
from torchshear.errors import ArgumentError, first_line
from torchshear.graph.model._process import outside_inference_mode
from torchshear.options import Form
from torchshear.pruners import random_criterion
from torchshear.pruners.masks import Mask
from torchshear.pruners.schedules import History, Lottery
from torchshear.speedup.shrinking._optimizer_state import plain_name
from torchshear.training._session import PruningSession

Control = Literal["none", "random", "reinitialised"]
_FORMAT: Final = "torchshear.lottery"


class Resettable(Protocol):
    """Something that can be set back: an optimizer, a learning rate scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state."""


class LotteryTicket:
    """Finds the small network that learns from the weights of the start as the dense one does.

    Rounds 0 to n. In each the user trains; round 0 is dense. At the begin of round k the weights of least score, as
    they were trained, go on top of those that went before, until a share of

        1 - (1 - P)^(k / n)

    is gone; then all that is left, and buffers, optimizer and scheduler, are set back to what they were at the start,
    or at an early step (`remember`). So the last round trains the ticket.

        ticket = LotteryTicket(model, args, ratio=0.8, rounds=5, optimizer=optimizer, scheduler=scheduler)
        for number in ticket.rounds():
            train(model, optimizer, scheduler)
        result = ticket.finish()

    The model is changed in place, as by a `PruningSession`, which is in `session`: call its hooks in training if the
    criterion is made of gradients.

    Args:
        model: the model, with the weights of the start.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        ratio: P, the share that is gone in the last round.
        rounds: n.
        optimizer: is set back with the weights, so that momentum and learning rates are those of the start; or None.
        scheduler: likewise; or None.
        others: more that is set back, by name, as a gradient scaler.
        control: what the ticket is to be compared with. "random": the same shares, at random. "reinitialised": the same
            choice, but weights are drawn anew at each reset. "none": the ticket itself.
        initialise: draws the weights of a module anew in place, for that; None: `reset_parameters` of all its layers.
        seed: seed of the controls.
        options: others of `PruningSession`: `criterion`, `pattern`, `scope`, `roles`, `exclude`, ...

    Raises:
        ArgumentError: an argument is outside what is accepted; a layer that has weights of its own cannot be
            initialised by `reset_parameters`. And what `PruningSession` raises.

    Reference: Frankle and Carbin, ICLR 2019, arXiv:1803.03635; rewinding: Frankle et al., ICML 2020, arXiv:1912.05671.
    """

    def __init__(  # noqa: PLR0913 - independent options, given by name
        self,
        model: nn.Module,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        ratio: float = 0.8,
        rounds: int = 5,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Resettable | None = None,
        others: Mapping[str, Resettable] | None = None,
        control: Control = "none",
        initialise: Callable[[nn.Module], object] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_count("rounds", rounds)
        check_count("seed", seed, 0)
        check_one_of("control", control, get_args(Control))
        if optimizer is not None:
            check_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer, or None")
        check_kind("others", {} if others is None else others, Mapping, "a mapping from names to what is set back")
        given = {"optimizer": optimizer, "scheduler": scheduler, **(others or {})}
        self._set_back: dict[str, Resettable] = {name: one for name, one in given.items() if one is not None}
        for name, one in self._set_back.items():
            if not callable(getattr(one, "state_dict", None)) or not callable(getattr(one, "load_state_dict", None)):
                raise ArgumentError(
                    f"{name} is {type(one).__name__}, which has no state_dict() and load_state_dict(); expected what "
                    f"can be set back."
                )
        for name in ("schedule", "soft", "shrink_every"):
            if name in options:
                raise ArgumentError(f"{name}= is no option of a lottery ticket, whose rounds say when what goes.")
        if control == "random":
            options["criterion"] = _random_weights(seed) if options.get("pattern") else random_criterion(seed)
        if control == "reinitialised":
            _check_initialisation(model, initialise)
        self._control, self._initialise, self._seed = control, initialise, seed
        schedule = Lottery(end=rounds)
        self.session = PruningSession(
            model, args, kwargs, schedule=schedule, ratio=ratio, optimizer=optimizer, **options
        )
        self._n_rounds, self._round = rounds, -1
        self.remember()

    @property
    def history(self) -> History:
        """The shares that were asked for and reached, round by round."""
        return self.session.history

    def __repr__(self) -> str:
        return f"<LotteryTicket, round {max(self._round, 0)} of {self._n_rounds}, {self.session}>"

    @torch.no_grad()
    def remember(self) -> None:
        """Take the state that weights, buffers, optimizer and scheduler have now for that of the start.

        Called at an early step of round 0, later rounds begin there ("rewinding"). The steps before it are then to be
        left out of later rounds, as a scheduler that is set back does by itself.

        Raises:
            ArgumentError: it is called in a later round, of which the ticket has no dense weights.
        """
        if self._round > 0:
            raise ArgumentError(
                f"remember() came in round {self._round}; call it in round 0, at the step to which later rounds return."
            )
        self._start = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self._states = {name: copy.deepcopy(one.state_dict()) for name, one in self._set_back.items()}

    def rounds(self) -> Iterator[int]:
        """Give the number of each round when it begins; train in the loop's body.

        Raises:
            WeightError: weights are NaN or infinite. And what `PruningSession.on_event` raises.
        """
        while self._round < self._n_rounds:
            self.begin_round()
            yield self._round

    def begin_round(self) -> None:
        """Begin the next round: choose what goes by the weights as they are, and set all that is left back.

        Raises:
            ArgumentError: all rounds have begun.
        """
        if self._round >= self._n_rounds:
            raise ArgumentError(f"all {self._n_rounds} rounds behind round 0 have begun; call finish().")
        self.session.on_event()
        self._round += 1
        if self._round:
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set weights, buffers, optimizer and scheduler back; masks stay."""
        tensors = self._tensors()
        for name, value in self._start.items():
            tensors[name].copy_(value)
        if self._control == "reinitialised":
            self._draw_anew(tensors)
        for name, one in self._set_back.items():
            one.load_state_dict(copy.deepcopy(self._states[name]))

    def _draw_anew(self, tensors: Mapping[str, Tensor]) -> None:
        """Draw all weights anew, by a seed for each round."""
        fresh = self.session._masked.dense_copy()
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + self._round)
            initialise_layers(fresh) if self._initialise is None else self._initialise(fresh)
        for name, tensor in (*fresh.named_parameters(), *fresh.named_buffers()):
            if name in tensors:
                tensors[name].copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, but for the masks themselves, by the names that they have without masks."""
        model = self.session.model
        masks = {id(module.mask) for module in model.modules() if isinstance(module, Mask)}
        named: dict[str, Tensor] = {plain_name(name): one for name, one in model.named_parameters()}
        return named | {name: one for name, one in model.named_buffers() if id(one) not in masks}

    @outside_inference_mode()
    def finish(self, form: Form = "auto") -> PruneResult:
        """Make the small model of the ticket as it is trained now, and prove that it is the masked one.

        Args:
            form: form of the result, as for `torchshear.prune`.

        Raises:
            ArgumentError: a hook of the session is missing.
            VerificationError: the small model is not equal to the masked one.
        """
        if self.session._order.place == "made":
            self.session.on_train_begin()
            self.session.on_train_end()
        return self.session.finish(form)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the ticket needs to go on: tensors, numbers and texts. Model and optimizer are beside it."""
        return {
            "format": _FORMAT,
            "round": self._round,
            "n_rounds": self._n_rounds,
            "control": self._control,
            "session": self.session.state_dict(),
            "start": {name: tensor.clone() for name, tensor in self._start.items()},
            "states": copy.deepcopy(self._states),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another ticket with the same settings was; model and optimizer have states of their own.

        Args:
            state: what `state_dict` gave, perhaps written and read by `torch.save` and `torch.load`.

        Raises:
            ArgumentError: it is none, or of a ticket with other settings.
        """
        own = {"format": _FORMAT, "n_rounds": self._n_rounds, "control": self._control}
        if not isinstance(state, Mapping) or any(state.get(name) != value for name, value in own.items()):
            raise ArgumentError(
                f"the state is not that of a lottery ticket with {self._n_rounds} rounds; expected one."
            )
        try:
            start, states, number = dict(state["start"]), dict(state["states"]), int(state["round"])
            fits = start.keys() == self._start.keys() and states.keys() == self._states.keys()
            if not fits or any(tensor.shape != self._start[name].shape for name, tensor in start.items()):
                raise ArgumentError("the state is of a ticket of another model, or sets other things back.")
            self.session.load_state_dict(state["session"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ArgumentError(f"the state is damaged: {first_line(error)}; load another.") from error
        self._start = {name: tensor.to(self._start[name].device) for name, tensor in start.items()}
        self._states, self._round = states, number


def initialise_layers(model: nn.Module) -> None:
    """Draw the weights of all layers anew, by the `reset_parameters` that torch's layers have."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()


def _check_initialisation(model: nn.Module, initialise: object) -> None:
    """Raise ArgumentError if weights of a model cannot be drawn anew."""
    if initialise is not None:
        if not callable(initialise):
            raise ArgumentError(f"initialise is {type(initialise).__name__}; expected a function of a module, or None.")
        return
    check_kind("model", model, nn.Module, "a torch.nn.Module instance")
    for name, module in model.named_modules():
        has_own = any(parameter is not None for parameter in module._parameters.values())
        if has_own and not hasattr(module, "reset_parameters") and not hasattr(module, "_reset_parameters"):
            raise ArgumentError(
                f"{type(module).__name__} {name!r} has weights of its own and no reset_parameters(); give initialise=, "
                f"a function that draws the weights of the model anew."
            )


def _random_weights(seed: int) -> Callable[[str, Tensor], Tensor]:
    """Return a score of single weights that is drawn from a seed, for each layer its own."""

    def random_weights(name: str, weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        return torch.rand(weight.shape, generator=generator, dtype=torch.float64)

    random_weights.__name__ = f"random(seed={seed})"
    return random_weights
