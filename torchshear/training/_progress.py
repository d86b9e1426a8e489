"""Progress of a training, by numbers: where it is, and what is due there."""

from collections.abc import Mapping
from typing import Any

from torchshear.pruners.schedules import Renewal
from torchshear.training._recorder import Recorder
from torchshear.training._renewing import MaskRenewer
from torchshear.training._shrinking import Shrinker


class Progress:
    """Counts steps, epochs and events; where the schedule says so masks are renewed and the model is shrunk.

    Args:
        renewer: renews the masks.
        shrinker: shrinks the model.
        recorder: takes note of it.

    Attributes:
        n_steps: steps of the optimizer that were made.
        epoch: number of the epoch; -1 before the first.
        n_events: events that the user told.
    """

    def __init__(self, renewer: MaskRenewer, shrinker: Shrinker, recorder: Recorder) -> None:
        self._renewer, self._shrinker, self._recorder = renewer, shrinker, recorder
        self.n_steps, self.epoch, self.n_events = 0, -1, 0

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        self._renew("epoch", epoch)

    def begin_step(self) -> None:
        """Begin a step."""
        self._renew("step", self.n_steps)

    def come_to_event(self) -> None:
        """Come to the next event that the user tells."""
        self._renew("event", self.n_events)
        self.n_events += 1

    def end(self) -> None:
        """Come to what is due right behind the last step or epoch; the model is shrunk no more."""
        self._renew("step", self.n_steps, is_over=True)
        self._renew("epoch", self.epoch + 1, is_over=True)
        self._note(self._renewer.complete(self.n_steps, self.epoch), may_shrink=False)

    def _renew(self, by: str, position: int, is_over: bool = False) -> None:
        self._note(self._renewer.renew(by, position, self.n_steps, self.epoch, is_over), not is_over)

    def _note(self, renewal: Renewal | None, may_shrink: bool) -> None:
        if renewal is not None:
            self._recorder.renewed(renewal)
            if may_shrink:
                self._shrinker.renewed()

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors, numbers and texts."""
        return {
            "n_steps": self.n_steps,
            "epoch": self.epoch,
            "n_events": self.n_events,
            "shrinks": self._shrinker.state_dict(),
            "renewals": self._renewer.state_dict(),
            "record": self._recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._shrinker.load_state_dict(state["shrinks"])
        self._renewer.load_state_dict(state["renewals"])
        self._recorder.load_state_dict(state["record"])
        self.n_steps, self.epoch, self.n_events = (int(state[key]) for key in ("n_steps", "epoch", "n_events"))
