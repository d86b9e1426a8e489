"""Replaying the plan of a model of the zoo on a fresh one, and what is the same afterwards."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchshear
from tests.zoo import zoo
from torchshear.graph._outputs import output_leaves
from torchshear.speedup import OutputFactor, shrink_to_form

_PLAIN = (bool, int, float, str, tuple, list, torch.Size, type(None))


@dataclass(frozen=True, slots=True)
class Replay:
    """What came back of a pruned model.

    Attributes:
        form: the form of the result of `prune`.
        n_sizes: attributes that the plan sets.
        n_scales: hooks that it sets.
        n_tensors: tensors of the `state_dict`.
        n_equal: those that are equal bit for bit.
        differences: what else is not the same: form, attributes, hooks.
        error: largest difference of any output, relative to its largest value.
    """

    form: str
    n_sizes: int
    n_scales: int
    n_tensors: int
    n_equal: int
    differences: tuple[str, ...]
    error: float

    @property
    def is_same(self) -> bool:
        """Whether the replayed model is what `prune` gave."""
        return self.n_equal == self.n_tensors and not self.differences and self.error <= 1e-6


def replay(name: str, seed: int = 0) -> Replay:
    """Prune a model that ran once, save its plan, and make it again of a fresh model with other weights."""
    model, args, kwargs = zoo.build(name, seed)
    kwargs = padded(kwargs)
    with torch.no_grad():
        model(*args, **kwargs)
    result = torchshear.prune(model, args, kwargs, ratio=0.5)
    with tempfile.TemporaryDirectory() as folder:
        result.plan.save(Path(folder) / "plan.json")
        plan = torchshear.PruningPlan.load(Path(folder) / "plan.json")
    again = shrink_to_form(zoo.build(name, seed + 1)[0], plan)
    again.model.load_state_dict(result.model.state_dict())
    form = result.plan.form
    assert form is not None
    left, right = result.model.state_dict(), again.model.state_dict()
    error = _difference(result.model, again.model, args, kwargs)
    forms = () if again.form == result.form else (f"form {again.form}",)
    return Replay(
        result.form,
        len(form.sizes),
        len(form.factors),
        len(left),
        sum(n in right and t.dtype == right[n].dtype and torch.equal(t, right[n]) for n, t in left.items()),
        (*forms, *_differences(attributes(result.model), attributes(again.model))),
        error,
    )


def padded(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments in which the mask of all rows but the first ends before the row does."""
    kwargs = dict(kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask.clone()
        mask[1:, -max(1, mask.shape[1] // 4) :] = 0
        kwargs["attention_mask"] = mask
    return kwargs


def attributes(model: nn.Module) -> dict[str, Any]:
    """Plain values, objects of settings and hooks of all modules, and the buffers that are not saved."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = [repr(hook) for hook in module._forward_hooks.values() if isinstance(hook, OutputFactor)]
        found[f"{path} hooks"] = (type(module).__qualname__, module.training, hooks)
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, _PLAIN):
                found[f"{path}.{key}"] = repr(value)
            elif hasattr(value, "to_dict") and not isinstance(value, nn.Module):
                found[f"{path}.{key}"] = repr(value.to_dict())
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers[key]
            found[f"{path}.{key}"] = None if buffer is None else (tuple(buffer.shape), buffer.tolist())
    return found


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)][:3]


def _difference(
    one: nn.Module, two: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 3
) -> float:
    """Largest difference of outputs, on the example and on other numbers of its shapes."""
    torch.manual_seed(seed)
    others = (
        tuple(torch.randn_like(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args),
        {k: v.flip(-1) if k.endswith("input_ids") else v for k, v in kwargs.items()},
    )
    worst = 0.0
    for given, named in ((args, kwargs), others):
        with torch.no_grad():
            torch.manual_seed(seed)
            left = output_leaves(one(*given, **named))
            torch.manual_seed(seed)
            right = output_leaves(two(*given, **named))
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst
