"""The order of hooks: what may come after what, and which one is missing where another comes too early."""

from typing import Final

from torchshear.errors import ArgumentError

# hook -> (places where it may come, the place behind it)
_HOOKS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "on_train_begin": (("made", "ended"), "training"),
    "on_epoch_begin": (("training",), "epoch"),
    "on_step_begin": (("epoch",), "step"),
    "on_before_optimizer_step": (("step",), "at the optimizer"),
    "on_after_optimizer_step": (("at the optimizer",), "stepped"),
    "on_step_end": (("step", "stepped"), "epoch"),
    "on_epoch_end": (("epoch",), "training"),
    "on_train_end": (("training",), "ended"),
    "on_event": (("made", "training", "epoch", "ended"), ""),
    "finish": (("ended",), ""),
}
_NEXT: Final = {
    "made": "on_train_begin()",
    "training": "on_epoch_begin(epoch), or on_train_end()",
    "epoch": "on_step_begin(step), or on_epoch_end()",
    "step": "on_before_optimizer_step(), or on_step_end() where gradients are gathered only",
    "at the optimizer": "optimizer.step() and then on_after_optimizer_step()",
    "stepped": "on_step_end()",
    "ended": "finish()",
}
_WHERE: Final = {
    "made": "before training began",
    "training": "between epochs",
    "epoch": "between steps",
    "step": "in a step, before the optimizer",
    "at the optimizer": "in a step, at the optimizer",
    "stepped": "in a step, behind the optimizer",
    "ended": "after training ended",
}


class HookOrder:
    """Place of a training, by the hooks that came."""

    def __init__(self) -> None:
        self.place = "made"

    def come(self, hook: str) -> None:
        """Take note of a hook.

        Raises:
            ArgumentError: it may not come now; says which one is missing.
        """
        places, behind = _HOOKS[hook]
        if self.place not in places:
            raise ArgumentError(
                f"{hook}() came {_WHERE[self.place]}, and may come {' or '.join(_WHERE[place] for place in places)} "
                f"only. What comes next here is {_NEXT[self.place]}: a hook was left out, or came twice."
            )
        self.place = behind or self.place

    def check_optimizer_step(self) -> None:
        """Raise ArgumentError for a step of the optimizer that no hook announced."""
        if self.place in ("training", "epoch", "step", "stepped"):
            raise ArgumentError(
                f"the optimizer makes a step {_WHERE[self.place]}, and on_before_optimizer_step() did not come before "
                f"it. Call it between loss.backward() and optimizer.step(), and on_after_optimizer_step() behind it."
            )

    @property
    def is_in_step(self) -> bool:
        """True where the optimizer is about to make a step, of which half is counted."""
        return self.place == "at the optimizer"
