"""What a pruned model must compute, worked out without the library's shrinker or verifier.

Two oracles. The zero-masked original: every cut position of every parameter and buffer is zero, the rest is the model
as it was. It holds wherever no operator computes a statistic over a pruned axis. For some of the others there are
formulas written by hand (`FORMULAS`), which compute the answer from the kept positions alone.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.strategies import kept_sets
from torchshear.dependency import ChannelGroups
from torchshear.pruners import plan_from_kept

Masks = Mapping[str, Tensor]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its qualified name, tied ones under each of their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A float64 copy in eval mode, every masked position zeroed; a masked running variance is 1, so nothing is NaN."""
    masked = copy.deepcopy(model).double().eval()
    tensors = named_tensors(masked)
    with torch.no_grad():
        for name, mask in masks.items():
            assert name in tensors, f"the plan masks {name!r}, which the model does not have"
            assert mask.dtype == torch.bool, f"mask of {name!r} is {mask.dtype}"
            assert mask.shape == tensors[name].shape, f"mask of {name!r}: {mask.shape} for {tensors[name].shape}"
            tensors[name].masked_fill_(~mask, 1 if name.endswith("running_var") else 0)
    return masked


def _as_double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def fresh_inputs(inputs: object, seed: int) -> object:
    """Random inputs of the same structure, shapes and dtypes; integers are the given ones shuffled: still valid."""
    generator = torch.Generator().manual_seed(seed)

    def fresh(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)

    return pytree.tree_map(fresh, inputs)


def assert_outputs_equal(actual: object, expected: object, rtol: float) -> None:
    """Compare two outputs leaf by leaf, relative to the largest absolute value of the expected tensor."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"output structure {actual_spec}, expected {expected_spec}"
    for index, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if not isinstance(e, Tensor):
            assert a == e, f"output {index}: {a!r}, expected {e!r}"
            continue
        assert a.shape == e.shape, f"output {index}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        assert a.dtype == e.dtype, f"output {index}: dtype {a.dtype}, expected {e.dtype}"
        assert torch.isfinite(e).all(), f"output {index}: the oracle itself is not finite"
        scale = e.abs().max().item() or 1.0
        error = (a - e).abs().max().item() / scale
        assert error <= rtol, f"output {index}: relative error {error:.3e} exceeds {rtol:.0e}"


def assert_outputs_of_same_form(actual: object, expected: object) -> None:
    """Assert that both have the same structure, shapes and dtypes, and that the first is finite."""
    leaves, spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        if isinstance(leaf, Tensor):
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
            assert torch.isfinite(leaf).all()
        else:
            assert leaf == other


def assert_equals_masked(
    model: nn.Module, small: nn.Module, plan: object, args: tuple, kwargs: dict | None = None, rtol: float = 1e-9
) -> None:
    """Assert that `small` computes what `model` computes with the cut positions zeroed, in eval mode and float64."""
    assert_same_function(masked_copy(model, plan.masks()), small, args, kwargs, rtol)


def assert_same_function(
    reference: Callable[..., object], small: nn.Module, args: tuple, kwargs: dict | None = None, rtol: float = 1e-9
) -> None:
    """Assert that both give the same outputs on the example inputs and on fresh random ones."""
    small = copy.deepcopy(small).double().eval()
    example = pytree.tree_map(_as_double, (tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        for inputs in (example, fresh_inputs(example, seed=1)):
            # Each gets inputs of its own: a model may write into them.
            (a, b), (c, d) = copy.deepcopy(inputs), copy.deepcopy(inputs)
            assert_outputs_equal(small(*a, **b), reference(*c, **d), rtol)


def assert_is_slice(model: nn.Module, small: nn.Module, plan: object) -> None:
    """Assert that each tensor of `small` holds the kept positions of the original, in order, under the same name."""
    masks, before, after = plan.masks(), named_tensors(model), named_tensors(small)
    assert small.state_dict().keys() == model.state_dict().keys()
    for name, tensor in after.items():
        if name not in before:
            continue  # a constant of the graph, which the state does not hold
        kept = before[name] if name not in masks else before[name][masks[name]]
        assert tensor.dtype == before[name].dtype
        assert tensor.requires_grad == before[name].requires_grad, f"requires_grad of {name!r} changed"
        assert torch.equal(tensor.detach().flatten(), kept.detach().flatten()), (
            f"{name!r} is not a slice of the original"
        )
        assert not tensor.numel() or tensor.data_ptr() != before[name].data_ptr(), f"{name!r} shares memory"


def fingerprint(model: nn.Module) -> str:
    """A hash of all that pruning must leave alone: values, flags and gradients, modes, attributes, hooks, RNG state."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for name, tensor in named_tensors(model).items():
        described = (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad, tensor.data_ptr())
        digest.update(repr(described).encode())
        digest.update(repr(None if tensor.grad is None else tensor.grad.sum().item()).encode())
        digest.update(np.ascontiguousarray(tensor.detach().numpy()).tobytes())
    for name, module in model.named_modules():
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float | bool | str | tuple)}
        n_hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        described = (name, type(module).__qualname__, n_hooks, sorted(vars(module)), sorted(numbers.items()))
        digest.update(repr(described).encode())
    return digest.hexdigest()


def n_elements(model: nn.Module) -> int:
    """Elements of all distinct parameters and buffers."""
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one checked pruning did."""

    n_groups: int
    n_units: int
    n_cut: int
    is_native: bool


def check_groups(groups: object) -> None:
    """Assert what every list of channel groups promises about itself."""
    names = [group.name for group in groups]
    assert len(names) == len(set(names)) == len(groups)
    for group in groups:
        assert group.width >= 1
        assert group.is_prunable or (isinstance(group.reason, str) and group.reason)
        if group.balance is not None:
            assert group.balance.shape == (group.width,)


def check_random_pruning(
    model: nn.Module,
    args: tuple,
    kwargs: dict | None,
    kept_seed: int,
    is_cross_channel: bool,
    groups: ChannelGroups | None = None,
) -> Outcome:
    """Cut random units of every group and assert the invariants 1, 2, 3 and 7 of the design.

    Args:
        model: in eval mode, with weights of all sizes.
        args: example inputs.
        kwargs: those by name.
        kept_seed: chooses the units.
        is_cross_channel: whether zeroing is not cutting, so that the masked network is no answer.
        groups: of the model, where they are known; captured and analysed here otherwise.

    Returns:
        How much was cut, so that a caller can assert that anything was.
    """
    before = fingerprint(model)
    groups = groups or torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    check_groups(groups)
    kept = kept_sets(groups, kept_seed)
    plan = plan_from_kept(groups, kept)
    small = torchshear.shrink(model, plan, verify=False)
    torchshear.verify(model, small, plan, args=args, kwargs=kwargs)
    assert fingerprint(model) == before, "the user's model or the random state was changed"
    assert small is not model
    assert small.training == model.training
    assert_is_slice(model, small, plan)
    if not is_cross_channel:
        assert_equals_masked(model, small, plan, args, kwargs)
    widths = {group.name: group.width for group in groups}
    n_cut = sum(widths[name] - len(indices) for name, indices in kept.items())
    assert (n_elements(small) < n_elements(model)) == (n_cut > 0), f"{n_cut} units cut, size does not follow"
    return Outcome(len(groups), sum(widths.values()), n_cut, type(small) is type(model))


def _normalised(x: Tensor, norm: nn.LayerNorm, kept: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[kept] + norm.bias[kept]


def _layer_norm_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    d, h = masks["stem.bias"], masks["up.bias"]
    stream = x @ model.stem.weight[d].T + model.stem.bias[d]
    hidden = _normalised(stream, model.norm, d) @ model.up.weight[h][:, d].T + model.up.bias[h]
    hidden = F.gelu(_normalised(hidden, model.inner, h))
    stream = stream + hidden @ model.down.weight[d][:, h].T + model.down.bias[d]
    return _normalised(stream, model.last, d) @ model.head.weight[:, d].T + model.head.bias


def _rms_norm_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    h = masks["up.bias"]
    hidden = x @ model.up.weight[h].T + model.up.bias[h]
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight[h]
    return F.silu(hidden) @ model.down.weight[:, h].T + model.down.bias


def _group_norm_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    h = masks["a.bias"]
    x = F.conv2d(x, model.a.weight[h], model.a.bias[h], padding=1)
    block, rows = torch.arange(16)[h] // 4, []
    for index in range(4):
        part = x[:, block == index]
        centred = part - part.mean((1, 2, 3), keepdim=True)
        rows.append(centred / (centred.square().mean((1, 2, 3), keepdim=True) + model.norm.eps).sqrt())
    x = torch.cat(rows, 1) * model.norm.weight[h, None, None] + model.norm.bias[h, None, None]
    return F.conv2d(F.relu(x), model.b.weight[:, h], model.b.bias)


def _channel_layer_norm_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    h = masks["a.bias"]
    x = F.conv2d(x, model.a.weight[h], model.a.bias[h], padding=1)
    x = x - x.mean((1, 2, 3), keepdim=True)
    x = x / (x.square().mean((1, 2, 3), keepdim=True) + model.norm.eps).sqrt()
    return F.conv2d(x * model.norm.weight[h] + model.norm.bias[h], model.b.weight[:, h], model.b.bias)


def _mean_gate_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    h = masks["a.bias"]
    x = F.conv2d(x, model.a.weight[h], model.a.bias[h], padding=1)
    pooled = torch.stack([x.sum(1) / int(h.sum()), x.max(1).values], 1)
    gate = F.conv2d(pooled, model.gate.weight, model.gate.bias, padding=1).sigmoid()
    return F.conv2d(x * gate, model.b.weight[:, h], model.b.bias)


def _softmax_reference(model: nn.Module, masks: Masks, x: Tensor) -> Tensor:
    h = masks["a.bias"]
    x = F.conv2d(x, model.a.weight[h], model.a.bias[h], padding=1)
    x = (x - x.max(1, keepdim=True).values).exp()
    return F.conv2d(x / x.sum(1, keepdim=True), model.b.weight[:, h], model.b.bias)


# Network that mixes a pruned axis -> its answer on the kept positions, written by hand: `formula(model, masks, *args)`
# reads the kept positions of an axis from the mask of a one-dimensional parameter.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "layer_norm_mlp": _layer_norm_reference,
    "rms_norm_mlp": _rms_norm_reference,
    "group_norm_net": _group_norm_reference,
    "channel_layer_norm": _channel_layer_norm_reference,
    "channel_mean_gate": _mean_gate_reference,
    "channel_softmax": _softmax_reference,
}
