"""What the tools of torch expect of ``step()``: GradScaler, CUDA graphs, torch.distributed.checkpoint, clipping.

These are functions of a :class:`mada_optim.HypergradientOptimizer`. Those that check raise before anything changes.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mada_optim.engine.parameter_state import ParameterState
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.tensors.devices import device_of, has_values, is_capturing, number_dtype
from mada_optim.tensors.distributed import PLAIN, any_process, local, place_gradient, tell_autograd, whole

if TYPE_CHECKING:
    from mada_optim.optimizers.base import HypergradientOptimizer


def check_capture(optimizer: HypergradientOptimizer) -> None:
    """Raise RuntimeError where a CUDA graph would replay what only the captured step does, or its count and seeds."""
    if not is_capturing(device_of(_params(optimizer))):
        return
    captured = f"{type(optimizer).__name__}: step() is being captured in a graph"
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise RuntimeError(
            f"{captured}, which needs capturable=True in all parameter groups; make the optimizer with capturable=True"
        )
    for index, group in enumerate(optimizer.param_groups):
        grads = [param.grad for param in group["params"]]
        if not ParameterState(FamilyInGroup(optimizer.family, group)).repeats(optimizer.state, grads):
            raise RuntimeError(
                f"{captured}, but parameter group {index} has other gradients, betas or learned coefficients than in "
                "the last step; take a step with these before the capture"
            )


def check_gradients(optimizer: HypergradientOptimizer) -> list[list[Tensor | None]]:
    """Return the gradients of each group's parameters. Raise RuntimeError or ValueError where one cannot be used."""
    is_scaled = getattr(optimizer, "grad_scale", None) is not None
    return [_usable_gradients(optimizer, group["params"], is_scaled) for group in optimizer.param_groups]


def _usable_gradients(
    optimizer: HypergradientOptimizer, params: Sequence[Tensor], is_scaled: bool
) -> list[Tensor | None]:
    grads = [param.grad for param in params]
    there = [grad for grad in grads if grad is not None]
    if not set(map(_layout, there)) <= {torch.strided}:
        param, grad = next(
            (p, g) for p, g in zip(params, grads, strict=True) if g is not None and g.layout != torch.strided
        )
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients, got layout {grad.layout} "
            f"for a parameter of shape {tuple(param.shape)}"
        )
    if is_scaled and any(grad.dtype.to_real() == torch.float16 for grad in there):
        raise ValueError(
            "torch.amp.GradScaler: gradients in float16 cannot be unscaled without losing what they are scaled "
            "for; keep parameters in float32 and use torch.autocast"
        )
    if set(map(type, chain(params, there))) <= PLAIN:
        return grads
    for param in params:
        place_gradient(param)
    return [param.grad for param in params]


_layout = operator.attrgetter("layout")


def take_hyper_grad_scale(optimizer: HypergradientOptimizer) -> float | Tensor:
    """Return ``hyper_grad_scale``, and reset it: it is for one step, even if that step is not taken."""
    scale: Any = optimizer.hyper_grad_scale
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = whole(scale.detach()).reshape(())
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"hyper_grad_scale must be a number or a tensor of one element, got {scale!r}")
    else:
        scale = float(scale)
    optimizer.__dict__.pop("hyper_grad_scale", None)
    return scale  # type: ignore[no-any-return]


def is_phantom_step(optimizer: HypergradientOptimizer) -> bool:
    """Return whether this call only wants the state to be there: torch.distributed.checkpoint's lr = 0, zero gradients.

    Counting it as a step would change what a resumed run does.
    """
    if optimizer.state or any(group["lr"] != 0.0 for group in optimizer.param_groups):
        return False
    grads = [local(grad) for _, grad in _params_with_grad(optimizer)]
    has_nonzero = any(bool(grad.any()) for grad in grads if has_values(grad.device))
    if any(int(group["hyper_steps"]) for group in optimizer.param_groups):
        # Other processes may have a state, and do not ask. Whoever wants one here has given all a gradient.
        return bool(grads) and not has_nonzero
    return not any_process(_params(optimizer), has_nonzero)


def unscale(optimizer: HypergradientOptimizer) -> bool:
    """Do what torch.amp.GradScaler leaves to the step by two attributes, and return whether to take the step."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if found_inf is not None and any_process(_params(optimizer), bool(found_inf)):
        return False
    if grad_scale is not None:
        grads = [grad for _, grad in _params_with_grad(optimizer)]
        _multiply(list(map(local, grads)), grad_scale.to(number_dtype(grad_scale.device)).reciprocal().reshape(()))
        tell_autograd(grads)
    return True


def _multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place, all of one kind at once: a launch for each would take longer than the step."""
    by_kind: dict[Hashable, list[Tensor]] = {}
    for number, tensor in enumerate(tensors):
        # torch's foreach functions do not see a sign or a conjugation that is still to be done.
        special = tensor.is_neg() or tensor.is_conj()
        by_kind.setdefault((tensor.device, tensor.dtype, number if special else None), []).append(tensor)
    for members in by_kind.values():
        dtype = torch.promote_types(members[0].dtype.to_real(), torch.float32)
        one = factor.to(members[0].device, dtype)
        if len(members) == 1:
            members[0].mul_(one)
        else:
            torch._foreach_mul_(members, one)


def forget_grad_scaler(optimizer: HypergradientOptimizer) -> None:
    """Remove what torch.amp.GradScaler set for a step; it does so itself only after a step that succeeds."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)


def _params(optimizer: HypergradientOptimizer) -> Iterator[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _params_with_grad(optimizer: HypergradientOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Return pairs of a parameter and its gradient."""
    return ((param, param.grad) for param in _params(optimizer) if param.grad is not None)
